"""Serving an inventory over HTTP: one process, one base model, and a row for every task."""
