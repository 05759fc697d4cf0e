"""What a run needs from its machine: files, printing, progress, interrupts and processes."""
