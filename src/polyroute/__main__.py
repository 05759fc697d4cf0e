"""`python -m polyroute` is the command line."""

from polyroute.program.cli import main

main()
