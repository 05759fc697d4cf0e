"""Readers of suites, one file for each format; `polyroute.suites` opens the one that fits."""
