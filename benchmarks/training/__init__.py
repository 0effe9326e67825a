"""The ways to train that benchmarks/dp.py compares, each in a process of its own."""
