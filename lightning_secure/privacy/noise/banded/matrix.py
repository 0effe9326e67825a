"""The matrix of banded noise: its correlation over steps, and the sensitivity of one row.

With gradients ``G``, one a step, a run releases ``G + C^-1 Z`` with independent Gaussian rows in
``Z``; that is ``C^-1 (C G + Z)``, the result of one Gaussian mechanism. The weights are sums of the
released gradients, and in sums much of this noise cancels. ``C`` is lower triangular and banded,
and has the same number along each diagonal.

Source:
    Choquette-Choo et al. 2023, arXiv:2306.08153 (banded matrices, participation);
    Kalinin and Lampert 2024, arXiv:2405.13763 (the banded square root);
    Denisov et al. 2022, arXiv:2202.08312 (later gradients may depend on earlier releases).
"""

from __future__ import annotations

import math

from lightning_secure.errors import ConfigError
from lightning_secure.util.validate import positive_int


def diagonals(bands: int) -> tuple[float, ...]:
    """Return the numbers on the diagonals of ``C``, from the main one down.

    They are those of the square root of the matrix of prefix sums: the coefficients of
    ``(1 - x) ** -0.5``.

    >>> diagonals(4)
    (1.0, 0.5, 0.375, 0.3125)
    """
    positive_int(bands=bands)
    found = [1.0]
    for band in range(1, bands):
        found.append(found[-1] * (2 * band - 1) / (2 * band))
    return tuple(found)


def sensitivity(coefficients: tuple[float, ...], *, steps: int, separation: int) -> float:
    """Return how far one row moves ``C G``, if its gradients have a norm of at most one.

    Args:
        coefficients: Of ``C``, as from :func:`diagonals`.
        steps: Of the run; the size of ``C``.
        separation: Steps from one use of a row to the next, always as many.

    Raises:
        ConfigError: if rows come again while earlier noise is still being taken back.

    Columns of ``C`` that are at least as far apart as it has bands do not overlap. So the squares
    add up, over the steps in which a row takes part, and the row of the first step has the most.

    >>> round(sensitivity((1.0, 0.5), steps=5, separation=2), 4)  # 1.25 + 1.25 + 1
    1.8708
    """
    positive_int(steps=steps, separation=separation)
    if separation < len(coefficients):
        raise ConfigError(
            f"a matrix of {len(coefficients)} bands needs as many steps between two uses of a row, "
            f"and an epoch has {separation}. Choose DPConfig(bands=) of at most {separation}, or a "
            "smaller expected_batch_size. No step was taken."
        )
    squares = [number**2 for number in coefficients]
    return math.sqrt(
        math.fsum(math.fsum(squares[: steps - step]) for step in range(0, steps, separation))
    )
