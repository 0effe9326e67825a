from __future__ import annotations

import json
import math
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lightning_secure.privacy.accounting import loss_transform, pld
from lightning_secure.privacy.accounting.loss_transform import (
    Part,
    gaussian_epsilon,
    gaussian_shift,
)
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import (
    affordable_steps,
    calibrate_noise,
    epsilon_pld,
    epsilon_truncated,
)

# rate, noise multiplier, steps, delta, epsilon: in 60-digit arithmetic, by make.py beside it.
EXACT = json.loads((Path(__file__).parents[1] / "vectors/epsilon/epsilon.json").read_text())
FULL = [row for row in EXACT if row[0] == 1]
SAMPLED = [row for row in EXACT if row[0] < 1]


def seconds(function):
    """Return the processor time of this thread, which other processes do not lengthen."""
    begun = time.thread_time()
    function()
    return time.thread_time() - begun


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    pld._epsilon.cache_clear()


def test_the_reference_covers_what_is_promised():
    rates, noises, steps, deltas, _ = zip(*EXACT, strict=True)
    assert (min(rates), max(rates)) == (1e-6, 1)
    assert (min(noises), max(noises)) == (0.3, 3000)
    assert (min(steps), max(steps)) == (1, 10**7)
    assert (min(deltas), max(deltas)) == (1e-15, 1e-5)
    assert len(SAMPLED) >= 40
    assert len(FULL) >= 50


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "exact"), FULL)
def test_full_batches_have_the_exact_epsilon(rate, noise, steps, delta, exact):
    found = epsilon_pld([Release(noise, rate, steps)], delta=delta)
    assert float(exact) <= found <= float(exact) * (1 + 1e-9)


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "exact"), SAMPLED)
def test_epsilon_is_never_below_the_exact_one_and_hardly_above(rate, noise, steps, delta, exact):
    found = epsilon_pld([Release(noise, rate, steps)], delta=delta)
    assert float(exact) <= found
    assert found <= float(exact) * (1 + (2e-4 if steps > 1 else 1e-9))


def test_dp_accounting_agrees_where_its_grid_and_rounding_do_not_matter():
    from dp_accounting.pld import privacy_loss_distribution

    step = privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=1.0, sampling_prob=0.01, value_discretization_interval=1e-4
    )
    theirs = step.self_compose(100).get_epsilon_for_delta(1e-5)
    assert epsilon_pld([Release(1.0, 0.01, 100)], delta=1e-5) == pytest.approx(theirs, rel=5e-4)


def test_a_calibrated_budget_is_not_exceeded():
    for row in random.Random(1).sample(EXACT, 12):
        rate, noise, steps, delta, exact = (float(value) for value in row)
        if exact == 0:
            continue
        found = calibrate_noise(
            target_epsilon=exact, delta=delta, sample_rate=rate, steps=int(steps)
        )
        assert noise <= found <= noise * 1.01


def test_few_steps_of_a_rare_row_exceed_the_exact_epsilon_by_some_percent():
    found = epsilon_pld([Release(0.714, 2.29e-6, 2)], delta=9.3e-8)
    assert 5.67e-5 <= found <= 5.67e-5 * 1.05  # by 40-digit quadrature


def test_calibration_ends_where_epsilon_jumps(monkeypatch):
    asked = []

    def jumping(_, releases, *, delta):
        asked.append(releases[-1].noise_multiplier if releases else None)
        return 0.0 if not releases else 2.0 if releases[-1].noise_multiplier < 1e5 else 0.5

    monkeypatch.setattr(pld, "epsilon_by", jumping)
    plan = {"target_epsilon": 1.0, "delta": 1e-6, "sample_rate": 0.01, "steps": 10}
    found = calibrate_noise(**plan)
    assert 1e5 <= found <= 1e5 * (1 + 2e-6)
    assert len(asked) < 60


def test_parts_of_a_run_cost_what_the_whole_does():
    whole = epsilon_pld([Release(1.0, 0.01, 1000)], delta=1e-9)
    parts = [Release(1.0 + k * 1e-12, 0.01, 100) for k in range(10)]  # mechanisms of their own
    assert epsilon_pld(parts, delta=1e-9) == pytest.approx(whole, rel=1e-4)


def test_releases_of_all_rows_join_the_sampled_ones():
    sampled, full = Release(2.0, 0.3, 500), Release(9.0, 1.0, 40)
    both = epsilon_pld([sampled, full], delta=1e-8)
    almost = epsilon_pld([sampled, full._replace(sample_rate=1 - 1e-9)], delta=1e-8)
    assert both == pytest.approx(almost, rel=1e-3)
    assert both > max(epsilon_pld([r], delta=1e-8) for r in (sampled, full))


