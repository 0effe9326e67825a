"""From a source's rows to sealed shards and a committed split."""
