"""Readers of suites, one file for each format; `polyroute.data.open` opens the one that fits."""
