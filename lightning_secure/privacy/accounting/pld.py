"""Epsilon by privacy loss distributions, and by Rényi DP beside it.

Neighbouring datasets differ by one row added or removed. Both accountants give upper bounds; that
of the privacy loss distribution is the tighter one and the one that is reported. ``loss_transform``
composes it. Rényi DP is dp_accounting's. The accountants of Opacus can be had by name, for
comparison with runs that were accounted for by them.

Source:
    Koskela et al. 2020, arXiv:1906.03049 (PLD).
    Mironov et al. 2019, arXiv:1908.10530 (RDP of the sampled Gaussian).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Final

from lightning_secure.errors import ConfigError, PrivacyError
from lightning_secure.privacy.accounting.loss_transform import (
    epsilon_of,
    epsilon_of_truncated,
    gaussian_shift,
)
from lightning_secure.privacy.accounting.mechanism import Release, merged

#: Accountants whose epsilon is an upper bound, so that a budget can be kept by them.
BOUNDS: Final = ("pld", "rdp", "opacus-rdp", "opacus-prv")
#: All accountants. Opacus' GDP is an approximation that can lie below the true epsilon.
ACCOUNTANTS: Final = (*BOUNDS, "opacus-gdp")
_MAX_LOG_NOISE: Final = 25.0
_MIN_LOG_NOISE: Final = -4.0
_TOLERANCE: Final = 1e-3
_MAX_SECANTS: Final = 60
_CLOSE: Final = 1e-6  # logarithms of two noises that need not be told apart
# Beyond these, squares and exponentials leave the range of floating point.
_LEAST_NOISE: Final = 1e-50
_MOST_NOISE: Final = 1e50
_LEAST_RATE: Final = 1e-50
_LEAST_DELTA: Final = 1e-300
_PATIENCE: Final = 1.0
_MAX_STEPS: Final = 2**40
# Those of dp_accounting without the ones below 2, whose series does not converge for large rates
# and which matter only for an epsilon in the tens.
_ORDERS: Final = [*(2 + tenth / 10 for tenth in range(90)), *range(11, 64), 128, 256, 512, 1024]


log = logging.getLogger(__name__)


def require_accountant(name: str, *, bound: bool) -> None:
    """Refuse accountants that do not exist or, for a budget, that are no upper bound.

    Args:
        name: An accountant of :data:`ACCOUNTANTS`.
        bound: Whether a budget is to be kept by it.

    Raises:
        ConfigError: if the accountant does not exist, or is no upper bound where one is needed.

    >>> require_accountant("opacus-gdp", bound=True)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: accountant 'opacus-gdp' approximates epsilon and can ...
    """
    if name not in ACCOUNTANTS:
        raise ConfigError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, not {name!r}.")
    if bound and name not in BOUNDS:
        raise ConfigError(
            f"accountant {name!r} approximates epsilon and can lie below the true one, so no "
            f"budget can be kept by it; use one of {', '.join(BOUNDS)}, and this accountant for "
            "display only."
        )


def epsilon_by(accountant: str, releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by the accountant of that name.

    Raises:
        ConfigError: if there is no such accountant.
        PrivacyError: if the accountant cannot account for these releases.

    >>> round(epsilon_by("opacus-rdp", [Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    require_accountant(accountant, bound=False)
    if accountant == "pld":
        return epsilon_pld(releases, delta=delta)
    if accountant == "rdp":
        return epsilon_rdp(releases, delta=delta)
    from lightning_secure.privacy.accounting.opacus import epsilon_by_opacus

    with announced(f"accounting by {accountant}"):
        found = epsilon_by_opacus(accountant, releases, delta=delta)
    # What bounds epsilon cannot be below the tight one, but for its rounding.
    return max(found, epsilon_pld(releases, delta=delta)) if accountant in BOUNDS else found


def epsilon_pld(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by privacy loss distributions.

    Args:
        releases: The releases; without any, epsilon is zero.
        delta: Between 0 and 1. Below 1e-300, or with noise below 1e-50, epsilon is infinite.

    Guarantees:
        The exact epsilon is not larger. The reported epsilon exceeds it by at most 0.02 % in the
        reference values, and by some percent, in extremes by half, in two or few steps of a row
        that is hardly ever drawn.

    >>> round(epsilon_pld([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    0.9469
    """
    totals = merged(releases)
    if not totals or delta >= 1:
        return 0.0
    if delta < _LEAST_DELTA or any(noise < _LEAST_NOISE for noise, _ in totals):
        return math.inf
    calculable: dict[tuple[float, float], int] = {}
    for (noise, rate), steps in totals.items():
        # More noise and a smaller rate cost less.
        mechanism = (min(noise, _MOST_NOISE), max(rate, _LEAST_RATE))
        calculable[mechanism] = calculable.get(mechanism, 0) + steps
    return _epsilon(tuple(sorted(calculable.items())), delta)


