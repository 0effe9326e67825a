"""From a shard on the disk to the rows of a batch."""
