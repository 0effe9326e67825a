"""Metrics of the rows that are published with noise, and what that costs.

Every one of them is a mean of one number a row, moved into declared bounds. With half the width of
the bounds as the unit and their middle as zero, a row that is added or removed changes the sum by
one at most, and noise of so many units has so much as its noise multiplier.
"""
