"""Erasing a shard or a subject, and the report of what still opens it."""
