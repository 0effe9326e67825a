"""Files on their way to a tracking server."""
