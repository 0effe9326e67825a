"""Delta of composed sampled Gaussian releases, by inverting the transform of the privacy loss.

For a pair of distributions ``P, Q`` with privacy loss ``L = log(dP/dQ)``, ``M(z) = E_P[exp(z L)]``,
the least delta is ``delta(e) = E_P[(1 - exp(e - L))+]``, and for every ``tau > 0``::

    delta(e) = 1/(2 pi i)  integral over Re z = tau of  M(z) exp(-z e) / (z (z + 1)) dz

Transforms of composed releases multiply, so neither time nor memory depends on the steps. Each
approximation errs upwards, or its error is added:

* **Dots.** A step's loss is moved to some thousand values. Between two of them, the mass goes to
  both, with as much in P and in Q as before, which dominates the step (Doroshenko et al. 2022,
  section 4). The values are as close as the noise is wide, and not on a grid of losses, so the
  growth of epsilon, ``_WIDTH**2 / 6`` of it, does not depend on rate, noise or steps.
* **Sum for integral.** With nodes ``2 pi / p`` apart, the sum is ``delta(e)`` plus the terms
  ``delta(e + n p) exp(tau n p)``, ``n`` not 0 (Poisson summation). All are positive.
* **End of the sum.** One more, very small Gaussian release is composed. It can only add to delta,
  and its transform bounds what lies beyond the last node.
* **Rounding.** Standard bounds of each operation, of sums of so many terms and of Fourier
  transforms (Higham 2002, sections 3.1, 4.2 and 24.1), with doubled constants. They are relative to
  the distribution tilted by ``exp(tau L)``, and so to delta and not to one.

dp_accounting composes by a Fourier transform without a tilt, whose rounding, some 1e-16 for each
step, is not added. Its grid of losses is wider than the losses where rows are drawn rarely.

Source:
    Alghamdi et al. 2022, arXiv:2208.09595 (the line through the saddle point).
    Zhu et al. 2022, arXiv:2106.08567 (characteristic functions).
    Doroshenko et al. 2022, arXiv:2207.04380 (dots that dominate).
    Canonne et al. 2020, arXiv:2004.00010, proposition 12 (``renyi``).
    Higham 2002, Accuracy and Stability of Numerical Algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_U: Final = 2.0**-52
#: Standard deviations of the noise between two dots: epsilon grows by a sixth of the square.
_WIDTH: Final = 0.005
#: The same where only moments are wanted, to find a line. Fewer dots dominate as well.
_COARSE: Final = 0.05
#: Relative error of the mass between two.
_MASS: Final = 16 * _U / _WIDTH
#: Share of delta for what lies beyond the dots.
_BEYOND: Final = 1e-9
_SMALLEST: Final = 1e-290
_DIGITS: Final = 48.0  # shares below exp(-_DIGITS) of the largest are left out
_CHUNK: Final = 8192
#: Share of epsilon that the composed small release may cost, about.
_SMOOTHING: Final = 4e-5
#: How many times larger than that it may be: at most 1e-4 of epsilon.
_TOO_LARGE: Final = 2.5
_DECAY: Final = 6.5  # standard deviations of its transform at which the sum ends
_ALIASES: Final = 18.0  # other terms of the Poisson sum are below exp(-_ALIASES) of delta
_MAX_TERMS: Final = 2**17
#: Points of a lattice, for steps and variance of one; and what one costs, in turned nodes.
_LATTICE: Final = 1.5
_PER_POINT: Final = 40
_MAX_POINTS: Final = 2**20
_MAX_PASSES: Final = 16
_NEGLIGIBLE: Final = 60.0


class Part(NamedTuple):
    """A Gaussian pair, one of those that a step is a mixture of, drawn with probability ``share``.

    Attributes:
        share: Probability, which is known to the attacker.
        shift: What one row moves, in standard deviations of the noise.
        rate: Probability that it moves.
        relation: ``remove`` or ``add``: the row is in P or in Q only. ``replace``: it moves the
            other way in Q.
    """

    share: float
    shift: float
    rate: float
    relation: str


Step = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class _Tilted:
    """The loss of one step under the measure ``exp(tau L) dP / M(tau)``, as nodes and shares."""

    log_mgf: float  # upper bound
    losses: Array
    shares: Array
    wrong_shares: float  # error of a sum over bounded functions of the losses
    wrong_losses: float  # the same, times t, of functions that t L is small in
    wrong: float  # error whatever the function is


def _log_ratio(x: Array, part: Part) -> tuple[Array, Array]:
    """Return log(dP/dQ) of ``remove`` at ``x``, and a bound on its rounding."""
    y = part.shift * x - part.shift**2 / 2
    near = np.log1p(part.rate * np.expm1(np.minimum(y, 500.0)))
    if part.rate < 1:
        # Next to -1, the argument's rounding would be magnified by exp(-ratio).
        both = np.logaddexp(math.log1p(-part.rate), math.log(part.rate) + y)
        near = np.where(near < -0.5, both, near)
    ratio = np.where(y < 500.0, near, y + math.log(part.rate))
    slope = 1.0 if part.rate == 1 else -np.expm1(np.minimum(math.log1p(-part.rate) - ratio, 0.0))
    return ratio, _U * (4 * np.abs(ratio) + slope * (np.abs(part.shift * x) + part.shift**2))


def _normal(edges: Array) -> Array:
    """Return the normal distribution's mass between neighbours, by the tail that is nearer."""
    from scipy.special import ndtr

    below, above = ndtr(edges), ndtr(-edges)
    return np.asarray(np.where(edges[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1]))


