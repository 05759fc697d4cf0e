"""The command line: one file a command, and how options become flags."""
