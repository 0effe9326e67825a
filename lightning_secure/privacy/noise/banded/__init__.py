"""DP-FTRL with a banded matrix: noise that later steps take back, for rows in a fixed order."""
