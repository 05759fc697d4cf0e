"""Inventories and runs on disk and on the hub."""
