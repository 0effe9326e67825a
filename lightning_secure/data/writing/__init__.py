"""Writing: a source's rows become sealed shards and a committed split."""
