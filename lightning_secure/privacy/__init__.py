"""Differential privacy: sampling, clipping, noise and the account of it. Knows no Lightning."""
