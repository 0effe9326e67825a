"""Clipping of rows' gradients: flat, layer by layer, or to an adaptive bound."""
