"""The bytes of a shard: header, columns, segments."""
