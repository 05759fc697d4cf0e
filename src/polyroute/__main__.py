"""`python -m polyroute` is the command line."""

from polyroute.cli import main

main()
