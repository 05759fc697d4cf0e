"""Adapting to new tasks, many side by side."""