@lru_cache(maxsize=256)
def _dots(part: Part, reach: int, width: float) -> tuple[Array, Array, Array]:
    """Return losses that dominate the part's, their masses in P, and bounds of their rounding.

    What lies between two points goes to both their losses, with as much mass in P and in Q as
    before. What lies beyond ``reach`` standard deviations on the side of the smaller losses goes to
    the smallest of these, and on the other side it is left out.
    """
    near = np.arange(-reach, reach + width, width)
    if part.shift < 2 * reach:
        x = np.arange(-reach, part.shift + reach + width, width)
    else:
        x = np.concatenate([near, part.shift + near])
    ratio, off = _log_ratio(x, part)
    here, moved = _normal(x), _normal(x - part.shift)
    mixed = (1 - part.rate) * here + part.rate * moved
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Where the mean of exp(shift x) lies between the ends', as a share: about a half.
        growth = np.expm1(np.diff(x) * part.shift)
        between = (moved / here * np.exp(part.shift**2 / 2 - part.shift * x[:-1]) - 1) / growth
        doubt = 4 * _MASS / growth
        if part.relation == "add":
            loss, mass, up = -ratio[::-1], here[::-1], (1 - between + doubt)[::-1]
            off = off[::-1]
        elif part.relation == "remove":
            loss, mass = ratio, mixed
            up = (between + doubt) * np.exp(ratio[1:]) * here / mixed
        else:
            other, more = _log_ratio(-x, part)
            loss, off, mass = ratio - other, off + more, mixed
            lower = (1 - part.rate) * here + part.rate * _normal(x + part.shift)
            apart = -np.expm1(-np.diff(loss))
            up = (1 - np.exp(loss[:-1]) * lower / mixed + 4 * _MASS) / apart
    # What cannot be told, next to where numbers end, goes to the larger loss.
    told = np.minimum(here, moved) > _SMALLEST
    if part.relation == "add":
        told = told[::-1]
    up = np.where(told, np.nan_to_num(up, nan=1.0), 1.0).clip(0, 1)
    masses = np.append(mass * (1 - up), 0.0)
    masses[1:] += mass * up
    masses[0] += math.erfc(reach / math.sqrt(2)) / 2
    return loss, masses, off


