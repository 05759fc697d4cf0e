"""The adapted layers: where they are, what they apply, and for which tasks."""
