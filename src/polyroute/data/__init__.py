"""Tasks: suites, their readers, sampling and metrics."""