def _tilted(step: Step, tau: float, reach: int, *, width: float = _WIDTH) -> _Tilted:
    """Return the step's loss under the tilt."""
    parts = [_dots(part, reach, width) for part in step]
    loss, off = (np.concatenate([p[i] for p in parts]) for i in (0, 2))
    mass = np.concatenate([part.share * p[1] for part, p in zip(step, parts, strict=True)])
    drawn = ~(mass <= 0)  # a mass that is not a number stays, and makes the bound infinite
    loss, off, plain = loss[drawn], off[drawn], mass[drawn]
    base = np.log(plain)
    wrong = _MASS + _U * (np.abs(base) + len(plain) + 16)
    log_tilted = base + tau * loss
    wrong = wrong + tau * off + _U * tau * np.abs(loss)
    top = float(log_tilted.max())
    if top < 500:
        heavy = np.exp(log_tilted)
        small = np.abs(tau * loss) < 1
        # Relative to what is summed, and not to one: many steps lose little each.
        gain = np.where(small, plain * np.expm1(np.where(small, tau * loss, 0.0)), heavy - plain)
        doubt = np.where(
            small, np.abs(gain) * wrong + 3 * tau * plain * off, (heavy + plain) * wrong
        )
        log_mgf = math.log1p(float(gain.sum()))
        error = float(doubt.sum()) * math.exp(-log_mgf)
    else:
        log_mgf = top + math.log(float(np.exp(log_tilted - top).sum()))
        error = float((np.exp(log_tilted - log_mgf) * wrong).sum())
    log_mgf += 4 * _U * abs(log_mgf)
    keep = log_tilted > top - _DIGITS
    loss, off, wrong = loss[keep], off[keep], wrong[keep]
    shares = np.exp(log_tilted[keep] - log_mgf)
    shares /= shares.sum()
    return _Tilted(
        log_mgf=log_mgf + error,
        losses=loss,
        shares=shares,
        wrong_shares=4 * float(shares @ wrong),
        wrong_losses=2 * float(shares @ (wrong * np.abs(loss) + off + 4 * _U * np.abs(loss))),
        wrong=2 * len(log_tilted) * math.exp(-_DIGITS),
    )


def _transform(tilted: _Tilted, spacing: float, count: int) -> Array:
    """Return ``E[exp(i t L)] - 1`` for ``t = spacing * (1, ..., count)``."""
    few = math.isqrt(count) + 1
    result = np.zeros((few, few), complex)
    for first in range(0, len(tilted.losses), _CHUNK):
        losses = tilted.losses[first : first + _CHUNK]
        shares = tilted.shares[first : first + _CHUNK]
        # exp(i (s + t) L) - 1 from both parts' own: two small tables instead of a large one.
        fine = _turned(spacing * np.arange(1, few + 1), losses)
        coarse = _turned(spacing * few * np.arange(few), losses) * shares
        result += coarse @ fine.T + coarse.sum(axis=1)[:, None] + (fine @ shares)[None, :]
    return result.ravel()[:count]


def _on_lattice(
    tilted: _Tilted, tau: float, spacing: float, count: int, size: int
) -> tuple[float, Array, float]:
    """Return :func:`_transform` by one Fourier transform, for losses at multiples of a width.

    Each loss goes to its two neighbours, as to dots. So the other two numbers are what
    ``log M(tau)`` grows by, and how far off each value may be: the error of a transform of ``size``
    in the 2-norm (Higham 2002, theorem 24.2).
    """
    width = 2 * math.pi / (spacing * size)
    below = np.floor(tilted.losses / width)
    rest = np.clip(tilted.losses - below * width, 0.0, width)
    share = np.expm1(-rest) / math.expm1(-width)
    low, high = (1 - share) * np.expm1(-tau * rest), share * np.expm1(tau * (width - rest))
    grown = float(tilted.shares @ (low + high))
    index = below.astype(np.int64)
    mass: Array = np.bincount(index % size, tilted.shares * (low + 1 - share), size)
    mass += np.bincount((index + 1) % size, tilted.shares * (high + share), size)
    mass /= mass.sum()
    off = 8 * _U * math.log2(size) * math.sqrt(size * float(mass @ mass))
    values = np.conj(np.fft.rfft(mass)[1 : count + 1]) - 1
    return math.log1p(grown) + 4 * _U, values, off


