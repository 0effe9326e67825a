"""Generations of a dataset: commit, rollback pins, garbage."""
