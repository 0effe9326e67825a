"""One shard: sealed, opened, verified."""