def _log1p(z: Array) -> Array:
    """Return log(1 + z) with a small relative error; numpy's real part has an absolute one."""
    result = np.asarray(np.log1p(z))
    near = np.abs(z) < 0.5
    z = z[near]
    result.real[near] = np.log1p(2 * z.real + z.real**2 + z.imag**2) / 2
    return result


def _turned(times: Array, losses: Array) -> Array:
    angle = np.multiply.outer(times, losses)
    turned = np.empty(angle.shape, complex)
    turned.imag = np.sin(angle)
    angle /= 2
    np.sin(angle, out=angle)
    angle *= angle
    angle *= -2
    turned.real = angle
    return turned


class _Composition:
    """Releases in one direction of adjacency: sampled steps, and a Gaussian of all rows."""

    def __init__(self, steps: Mapping[Step, int], shift: float, delta: float) -> None:
        self.steps = steps
        self.shift = shift
        # What lies beyond is left out, and charged as a part of delta.
        self.reach = math.ceil(
            math.sqrt(2 * (math.log(sum(steps.values())) - math.log(delta) - math.log(_BEYOND)))
        )
        self.delta = delta * (1 - 2 * _BEYOND)

    def log_mgf(self, tau: float) -> float:
        """Return an upper bound on ``log M(tau)`` of everything together; infinity for NaN."""
        total = self.shift**2 * tau * (tau + 1) / 2
        for step, times in self.steps.items():
            total += times * _tilted(step, tau, self.reach, width=_COARSE).log_mgf
        return math.inf if math.isnan(total) else total

    def renyi(self) -> tuple[float, float]:
        """Return the least epsilon that moments bound, and the ``tau`` that it is found at."""
        log_delta = math.log(self.delta)
        known: dict[float, float] = {}

        def bound(log_tau: float) -> float:
            tau = math.exp(log_tau)
            spare = -log_delta - math.log1p(tau) - tau * math.log1p(1 / tau)
            known[log_tau] = (self.log_mgf(tau) + spare) / tau
            return known[log_tau]

        # Where a Gaussian of this variance would have its best; then three that enclose it.
        spread = self.shift**2
        for step, times in self.steps.items():
            for share, shift, rate, _ in step:
                spread += share * times * rate**2 * math.expm1(min(shift**2, 20.0))
        middle = math.log(max(2.0, -2 * log_delta) / max(spread, 1e-300)) / 2
        middle = min(max(middle, -12.0), 30.0)
        width, best = 1.0, bound(middle)
        low, high = bound(middle - width), bound(middle + width)
        while not (best <= low and best <= high) and abs(middle) < 60:
            if low < high:
                middle, high, best = middle - width, best, low
                low = bound(middle - width)
            else:
                middle, low, best = middle + width, best, high
                high = bound(middle + width)
        for _ in range(12):
            width /= 2
            for aside in (middle - width, middle + width):
                if bound(aside) < best:
                    middle, best = aside, known[aside]
                    break
            if width < 2e-2:
                break
        return max(0.0, best), math.exp(middle)

    def epsilon(self, known: float = 0.0) -> float:
        """Return an upper bound on epsilon, or ``known`` where that is larger.

        Any ``tau`` gives a bound. The first line has a small release for the epsilon that moments
        bound; where the result is much smaller, so must the release be.
        """
        ceiling, tau = self.renyi()
        if ceiling <= known or math.isinf(ceiling):
            return max(ceiling, known)
        guess, best = 0.95 * ceiling, ceiling
        small = _small(guess, -math.log(self.delta) / ceiling)
        for _ in range(_MAX_PASSES):
            try:
                contour = _Contour(self, tau, guess, small)
                found = contour.epsilon(best)
            except ArithmeticError:  # no line within the numbers that there are
                break
            best = min(best, found)
            if found == 0:
                break
            nearby = contour.log_delta(found) - contour.log_delta(found * 1.05)
            needed = _small(found, nearby / (0.05 * found))
            if small <= _TOO_LARGE * needed:
                break
            guess, small = found, needed
        return max(best, known)


