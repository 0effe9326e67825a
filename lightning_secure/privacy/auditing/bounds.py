"""Lower bounds on epsilon from the rate at which an attack guesses right.

Source:
    Jagielski et al. 2020, arXiv:2006.07709 (Clopper-Pearson); Nasr et al. 2023, arXiv:2302.07956
    (bounds by the family of mechanisms); Steinke et al. 2023, arXiv:2305.08846 (one run).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_CANDIDATES: Final = 400
_MAX_EPSILON: Final = 1e9


def rates(hits: Any, members: int, alarms: Any, others: int, *, alpha: float) -> tuple[Any, Any]:
    """Return a lower bound on the true-positive rate and an upper one on the false-positive rate.

    Args:
        hits: Members that were guessed to be members; numbers or arrays.
        members: How many members there are.
        alarms: Others that were guessed to be members.
        others: How many others there are.
        alpha: Probability with which either bound may fail; each may with half of it.

    Source:
        Clopper and Pearson 1934. Trials with different rates, as of several canaries, are covered
        as well: a sum of such trials is less spread than a binomial one (Hoeffding 1956).

    >>> low, high = rates(10, 10, 0, 10, alpha=0.05)
    >>> round(float(low), 4), round(float(high), 4)
    (0.6915, 0.3085)
    """
    from scipy.stats import beta

    hits, alarms = np.asarray(hits, float), np.asarray(alarms, float)
    low = beta.ppf(alpha / 2, hits, members - hits + 1)
    high = beta.ppf(1 - alpha / 2, alarms + 1, others - alarms)
    return np.where(hits > 0, low, 0.0), np.where(alarms < others, high, 1.0)


def epsilon_of_rates(tpr: Any, fpr: Any, *, delta: float) -> Any:
    """Return the epsilon that guesses at these rates show, of any mechanism.

    Args:
        tpr: Lower bound on the true-positive rate.
        fpr: Upper bound on the false-positive rate.
        delta: Between 0 and 1.

    The guess may as well be turned around: the better of both is returned.

    >>> round(float(epsilon_of_rates(0.9, 0.1, delta=0.0)), 4)  # the logarithm of 9
    2.1972
    """
    tpr, fpr = np.asarray(tpr, float), np.asarray(fpr, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = [
            np.log(np.maximum(a - delta, 0.0) / b) for a, b in ((tpr, fpr), (1 - fpr, 1 - tpr))
        ]
    return np.maximum(np.nan_to_num(np.maximum(*shown), nan=0.0, neginf=0.0), 0.0)


def mu_of_rates(tpr: Any, fpr: Any) -> Any:
    """Return the mu that guesses at these rates show, of a mechanism that is mu-Gaussian DP.

    Source:
        Dong et al. 2019, arXiv:1905.02383, equation 6.

    >>> round(float(mu_of_rates(0.9, 0.1)), 4)
    2.5631
    """
    from scipy.special import ndtri

    with np.errstate(invalid="ignore"):
        return np.maximum(np.nan_to_num(ndtri(tpr) - ndtri(fpr), nan=0.0, neginf=0.0), 0.0)


def epsilon_gaussian(mu: float, *, delta: float) -> float:
    """Return the epsilon of a mechanism that is mu-Gaussian DP: noise of 1/mu sensitivities.

    Source:
        Balle and Wang 2018, arXiv:1805.06530, theorem 8.

    >>> round(epsilon_gaussian(1.0, delta=1e-5), 4)
    4.3772
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(epsilon: float) -> float:
        first = log_ndtr(mu / 2 - epsilon / mu)
        second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        # In logarithms, for the factors over- and underflow where mu is large.
        inner = -math.expm1(min(second - first, 0.0))
        return float(first + math.log(max(inner, 1e-300)) - math.log(delta))

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        if high > _MAX_EPSILON:
            return high
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-10))


def best_threshold(members: Floats, others: Floats, *, by: Any) -> float:
    """Return the threshold above which scores tell members best.

    Args:
        members: Scores; higher ones look more like those of members.
        others: Scores.
        by: From hits and alarms, arrays of counts, to what is to be largest.

    A bound must then be taken on other scores than these.
    """
    pooled = np.unique(np.concatenate([members, others]))
    # Dense at both ends, where few scores decide.
    ends = np.unique(np.geomspace(1, len(pooled), _CANDIDATES).astype(int)) - 1
    places = np.unique(
        np.concatenate(
            [ends, len(pooled) - 1 - ends, np.linspace(0, len(pooled) - 1, _CANDIDATES).astype(int)]
        )
    )
    thresholds = pooled[places]
    value = by(*(above(scores, thresholds) for scores in (members, others)))
    return float(thresholds[int(np.argmax(value))])


def above(scores: Floats, thresholds: Any) -> Any:
    """Return how many scores lie at or above each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def p_value_one_run(
    *, canaries: int, guesses: int, right: int, epsilon: float, delta: float
) -> float:
    """Return how probable so many right guesses about one run are, if it is private.

    Args:
        canaries: Rows that were included by a fair coin each.
        guesses: Of them, how many were guessed about.
        right: Of them, how many guesses were right.
        epsilon: Of the run, as supposed.
        delta: Of the run, as supposed.

    Source:
        Steinke et al. 2023, arXiv:2305.08846, theorem 5.2, as computed in their appendix D.

    >>> settings = {"canaries": 1000, "guesses": 100, "right": 100, "delta": 1e-5}
    >>> p_value_one_run(epsilon=3.0, **settings) < 0.05 < p_value_one_run(epsilon=4.0, **settings)
    True
    """
    from scipy.special import expit
    from scipy.stats import binom

    tail = float(binom.sf(right - 1, guesses, expit(epsilon)))
    # The largest of P[right > X >= right - i] / i over i.
    steps = np.arange(1, right + 1)
    below = np.cumsum(binom.pmf(right - steps, guesses, expit(epsilon)))
    worst = float(np.max(below / steps, initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_one_run(
    *, canaries: int, guesses: int, right: int, delta: float, alpha: float
) -> float:
    """Return the largest epsilon that so many right guesses refute.

    Args:
        canaries: As for :func:`p_value_one_run`.
        guesses: As for :func:`p_value_one_run`.
        right: As for :func:`p_value_one_run`.
        delta: As for :func:`p_value_one_run`.
        alpha: Probability with which the bound may fail.

    >>> found = epsilon_one_run(canaries=1000, guesses=100, right=100, delta=1e-5, alpha=0.05)
    >>> round(found, 2)
    3.47
    """

    def refuted(epsilon: float) -> bool:
        p = p_value_one_run(
            canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, delta=delta
        )
        return p < alpha

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
