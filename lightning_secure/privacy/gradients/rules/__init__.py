"""Layers whose per-sample gradients are known by formula, one kind a file."""