def _small(epsilon: float, slope: float) -> float:
    """Return the variance that costs ``_SMOOTHING`` of epsilon where log delta falls so fast."""
    return 2 * _SMOOTHING * epsilon / (1 + max(slope, 0.0) + 1 / epsilon)


class _Contour:
    """Values of the transform on one line, of which any epsilon's delta follows."""

    def __init__(self, composition: _Composition, tau: float, guess: float, needed: float) -> None:
        self._log_delta = math.log(composition.delta)
        variance = max(needed, composition.shift**2)
        tau, period = self._line(composition, tau, guess)
        spacing = 2 * math.pi / period
        variance = max(variance, (_DECAY / (spacing * _MAX_TERMS)) ** 2)
        nodes = _DECAY / (math.sqrt(variance) * spacing)
        if not math.isfinite(nodes):
            raise ArithmeticError("No line lies within floating point.")
        count = math.ceil(nodes)
        t = spacing * np.arange(1, count + 1)
        log_ratio = variance * (1j * t * (tau + 0.5) - t**2 / 2)
        added = np.abs(log_ratio)  # without what cancels between the steps
        log_mgf = variance * tau * (tau + 1) / 2
        wrong, dropped = np.zeros(count), 0.0
        kernel = 2 / ((tau + 1j * t) * (tau + 1 + 1j * t))
        largest = sorted(composition.steps.items(), key=lambda item: _spread(item[0]) * item[1])
        for step, times in reversed(largest):
            # The others can only make smaller what is negligible already.
            active = int(np.flatnonzero(log_ratio.real > -_NEGLIGIBLE).max(initial=0)) + 1
            dropped += float((np.abs(kernel[active:]) * np.exp(log_ratio.real[active:])).sum())
            t, kernel = t[:active], kernel[:active]
            log_ratio, added, wrong = log_ratio[:active], added[:active], wrong[:active]
            tilted = _tilted(step, tau, composition.reach)
            size = math.ceil(period * math.sqrt(times / needed) * _LATTICE)
            size = int(2 ** math.ceil(math.log2(max(min(size, _MAX_POINTS), 4 * active))))
            grown, off = 0.0, tilted.wrong
            if size * _PER_POINT < active * len(tilted.losses):
                grown, gained, more = _on_lattice(tilted, tau, spacing, active, size)
                off += more
            else:
                gained = _transform(tilted, spacing, active)
            log_mgf += times * (tilted.log_mgf + grown)
            gained[gained == -1] += _U  # the logarithm of 0 would be no number times an angle
            more_log = times * _log1p(gained)
            log_ratio, added = log_ratio + more_log, added + np.abs(more_log)
            each = np.minimum(2 * tilted.wrong_shares, t * tilted.wrong_losses)
            wrong = wrong + times * (each + t * tilted.wrong_losses + off)
        self._tau, self._spacing, self._t = tau, spacing, t
        self._log_mgf = log_mgf * (1 + 8 * _U)
        self._ratio = np.exp(log_ratio) * kernel
        self._first = 1 / (tau * (tau + 1))
        cut = math.exp(-variance * (count * spacing) ** 2 / 2)
        cut *= 2 / (spacing * count * spacing) / max(1.0, variance * (count * spacing) ** 2)
        gauss = np.exp(-variance * t**2 / 2)
        self._error = cut + dropped + float((np.abs(kernel) * gauss * np.expm1(wrong)).sum())
        self._error += _U * float((np.abs(self._ratio) * (16 + 8 * added)).sum())
        self._turns = _U * float((np.abs(self._ratio) * (8 * t)).sum())
        self._total = _U * (self._first + float(np.abs(self._ratio).sum())) * (len(t) + 8)

    @staticmethod
    def _line(composition: _Composition, tau: float, guess: float) -> tuple[float, float]:
        """Return where the line is to lie, and how far apart the terms of the Poisson sum.

        The farther apart, the more nodes. Those below ``guess`` are at most 1, those above at most
        what a larger ``tau`` says.
        """
        small = _ALIASES - math.log(composition.delta)
        taus = [tau * 2 ** (half / 2) for half in range(-6, 3)]
        above = [composition.log_mgf(larger) - larger * guess + small for larger in taus]
        periods = [
            max(small / low, min(above[k] / (taus[k] - low) for k in range(i + 1, len(taus))))
            for i, low in enumerate(taus[:-1])
        ]
        period = min(periods)
        return taus[periods.index(period)], period

    def log_delta(self, epsilon: float) -> float:
        """Return an upper bound on the logarithm of delta."""
        turned = np.exp(-1j * self._t * epsilon)
        total = self._first + float((self._ratio * turned).real.sum())
        total = max(total, 0.0) + self._error + self._total + epsilon * self._turns
        tilt = self._log_mgf - self._tau * epsilon
        tilt += 8 * _U * (abs(self._log_mgf) + self._tau * epsilon)
        return tilt + math.log(total * self._spacing / (2 * math.pi))

    def epsilon(self, ceiling: float) -> float:
        """Return the least epsilon up to ``ceiling`` that delta allows."""
        return _least(lambda epsilon: self.log_delta(epsilon) - self._log_delta, ceiling)


