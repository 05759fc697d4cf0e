"""Readers of suites, one file per format; `polyroute.data.open` chooses among them."""
