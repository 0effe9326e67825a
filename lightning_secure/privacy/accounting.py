"""Epsilon, by dp_accounting: privacy loss distributions, and Rényi DP beside it.

Neighbouring datasets differ by one row added or removed. Both accountants give upper bounds; that
of the privacy loss distribution is the tighter one and the one that is reported. Those of Opacus
can be had by name, for comparison with runs that were accounted for by them.

Source:
    Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 (PLD).
    Mironov et al. 2019, arXiv:1908.10530 (RDP of the sampled Gaussian).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from lightning_secure.errors import ConfigError, PrivacyError

__all__ = [
    "ACCOUNTANTS",
    "BOUNDS",
    "Release",
    "affordable_steps",
    "calibrate_noise",
    "epsilon_by",
    "epsilon_pld",
    "epsilon_rdp",
    "epsilon_truncated",
    "joint_noise",
    "merged",
    "require_accountant",
]

#: Accountants whose epsilon is an upper bound, so that a budget can be kept by them.
BOUNDS: Final = ("pld", "rdp", "opacus-rdp", "opacus-prv")
#: All accountants. Opacus' GDP is an approximation that can lie below the true epsilon.
ACCOUNTANTS: Final = (*BOUNDS, "opacus-gdp")
#: Width of the discretisation of the privacy loss.
GRID: Final = 1e-4
_COARSE_GRID: Final = 1e-3
# Above this epsilon the grid may be coarser, as long as the error stays below this part of it.
_LARGE: Final = 10.0
_GRID_ERROR: Final = 1e-5
_MAX_LOG_NOISE: Final = 25.0
_MIN_LOG_NOISE: Final = -4.0
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


def require_accountant(name: str, *, bound: bool) -> None:
    """Refuse accountants that do not exist or, for a budget, that are no upper bound.

    Args:
        name: One of :data:`ACCOUNTANTS`.
        bound: Whether a budget is to be kept by it.

    Raises:
        ConfigError: It is not one of them, or cannot bound anything.

    >>> require_accountant("opacus-gdp", bound=True)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: accountant 'opacus-gdp' approximates epsilon and can ...
    """
    if name not in ACCOUNTANTS:
        raise ConfigError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, not {name!r}.")
    if bound and name not in BOUNDS:
        raise ConfigError(
            f"accountant {name!r} approximates epsilon and can lie below the true one, so no "
            f"budget can be kept by it; use one of {', '.join(BOUNDS)}. It can be shown beside "
            "them."
        )


def epsilon_by(accountant: str, releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by the accountant of that name.

    Raises:
        ConfigError: There is no such accountant.
        PrivacyError: It cannot account for these releases.

    >>> round(epsilon_by("opacus-rdp", [Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    require_accountant(accountant, bound=False)
    if accountant == "pld":
        return epsilon_pld(releases, delta=delta)
    if accountant == "rdp":
        return epsilon_rdp(releases, delta=delta)
    from lightning_secure.privacy.opacus_accounting import epsilon_by_opacus

    return epsilon_by_opacus(accountant, releases, delta=delta)


def epsilon_pld(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by privacy loss distributions.

    Args:
        releases: What was released. Nothing costs nothing.
        delta: Between 0 and 1.

    >>> round(epsilon_pld([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    0.947
    """
    return _epsilon(releases, delta, _grid(releases, delta))


def _epsilon(releases: Sequence[Release], delta: float, grid: float) -> float:
    total: Any = None
    for (noise_multiplier, sample_rate), steps in merged(releases).items():
        if noise_multiplier == 0:
            return math.inf
        part = _one_step(noise_multiplier, sample_rate, grid).self_compose(steps)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(delta))


def _grid(releases: Sequence[Release], delta: float) -> float:
    """Return how finely the privacy loss must be cut up.

    An epsilon in the thousands on the grid of one in single figures takes a minute. Cutting up the
    loss of one step adds at most about ``grid**2 / 8`` to its mean (Hoeffding's lemma), so that is
    kept small beside epsilon; the result remains an upper bound.
    """
    spread = 0.0  # of the privacy loss, by the central limit theorem
    for (noise, rate), steps in merged(releases).items():
        if noise == 0:
            return GRID
        spread += steps * rate**2 * math.expm1(min(noise**-2, 100.0))
    if spread < 4.0:  # cannot be a large epsilon, and saves the look at it
        return GRID
    rough = epsilon_rdp(releases, delta=delta) / 4
    if rough < _LARGE:
        return GRID
    steps = sum(release.steps for release in releases)
    wide = math.sqrt(8 * _GRID_ERROR * rough / steps) / GRID
    # Powers of two, so that the next number of steps finds the same grid's step computed already.
    return float(GRID * 2 ** max(0, math.floor(math.log2(wide))))


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
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=dataset_size,
        sampling_probability=release.sample_rate,
        truncated_batch_size=max_batch_size,
        noise_multiplier=release.noise_multiplier,
        value_discretization_interval=GRID,
    )
    return float(step.self_compose(release.steps).get_epsilon_for_delta(delta))