def _least(excess: Callable[[float], float], ceiling: float) -> float:
    """Return where a falling function is no longer above 0, from above; at most ``ceiling``."""
    from scipy.optimize import brentq

    def above(epsilon: float) -> float:
        value = excess(epsilon)
        return math.inf if math.isnan(value) else value

    if above(0.0) <= 0:
        return 0.0
    if above(ceiling) >= 0:
        return ceiling
    found = brentq(above, 0.0, ceiling, xtol=1e-300, rtol=1e-12)
    step = found * 1e-12
    while found < ceiling and above(found) > 0:
        found, step = found + step, step * 2
    return float(min(found, ceiling))


def _spread(step: Step) -> float:
    return sum(s.share * s.rate**2 * math.expm1(min(s.shift**2, 20.0)) for s in step)


def gaussian_epsilon(shift: float, delta: float) -> float:
    """Return the epsilon of a Gaussian release, in closed form.

    Args:
        shift: What one row moves, in standard deviations; of several, the root of the squares' sum.
        delta: Between 0 and 1.

    Source:
        Balle and Wang 2018, arXiv:1805.06530, theorem 8.
    """
    from scipy.special import log_ndtr

    def excess(epsilon: float) -> float:
        first = float(log_ndtr(shift / 2 - epsilon / shift))
        second = epsilon + float(log_ndtr(-shift / 2 - epsilon / shift))
        # Both are rounded, in proportion to their logarithms.
        doubt = 64 * _U * (1 + abs(first) + epsilon + (epsilon / shift + shift) ** 2)
        return first + math.log(-math.expm1(min(0.0, second - first)) + doubt) - math.log(delta)

    ceiling = shift**2 / 2 + shift * math.sqrt(2 * math.log(1 / delta))
    while excess(ceiling) > 0:
        ceiling *= 2
    return _least(excess, ceiling)


def _one_step_epsilon(shift: float, rate: float, delta: float) -> float:
    """Return the epsilon of one sampled Gaussian release, in closed form.

    With the row in P only, ``delta(e) = rate * gaussian_delta(log1p(expm1(e) / rate))``. With the
    row in Q only, it is ``c * gaussian_delta(log(rate * exp(e) / c))`` with
    ``c = 1 - exp(e) * (1 - rate)``. The second is not larger: ``c <= rate``, and the argument of
    ``gaussian_delta`` is not smaller.

    Source:
        Balle et al. 2018, arXiv:1807.01647, theorem 9 (the first direction).
    """
    share = delta / rate * (1 - 4 * _U)
    if share >= 1:
        return 0.0
    whole = gaussian_epsilon(shift, share)
    if whole < 500:
        return math.log1p(rate * math.expm1(whole)) * (1 + 16 * _U)
    moved = whole + math.log(rate)
    return float(np.logaddexp(math.log1p(-rate), moved)) + 16 * _U * (whole + abs(moved))