@lru_cache(maxsize=256)
def _epsilon(totals: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    return epsilon_of(dict(totals), delta)


def epsilon_truncated(
    release: Release, *, delta: float, dataset_size: int, max_batch_size: int
) -> float:
    """Return the epsilon of steps that drop what a draw has above ``max_batch_size`` rows.

    Nothing here trains that way: a large draw is split into chunks instead. This is for those who
    do, because dropping is not free: a row can push another one out.

    Args:
        release: The steps, all of one mechanism.
        delta: Between 0 and 1.
        dataset_size: Number of rows that are drawn from.
        max_batch_size: Most rows of a step.

    >>> release = Release(1.0, 0.01, 1000)
    >>> many = epsilon_truncated(release, delta=1e-5, dataset_size=50_000, max_batch_size=700)
    >>> round(many, 3)
    1.828
    """
    return epsilon_of_truncated(
        release.noise_multiplier,
        release.sample_rate,
        release.steps,
        dataset_size=dataset_size,
        max_batch_size=max_batch_size,
        delta=delta,
    )


def epsilon_rdp(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by Rényi DP; looser.

    >>> round(epsilon_rdp([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    # A moment that rounds below zero makes dp_accounting report an epsilon of zero.
    return max(_by_moments(releases, delta), epsilon_pld(releases, delta=delta))


def _by_moments(releases: Sequence[Release], delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=_ORDERS)
    for (noise_multiplier, sample_rate), steps in merged(releases).items():
        if noise_multiplier == 0:
            return math.inf
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(sample_rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Log what is going on, if it takes longer than a second."""
    timer = threading.Timer(_PATIENCE, log.warning, ["%s takes more than a second", what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def calibrate_noise(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Sequence[Release] = (),
    accountant: str = "pld",
) -> float:
    """Return the least noise multiplier with which ``steps`` more steps stay within the budget.

    Args:
        target_epsilon: The budget for everything together.
        delta: Between 0 and 1.
        sample_rate: Probability with which each row is drawn.
        steps: Steps to come.
        before: What was released already.
        accountant: One of :data:`BOUNDS`.

    Returns:
        A noise multiplier whose epsilon is at most ``target_epsilon``. Its epsilon is within 0.1 %
        of the target, or jumps above it at a noise multiplier that is smaller by a millionth.

    Raises:
        ConfigError: if ``accountant`` is unknown.
        PrivacyError: if earlier releases have used up the budget, or if the accountant cannot show
            so small an epsilon at so small a delta, or shows it without any noise.

    >>> round(calibrate_noise(target_epsilon=1.0, delta=1e-5, sample_rate=0.01, steps=1000), 1)
    1.4
    """
    require_accountant(accountant, bound=True)
    with announced(f"calibrating the noise of {steps} steps by {accountant}"):
        return _calibrated(target_epsilon, delta, sample_rate, steps, before, accountant)


def _calibrated(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    before: Sequence[Release],
    accountant: str,
) -> float:
    spent = epsilon_by(accountant, before, delta=delta)
    if spent >= target_epsilon:
        raise PrivacyError(
            f"epsilon {spent:.4g} is spent already and target_epsilon is {target_epsilon:.4g}: no "
            "amount of noise lets the run go on. Nothing was trained."
        )

    def excess(log_noise: float) -> float:
        releases = [*before, Release(math.exp(log_noise), sample_rate, steps)]
        epsilon = epsilon_by(accountant, releases, delta=delta)
        # A delta that covers everything leaves an epsilon of nothing, whose logarithm is no number.
        return math.log(max(epsilon, 1e-12) / target_epsilon)

    # From a Gaussian of the same variance; then outwards until the root is enclosed.
    variance = gaussian_shift(target_epsilon, delta) ** 2
    start = -math.log(math.log1p(variance / (steps * sample_rate**2))) / 2
    start = min(max(start, _MIN_LOG_NOISE + 1), _MAX_LOG_NOISE - 1)
    width, low, high = 0.1, start, start + 0.1
    at_low, at_high = excess(low), excess(high)
    while at_high > 0:
        if high > _MAX_LOG_NOISE:
            raise PrivacyError(
                f"no amount of noise has been found that keeps {steps} steps within epsilon "
                f"{target_epsilon:g} at delta {delta:g} by {accountant}: at so small a delta or "
                "budget the accountant bounds nothing. Choose a larger one. Nothing was trained."
            )
        width *= 2
        low, at_low, high = high, at_high, high + width
        at_high = excess(high)
    while at_low < 0:
        if low < _MIN_LOG_NOISE:
            raise PrivacyError(
                f"{steps} steps stay within epsilon {target_epsilon:g} at delta {delta:g} almost "
                "without noise: so large a delta or budget promises nothing. Choose a smaller one, "
                "or give the noise. Nothing was trained."
            )
        width *= 2
        low, high, at_high = low - width, low, at_low
        at_low = excess(low)
    points = [(low, at_low), (high, at_high)]
    for _ in range(_MAX_SECANTS):
        (x0, y0), (x1, y1) = points[-2:]
        if -_TOLERANCE < y1 <= 0:
            break
        within = [x for x, y in points if y > 0], [x for x, y in points if y <= 0]
        bottom, top = max(within[0]), min(within[1])
        if top - bottom < _CLOSE:  # epsilon jumps between them
            break
        x2 = x1 - (y1 + _TOLERANCE / 2) * (x1 - x0) / (y1 - y0) if y1 != y0 else bottom
        if not bottom < x2 < top:
            x2 = (bottom + top) / 2
        points.append((x2, excess(x2)))
    return math.exp(min(x for x, y in points if y <= 0))


def affordable_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    before: Sequence[Release] = (),
    accountant: str = "pld",
    at_most: int = _MAX_STEPS,
) -> int:
    """Return how many steps may be taken after ``before`` without exceeding the budget.

    Args:
        target_epsilon: The budget for everything together.
        delta: Between 0 and 1.
        noise_multiplier: Of the steps to come.
        sample_rate: Of the steps to come.
        before: What was released already.
        accountant: One of :data:`BOUNDS`.
        at_most: Steps of interest. More are not looked for.

    Returns:
        The last number that fits, up to ``at_most``; of more than 10,000, at most 0.01 % fewer.

    >>> settings = {"noise_multiplier": 1.0, "sample_rate": 0.01}
    >>> affordable_steps(target_epsilon=2.0, delta=1e-5, **settings)
    1202
    """
    require_accountant(accountant, bound=True)

    def spent(steps: int) -> float:
        releases = [*before, Release(noise_multiplier, sample_rate, steps)]
        return epsilon_by(accountant, releases, delta=delta)

    with announced(f"counting the steps that epsilon {target_epsilon:g} affords by {accountant}"):
        return _last_that_fits(spent, target_epsilon, at_most)


def _last_that_fits(spent: Callable[[int], float], target: float, at_most: int) -> int:
    def above(steps: int) -> float:
        # Squares are almost in proportion to the steps while epsilon is small.
        return spent(steps) ** 2 - target**2

    low, high, at_low, at_high = 0, at_most + 1, above(0), math.inf
    if at_low > 0:
        return 0
    probe = 1 if at_most == _MAX_STEPS else at_most
    while high - low > max(1, low // 10_000):
        probe = min(max(probe, low + 1), high - 1)
        value = above(probe)
        if value > 0:
            high, at_high = probe, value
        else:
            low, at_low = probe, value
        if high > at_most:
            probe = 64 * low
            continue
        # A little beyond where the line crosses, on the side of the farther end, so that it moves.
        crossing = low + (high - low) * at_low / (at_low - at_high)
        aside = max(1, (high - low) // 100)
        probe = round(crossing) + (aside if high - crossing > crossing - low else -aside)
    return low
