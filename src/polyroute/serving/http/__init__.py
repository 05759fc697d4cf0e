"""The server's HTTP interface, which is OpenAI's; it needs the extra `serve`."""
