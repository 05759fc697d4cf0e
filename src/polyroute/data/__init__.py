"""Suites of tasks, their readers, sampling and metrics."""
