"""What each command can be told, as frozen records."""
