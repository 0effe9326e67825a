"""Gaussian noise for released sums."""
