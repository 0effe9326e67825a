"""Per-sample norms and clipped sums from one backward pass."""
