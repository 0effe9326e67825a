"""Writes epsilon in 60-digit arithmetic: ``python tests/vectors/epsilon/make.py [FILE]``.

The numbers use nothing of the package, and no floating point of the processor. Three ways, by what
there is:

* All rows in each step: the closed form of the Gaussian mechanism (Balle and Wang 2018).
* One sampled step: the mass of both distributions beyond the threshold, in closed form.
* Many sampled steps: the integral of the loss's transform along a vertical line, by the
  trapezoidal rule, with the transform of one step by the trapezoidal rule too. Neither is cut off
  before its terms fall below 1e-35 of the first, and both rules converge exponentially. On another
  line, with half as many nodes again, the answer must be the same to 15 digits; a case where it is
  not, or whose sum does not end, is left out.

Of the two directions of adjacency, the larger epsilon counts. It takes about ten minutes.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from mpmath import mp, mpf

mp.dps = 60


def gaussian(shift, delta):
    def excess(e):
        return mp.log(
            mp.ncdf(shift / 2 - e / shift) - mp.exp(e) * mp.ncdf(-shift / 2 - e / shift)
        ) - mp.log(delta)

    return crossing(excess)


def crossing(excess):
    """Return where a falling function crosses 0, to 20 digits, by halving and then by lines."""
    if excess(mpf(0)) <= 0:
        return mpf(0)
    low, high = mpf(0), mpf(1)
    while excess(high) > 0:
        low, high = high, 2 * high
    while low == 0 and excess(high / 2) <= 0:
        high /= 2
    low = max(low, high / 2)
    below, above = excess(high), excess(low)
    for _ in range(60):
        middle = low + (high - low) * above / (above - below)
        value = excess(middle)
        if value > 0:
            low, above, below = middle, value, below / 2
        else:
            high, below, above = middle, value, above / 2
        if high - low < high * mpf(10) ** -25 or abs(value) < mpf(10) ** -30:
            return middle
    return high


def one_step(e, q, shift, added):
    """Return delta of one step: the mass of P above the threshold, less exp(e) times that of Q."""
    if added:  # P = N(0, 1), Q = (1 - q) N(0, 1) + q N(shift, 1); the loss falls with x
        inside = (mp.exp(-e) - 1 + q) / q
        if inside <= 0:
            return mpf(0)
        x = mp.log(inside) / shift + shift / 2
        return mp.ncdf(x) - mp.exp(e) * ((1 - q) * mp.ncdf(x) + q * mp.ncdf(x - shift))
    inside = (mp.exp(e) - 1 + q) / q
    if inside <= 0:
        return 1 - mp.exp(e)
    x = mp.log(inside) / shift + shift / 2
    return (1 - q) * mp.ncdf(-x) + q * mp.ncdf(shift - x) - mp.exp(e) * mp.ncdf(-x)


def line(q, shift, steps, delta, tau, added, fine):
    """Return epsilon by the integral along ``Re z = tau``."""
    h = min(mpf(1), 1 / shift) / (8 * fine)
    low = -(18 + (tau * shift if added else 0))
    high = 18 + shift + (0 if added else tau * shift)
    nodes = []
    for k in range(int(low / h), int(high / h) + 1):
        x = k * h
        ratio = mp.log(1 - q + q * mp.exp(shift * x - shift**2 / 2))
        weight = mp.npdf(x) * h * (1 if added else mp.exp(ratio))
        loss = -ratio if added else ratio
        tilted = weight * mp.exp(tau * loss)
        nodes.append((loss, tilted))
    mass = sum(v for _, v in nodes)
    nodes = [(loss, v / mass) for loss, v in nodes if v > mass * mpf(10) ** -50]
    spacing = 2 * mp.pi * tau / (100 * fine - mp.log(delta))
    values, k = [], 0
    turns = [mpc_exp(spacing * loss) for loss, _ in nodes]
    now = [mp.mpc(v) for _, v in nodes]
    while True:
        z = mp.mpc(tau, k * spacing)
        value = sum(now) ** steps / (z * (z + 1)) * (1 if k else mpf(1) / 2)
        values.append(value)
        if abs(value) < mpf(10) ** -35 * abs(values[0]):
            break
        if k > 600:
            return None
        k += 1
        now = [n * t for n, t in zip(now, turns, strict=True)]
    scale = steps * mp.log(mass) + mp.log(spacing / mp.pi)

    def excess(e):
        turn, total = mp.mpc(1), mpf(0)
        step = mpc_exp(-spacing * e)
        for value in values:
            total += (value * turn).real
            turn *= step
        return (scale - tau * e + mp.log(total) if total > 0 else -(mpf(10) ** 9)) - mp.log(delta)

    return crossing(excess)


def mpc_exp(angle):
    return mp.mpc(mp.cos(angle), mp.sin(angle))


def saddle(q, shift, steps, delta):
    """Return a tau for the line: any gives the same answer, and some need fewer terms."""
    spread = steps * q**2 * (mp.exp(min(shift**2, 20)) - 1)
    # The hits of a rare row become the larger part above this.
    wall = -mp.log(q) / shift**2
    return min(mp.sqrt(-2 * mp.log(delta) / spread), wall + 1, 60 / shift)


def one_step_excess(q, shift, added, delta, e):
    value = one_step(e, q, shift, added)
    return mp.log(value / delta) if value > 0 else -(mpf(10) ** 9)


def sampled(q, shift, steps, delta):
    found = mpf(0)
    for added in (False, True):
        if steps == 1:
            value = crossing(partial(one_step_excess, q, shift, added, delta))
        else:
            tau = saddle(q, shift, steps, delta)
            value = line(q, shift, steps, delta, tau, added, 1)
            if value is None:
                return None
            again = line(q, shift, steps, delta, tau * mpf("1.1"), added, mpf("1.5"))
            if again is None or abs(again - value) > mpf(10) ** -15 * value:
                return None
        found = max(found, value)
    return found


def cases():
    deltas = ["1e-5", "1e-8", "1e-11", "1e-13", "1e-15"]
    for noise, steps in [
        ("0.3", 1),
        ("0.3", 10**7),
        ("1", 1),
        ("1", 100),
        ("10", 1000),
        ("100", 1000),
        ("300", 10**4),
        ("1000", 10**5),
        ("3000", 1),
        ("3000", 10**6),
        ("3000", 10**7),
    ]:
        for delta in deltas:
            yield "1", noise, steps, delta
    for rate, noise in [
        ("1e-6", "0.3"),
        ("1e-4", "0.5"),
        ("1e-2", "1"),
        ("0.3", "3"),
        ("1e-3", "100"),
        ("0.9", "1000"),
    ]:
        for delta in ("1e-5", "1e-9", "1e-15"):
            yield rate, noise, 1, delta
    for rate, noise, steps in [
        ("0.01", "1", 1000),
        ("0.01", "4", 10**4),
        ("0.004", "1.1", 14062),
        ("0.08", "10", 875),
        ("0.5", "2", 100),
        ("0.3", "0.5", 10**3),
        ("1e-3", "1", 10**6),
        ("2e-4", "1", 10**7),
        ("1e-6", "0.3", 10**7),
        ("1e-6", "0.6", 10**7),
        ("1e-5", "3000", 10**7),
        ("1e-6", "100", 10**7),
        ("0.05", "300", 10**5),
        ("0.9", "3000", 10**6),
        ("0.99", "1", 10),
        ("0.1", "0.3", 10**5),
        ("1e-4", "30", 10**7),
        ("0.002", "2", 10**6),
    ]:
        for delta in ("1e-5", "1e-15"):
            yield rate, noise, steps, delta


def main():
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("epsilon.json")
    rows = []
    for rate, noise, steps, delta in cases():
        q, shift, d = mpf(rate), 1 / mpf(noise), mpf(delta)
        value = gaussian(shift * mp.sqrt(steps), d) if q == 1 else sampled(q, shift, steps, d)
        if value is not None:
            rows.append([float(rate), float(noise), steps, float(delta), mp.nstr(value, 18)])
        write(target, rows)


def write(target, rows):
    target.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
