"""What rows' gradients are clipped to: in one piece, layer by layer, or to a bound that follows."""
