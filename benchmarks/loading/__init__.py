"""The systems that benchmarks/shards.py compares, each in a process of its own."""