def gaussian_shift(epsilon: float, delta: float) -> float:
    """Return about what one row may move, in standard deviations, for :func:`gaussian_epsilon`."""
    low, high = 1e-9, 1e9
    while high / low > 1 + 1e-3:
        middle = math.sqrt(low * high)
        if gaussian_epsilon(middle, delta) > epsilon:
            high = middle
        else:
            low = middle
    return low


def epsilon_of(releases: Mapping[tuple[float, float], int], delta: float) -> float:
    """Return an upper bound on the epsilon of sampled Gaussian releases.

    Args:
        releases: Steps of each noise multiplier, above 0, and sample rate.
        delta: Above 0 and below 1.
    """
    shift = math.sqrt(sum(t / noise**2 for (noise, rate), t in releases.items() if rate == 1))
    sampled = {key: times for key, times in releases.items() if key[1] < 1}
    if not sampled:
        return gaussian_epsilon(shift, delta) if shift else 0.0
    if _apart(shift, sampled) <= delta * (1 - 1e-9):
        return 0.0
    if not shift and list(sampled.values()) == [1]:
        ((noise, rate),) = sampled
        return _one_step_epsilon(1 / noise, rate, delta)

    def steps(relation: str) -> dict[Step, int]:
        return {(Part(1.0, 1 / n, q, relation),): times for (n, q), times in sampled.items()}

    found = _Composition(steps("remove"), shift, delta).epsilon()
    # No loss of an added row is larger than this.
    most = sum(-times * math.log1p(-rate) for (_, rate), times in sampled.items())
    if shift or most > found:
        found = _Composition(steps("add"), shift, delta).epsilon(found)
    return found


def _apart(shift: float, sampled: Mapping[tuple[float, float], int]) -> float:
    """Return a bound on the total variation, by drawing both outcomes as equal as can be."""
    same = math.log(math.erfc(shift / math.sqrt(8)) or 1e-300)
    for (noise, rate), times in sampled.items():
        same += times * math.log1p(-rate * math.erf(1 / (noise * math.sqrt(8))))
    return -math.expm1(same)


def epsilon_of_truncated(
    noise_multiplier: float,
    rate: float,
    steps: int,
    *,
    dataset_size: int,
    max_batch_size: int,
    delta: float,
) -> float:
    """Return an upper bound on the epsilon of steps whose draws are cut off at a number of rows.

    Where a draw is cut off, which happens with a probability that the attacker knows, a row may
    take another one's place, so the sum moves by two.

    Not charged: the rounding of the binomial tails, and the number of rows, which is taken as
    public though it differs by one between neighbours.

    Source:
        Chua et al. 2024, arXiv:2411.04205; dp_accounting's
        ``from_truncated_subsampled_gaussian_mechanism``, of which the two pairs are.
    """
    from scipy.stats import binom

    cut = float(binom.sf(max_batch_size - 1, dataset_size - 1, rate))
    shift = 1 / noise_multiplier

    def step(relation: str) -> Step:
        whole = Part(1 - cut, shift, rate, relation)
        if not cut:
            return (whole,)
        among = float(binom.sf(max_batch_size, dataset_size, rate)) * max_batch_size
        replaced = Part(cut, 2 * shift, min(1.0, among / cut / dataset_size), "replace")
        return (whole, replaced) if cut < 1 else (replaced,)

    found = _Composition({step("remove"): steps}, 0.0, delta).epsilon()
    return _Composition({step("add"): steps}, 0.0, delta).epsilon(found)
