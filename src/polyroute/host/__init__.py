"""What surrounds a run: files, printing, progress, interrupts and processes."""