def test_many_mechanisms_with_a_full_batch_cost_hardly_more_than_exactly():
    sampled = [Release(5 * (1 + k / 50), 0.01, 3000) for k in range(10)]
    found = epsilon_pld([*sampled, Release(3.0, 1.0, 1)], delta=1e-5)
    exact = 1.832265  # in 80-bit arithmetic, on a line of its own
    assert exact <= found <= exact * (1 + 1e-4)


@pytest.mark.parametrize("rate", [0.5, 0.99, 1 - 1e-6, 1 - 2**-50])
@pytest.mark.parametrize("shift", [1.0, 10.0])
def test_losses_are_within_their_bound_of_the_exact_ones(rate, shift):
    from mpmath import mp, mpf

    points = np.linspace(-9, 9 + shift, 200)
    losses, bounds = loss_transform._log_ratio(points, Part(1.0, shift, rate, "remove"))
    with mp.workdps(50):
        for x, loss, bound in zip(points, losses, bounds, strict=True):
            moved = mp.exp(mpf(shift) * mpf(x) - mpf(shift) ** 2 / 2)
            assert abs(mpf(loss) - mp.log(1 - mpf(rate) + mpf(rate) * moved)) <= mpf(bound)


def test_logarithms_of_transforms_next_to_one_are_exact():
    z = np.array([1e-18 + 1e-9j, -7e-17 + 1e-8j, -3e-7 + 1e-3j, 0.2 - 0.3j])
    from mpmath import mp, mpc

    with mp.workdps(60):
        exact = np.array([complex(mp.log(1 + mpc(each))) for each in z])
    found = loss_transform._log1p(z)
    assert found.real == pytest.approx(exact.real, rel=1e-9, abs=0)
    assert found.imag == pytest.approx(exact.imag, rel=1e-14, abs=0)


def test_a_delta_that_is_no_number_is_above_any():
    assert loss_transform._least(lambda _: math.nan, 3.0) == 3.0


