"""Shards: sealed, opened, verified."""