def epsilon_rdp(releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, by Rényi DP; looser, and much faster.

    >>> round(epsilon_rdp([Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=_ORDERS)
    for (noise_multiplier, sample_rate), steps in merged(releases).items():
        if noise_multiplier == 0:
            return math.inf
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
        A noise multiplier whose epsilon is at most ``target_epsilon`` and within 0.1 % of it.

    Raises:
        ConfigError: ``accountant`` is not one of them.
        PrivacyError: What was released already leaves nothing, or the accountant cannot show so
            small an epsilon at so small a delta, or shows it without any noise.
    """
    from scipy.optimize import brentq  # takes longer than everything else that is imported here

    require_accountant(accountant, bound=True)
    spent = epsilon_by(accountant, before, delta=delta)
    if spent >= target_epsilon:
        raise PrivacyError(
            f"epsilon {spent:.4g} is spent already and target_epsilon is {target_epsilon:.4g}: no "
            "amount of noise lets the run go on. Nothing was trained."
        )

    def excess(log_noise: float, *, rough: bool = False) -> float:
        releases = [*before, Release(math.exp(log_noise), sample_rate, steps)]
        if rough and accountant == "pld":
            epsilon = _epsilon(releases, delta, max(_COARSE_GRID, _grid(releases, delta)))
        else:
            epsilon = epsilon_by(accountant, releases, delta=delta)
        # A delta that covers everything leaves an epsilon of nothing, whose logarithm is no number.
        return math.log(max(epsilon, 1e-12) / target_epsilon)

    def roughly(log_noise: float) -> float:
        return excess(log_noise, rough=True)

    # The coarse grid takes a tenth of the time and finds the neighbourhood; from there secants on
    # the fine one, which is almost straight in logarithms, end on the budget's side of the root.
    low, high = -1.0, 1.0
    while roughly(high) > 0:
        low, high = high, high + 1.0
        if high > _MAX_LOG_NOISE:
            raise PrivacyError(
                f"no amount of noise has been found that keeps {steps} steps within epsilon "
                f"{target_epsilon:g} at delta {delta:g} by {accountant}: at so small a delta or "
                "budget it bounds nothing. Choose a larger one. Nothing was trained."
            )
    while roughly(low) < 0:
        low, high = low - 1.0, low
        if low < _MIN_LOG_NOISE:
            raise PrivacyError(
                f"{steps} steps stay within epsilon {target_epsilon:g} at delta {delta:g} almost "
                "without noise: so large a delta or budget promises nothing. Choose a smaller one, "
                "or give the noise. Nothing was trained."
            )
    first = brentq(roughly, low, high, xtol=1e-3)
    points = [(x, excess(x)) for x in (first, first + 0.01)]
    for _ in range(_MAX_SECANTS):
        (x0, y0), (x1, y1) = points[-2:]
        if -_TOLERANCE < y1 <= 0 or y1 == y0:
            break
        x2 = x1 - (y1 + _TOLERANCE / 2) * (x1 - x0) / (y1 - y0)
        points.append((x2, excess(x2)))
    # Should the secants have ended on the wrong side, a little more noise until it is enough.
    while all(y > 0 for _, y in points):
        x = points[-1][0] + _TOLERANCE
        points.append((x, excess(x)))
    return math.exp(min(x for x, y in points if y <= 0))


def affordable_steps(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    sample_rate: float,
    before: Sequence[Release] = (),
    accountant: str = "pld",
) -> int:
    """Return how many steps may be taken after ``before`` without exceeding the budget.

    Args:
        target_epsilon: The budget for everything together.
        delta: Between 0 and 1.
        noise_multiplier: Of the steps to come.
        sample_rate: Of the steps to come.
        before: What was released already.
        accountant: One of :data:`BOUNDS`.
    """
    require_accountant(accountant, bound=True)

    def spent(steps: int) -> float:
        releases = [*before, Release(noise_multiplier, sample_rate, steps)]
        return epsilon_by(accountant, releases, delta=delta)

    low, at_low = 1, spent(1)
    if at_low > target_epsilon:
        return 0
    least = 2.0 if before else 1.05
    while True:
        # An epsilon grows with the root of the steps or faster, so this rarely takes many rounds.
        factor = min(max(1.02 * (target_epsilon / max(at_low, 1e-9)) ** 1.5, least), 64.0)
        high = low + max(1, int(low * (factor - 1)))
        if high > _MAX_STEPS:
            return _MAX_STEPS
        at_high = spent(high)
        if at_high > target_epsilon:
            break
        low, at_low = high, at_high
    # Between the two the curve is almost straight: look where the line crosses the budget, and a
    # little to the other side; halve what is left if that was of no use.
    while high - low > 1:
        gap, slope = high - low, (at_high - at_low) / (high - low)
        guess = low + int((target_epsilon - at_low) / slope) if 0 < slope < math.inf else low
        aside = max(1, gap // 50)
        for probe in (guess, None, (low + high) // 2):
            if probe is None:
                probe = low + aside if low == guess else high - aside
            elif probe != guess and high - low <= gap // 2:
                break
            if not low < probe < high:
                continue
            epsilon = spent(probe)
            if epsilon <= target_epsilon:
                low, at_low = probe, epsilon
            else:
                high, at_high = probe, epsilon
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
