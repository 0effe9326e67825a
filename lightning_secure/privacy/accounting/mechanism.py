"""Accounted mechanisms: steps of a sampled Gaussian mechanism, and how several of them join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Release(NamedTuple):
    """A number of steps of one sampled Gaussian mechanism.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sample_rate: Probability with which each row is drawn.
        steps: How often.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def merged(releases: Sequence[Release]) -> dict[tuple[float, float], int]:
    """Return the number of steps of each mechanism, in the order of its first one.

    >>> merged([Release(1.0, 0.1, 2), Release(9.0, 1.0, 1), Release(1.0, 0.1, 3)])
    {(1.0, 0.1): 5, (9.0, 1.0): 1}
    """
    totals: dict[tuple[float, float], int] = {}
    for noise_multiplier, sample_rate, steps in releases:
        if steps:
            mechanism = (noise_multiplier, sample_rate)
            totals[mechanism] = totals.get(mechanism, 0) + steps
    return totals


def joint_noise(*noise_multipliers: float) -> float:
    """Return the noise multiplier of all that is released of one draw together.

    Args:
        noise_multipliers: Of each release, in units of what one row can change in it.

    Divided by its noise's standard deviation, each release is a part of one vector with noise of
    width one, in which a row changes at most ``sqrt(sum(s**-2))``. To account for the parts as if
    each had drawn its own rows would be wrong.

    Source:
        Andrew et al. 2019, arXiv:1905.03871, theorem 1.

    >>> round(joint_noise(1.0, 2.0), 4)
    0.8944
    """
    if 0 in noise_multipliers:
        return 0.0
    result: float = sum(noise**-2 for noise in noise_multipliers) ** -0.5
    return result
