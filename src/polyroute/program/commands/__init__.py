"""What the commands do: from options to a finished folder and a result."""
