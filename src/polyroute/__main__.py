"""`python -m polyroute` is the command line."""

from polyroute.program.cli.app import main

main()
