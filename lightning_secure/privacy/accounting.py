"""Epsilon, by dp_accounting: privacy loss distributions, and Rényi DP beside it.

Neighbouring datasets differ by one row added or removed. Both accountants give upper bounds; that
of the privacy loss distribution is the tighter one and the one that is reported.

Source:
    Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 (PLD).
    Mironov et al. 2019, arXiv:1908.10530 (RDP of the sampled Gaussian).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from scipy.optimize import brentq

from lightning_secure.errors import PrivacyError

__all__ = ["Release", "affordable_steps", "calibrate_noise", "epsilon_pld", "epsilon_rdp"]

#: Width of the discretisation of the privacy loss.
GRID: Final = 1e-4
_COARSE_GRID: Final = 1e-3
_TOLERANCE: Final = 1e-3
_MAX_SECANTS: Final = 20
_MAX_STEPS: Final = 2**40
# Those of dp_accounting without the ones below 2, whose series does not converge for large rates
# and which matter only for an epsilon in the tens.
_ORDERS: Final = [*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512, 1024]


class Release(NamedTuple):
    """So many steps of one sampled Gaussian mechanism.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sample_rate: Probability with which each row is drawn.
        steps: How often.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def epsilon_pld(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by privacy loss distributions.

    Args:
        releases: What was released. Nothing costs nothing.
        delta: Between 0 and 1.

    >>> round(epsilon_pld([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    0.947
    """
    return _epsilon(releases, delta, GRID)


def _epsilon(releases: Sequence[Release], delta: float, grid: float) -> float:
    total: Any = None
    for noise_multiplier, sample_rate, steps in releases:
        if steps == 0:
            continue
        if noise_multiplier == 0:
            return math.inf
        part = _one_step(noise_multiplier, sample_rate, grid).self_compose(steps)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def epsilon_rdp(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by Rényi DP; looser, and much faster.

    >>> round(epsilon_rdp([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=_ORDERS)
    for noise_multiplier, sample_rate, steps in releases:
        if steps and noise_multiplier == 0:
            return math.inf
        if steps:
            gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Sequence[Release] = (),
) -> float:
    """Return the least noise multiplier with which ``steps`` more steps stay within the budget.

    Args:
        target_epsilon: The budget for everything together.
        delta: Between 0 and 1.
        sample_rate: Probability with which each row is drawn.
        steps: Steps to come.
        before: What was released already.

    Returns:
        A noise multiplier whose epsilon is at most ``target_epsilon`` and within 0.1 % of it.

    Raises:
        PrivacyError: What was released already leaves nothing.
    """
    spent = epsilon_pld(before, delta=delta)
    if spent >= target_epsilon:
        raise PrivacyError(
            f"epsilon {spent:.4g} is spent already and target_epsilon is {target_epsilon:.4g}: no "
            "amount of noise lets the run go on. Nothing was trained."
        )

    def excess(log_noise: float, grid: float) -> float:
        release = Release(math.exp(log_noise), sample_rate, steps)
        return math.log(_epsilon([*before, release], delta, grid) / target_epsilon)

    # The coarse grid takes a tenth of the time and finds the neighbourhood; from there secants on
    # the fine one, which is almost straight in logarithms, end on the budget's side of the root.
    low, high = -1.0, 1.0
    while excess(high, _COARSE_GRID) > 0:
        low, high = high, high + 1.0
    while excess(low, _COARSE_GRID) < 0:
        low, high = low - 1.0, low
    first = brentq(excess, low, high, args=(_COARSE_GRID,), xtol=1e-3)
    points = [(x, excess(x, GRID)) for x in (first, first + 0.01)]
    for _ in range(_MAX_SECANTS):
        (x0, y0), (x1, y1) = points[-2:]
        if -_TOLERANCE < y1 <= 0:
            break
        x2 = x1 - (y1 + _TOLERANCE / 2) * (x1 - x0) / (y1 - y0)
        points.append((x2, excess(x2, GRID)))
    # Should the secants have ended on the wrong side, a little more noise until it is enough.
    while all(y > 0 for _, y in points):
        x = points[-1][0] + _TOLERANCE
        points.append((x, excess(x, GRID)))
    return math.exp(min(x for x, y in points if y <= 0))


def affordable_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    before: Sequence[Release] = (),
) -> int:
    """Return how many steps may be taken after ``before`` without exceeding the budget."""

    def fits(steps: int) -> bool:
        release = Release(noise_multiplier, sample_rate, steps)
        return epsilon_pld([*before, release], delta=delta) <= target_epsilon

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if high > _MAX_STEPS:
            return _MAX_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=32)
def _one_step(noise_multiplier: float, sample_rate: float, grid: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    build: Callable[..., Any] = privacy_loss_distribution.from_gaussian_mechanism
    return build(
        standard_deviation=noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=grid,
    )
