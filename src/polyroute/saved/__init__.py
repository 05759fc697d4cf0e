"""What is written to disk and to the hub, and read back."""
