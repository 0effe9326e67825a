"""Reading: a shard on the disk becomes the rows of a batch."""