@pytest.mark.parametrize("width", [loss_transform._COARSE, loss_transform._WIDTH])
@pytest.mark.parametrize("column", [0, 1])
def test_a_mass_that_is_no_number_is_not_left_out(monkeypatch, column, width):
    real, releases = loss_transform._dots, [Release(1.0, 0.01, 100 + column)]
    least = loss_transform.epsilon_of({releases[0][:2]: releases[0].steps}, 1e-5)

    def broken(part, reach, spacing):
        columns = [values.copy() for values in real(part, reach, spacing)]
        if spacing == width:
            columns[column][len(columns[column]) // 2] = math.nan
        return tuple(columns)

    monkeypatch.setattr(loss_transform, "_dots", broken)
    with np.errstate(all="ignore"):
        found = epsilon_pld(releases, delta=1e-5)
    # Without the fine dots, moments of the coarse ones are left.
    assert found == math.inf if width == loss_transform._COARSE else least < found < 2 * least


@pytest.mark.parametrize("rate", [2.29e-6, 0.01, 0.5, 0.99, 1 - 2**-50])
@pytest.mark.parametrize("noise", [0.02, 0.714, 30.0])
@pytest.mark.parametrize("delta", [9.3e-8, 1e-30])
def test_one_step_has_the_exact_epsilon(rate, noise, delta):
    found = epsilon_pld([Release(noise, rate, 1)], delta=delta)
    assert exact_delta(found, rate, noise) <= delta
    assert found == 0 or exact_delta(found * (1 - 1e-7), rate, noise) > delta


def exact_delta(epsilon, rate, noise):
    """Return delta of one step in 60 digits, in the worse direction."""
    from mpmath import mp, mpf

    with mp.workdps(60):
        q, s, e = mpf(rate), 1 / mpf(noise), mp.exp(mpf(epsilon))
        x = mp.log((e - 1 + q) / q) / s + s / 2
        in_p = (1 - q) * mp.ncdf(-x) + q * mp.ncdf(s - x) - e * mp.ncdf(-x)
        if 1 / e - 1 + q <= 0:
            return in_p
        x = mp.log((1 / e - 1 + q) / q) / s + s / 2
        return max(in_p, mp.ncdf(x) - e * ((1 - q) * mp.ncdf(x) + q * mp.ncdf(x - s)))


def test_it_is_no_higher_than_moments_allow():
    draw = random.Random(3)
    for _ in range(15):
        release = Release(
            10 ** draw.uniform(-0.5, 3), 10 ** draw.uniform(-6, 0), int(10 ** draw.uniform(0, 7))
        )
        delta = 10 ** draw.uniform(-15, -5)
        moments = pld._by_moments([release], delta)
        assert not moments or epsilon_pld([release], delta=delta) <= moments * (1 + 1e-4)


def test_another_step_costs_more():
    for steps in (1, 10, 1000, 10**5, 10**7):
        costs = [epsilon_pld([Release(1.0, 1e-3, n)], delta=1e-6) for n in (steps, steps + 1)]
        assert costs[0] < costs[1]


@pytest.mark.parametrize(
    "releases",
    [
        [Release(1e-3, 0.01, 10)],
        [Release(0.05, 0.5, 10**7)],
        [Release(1e9, 0.5, 10)],
        [Release(0.3, 1e-6, 1)],
        [Release(3000.0, 1e-6, 1)],
        [Release(1.0, 0.01, 2**40)],
        [Release(1.0, 1 - 2**-50, 100), Release(5.0, 1.0, 10**7), Release(0.3, 1e-9, 10**6)],
    ],
)
@pytest.mark.parametrize("delta", [0.5, 1e-5, 1e-15, 1e-100])
def test_extremes_have_an_answer(releases, delta):
    assert 0 <= epsilon_pld(releases, delta=delta) < math.inf


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("noise", [1e-155, 1e-50, 1e-3, 1e16, 1e308])
@pytest.mark.parametrize("rate", [1e-320, 1e-9, 0.5, 1 - 2**-53, 1.0])
@pytest.mark.parametrize(("steps", "delta"), [(1, 1e-5), (2**40, 1e-299), (2**40, 1 - 2**-53)])
def test_no_release_is_too_extreme_to_account_for(noise, rate, steps, delta):
    alone = epsilon_pld([Release(noise, rate, steps)], delta=delta)
    assert 0 <= alone <= math.inf
    assert alone == math.inf or noise >= 1e-50
    beside = epsilon_pld([Release(noise, rate, steps), Release(1.0, 0.1, 3)], delta=delta)
    assert 0 <= beside <= math.inf
    assert beside >= alone * (1 - 1e-3)


def test_the_edges():
    release = [Release(1.0, 0.01, 10)]
    assert epsilon_pld(release, delta=0.0) == epsilon_pld(release, delta=1e-301) == math.inf
    assert epsilon_pld(release, delta=1.0) == epsilon_pld([], delta=0.0) == 0
    # A row that is drawn more rarely than delta, even once.
    assert epsilon_pld([Release(0.3, 1e-6, 9)], delta=1e-5) == 0


def test_the_shift_of_a_gaussian_is_found_back():
    assert gaussian_shift(gaussian_epsilon(0.7, 1e-6), 1e-6) == pytest.approx(0.7, rel=2e-3)


def test_cutting_off_all_or_no_draws():
    plan = {"delta": 1e-6, "dataset_size": 1000}
    never = epsilon_truncated(Release(1.0, 0.1, 100), max_batch_size=1000, **plan)
    assert never == pytest.approx(epsilon_pld([Release(1.0, 0.1, 100)], delta=1e-6), rel=1e-3)
    always = epsilon_truncated(Release(1.0, 0.1, 100), max_batch_size=1, **plan)
    assert 0 < always < math.inf


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("steps", [10**3, 10**5, 10**7])
@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0])
def test_more_steps_take_no_longer(rate, steps):
    releases = [Release(1.0, rate, steps)]
    epsilon_pld([Release(1.1, 0.2, 2)], delta=1e-6)  # imports
    assert seconds(lambda: epsilon_pld(releases, delta=1e-7)) < 0.4


def test_calibration_takes_no_longer_for_ten_million_steps():
    plan = {"target_epsilon": 3.0, "delta": 1e-11, "sample_rate": 1e-3}
    assert seconds(lambda: calibrate_noise(**plan, steps=10**7)) < 2


def test_a_large_budget_takes_no_longer_and_little_memory():
    plan = {"target_epsilon": 300.0, "delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.01}
    tracemalloc.start()
    assert seconds(lambda: affordable_steps(**plan, at_most=1000)) < 2
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


def test_fifty_mechanisms_take_little_longer():
    releases = [Release(1 + k / 100, 0.01, 1000) for k in range(50)] + [Release(20.0, 1.0, 3)]
    assert seconds(lambda: epsilon_pld(releases, delta=1e-6)) < 4


def test_waiting_is_explained(caplog, monkeypatch):
    monkeypatch.setattr(pld, "_PATIENCE", 0.0)  # no test waits for a second
    with pld.announced("calibrating"):
        time.sleep(0.2)
    assert "calibrating takes more than a second" in caplog.text
    caplog.clear()
    monkeypatch.setattr(pld, "_PATIENCE", 60.0)
    with pld.announced("calibrating"):
        pass
    assert not caplog.text
