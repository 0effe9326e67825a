from __future__ import annotations

import math

import pytest

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import (
    affordable_steps,
    calibrate_noise,
    epsilon_pld,
    epsilon_rdp,
    epsilon_truncated,
)

# q, sigma, T, delta: by dp_accounting's privacy loss distributions on a grid of 1e-4, and by RDP.
# The first is the Gaussian mechanism, whose epsilon is known in closed form: 4.37718.
REFERENCE = [
    ((1.0, 1.0, 1, 1e-5), 4.3772, 4.7285),
    ((0.01, 4.0, 10_000, 1e-5), 0.9470, 1.0355),
    ((0.01, 1.0, 1000, 1e-5), 1.8282, 2.1014),
    ((256 / 60_000, 1.1, 14_062, 1e-5), 2.3817, 2.5966),
    ((4096 / 50_000, 10.0, 875, 1e-5), 0.9028, 0.9877),
]


@pytest.mark.parametrize(("case", "pld", "rdp"), REFERENCE)
def test_reference_values(case, pld, rdp):
    rate, noise, steps, delta = case
    releases = [Release(noise, rate, steps)]
    assert epsilon_pld(releases, delta=delta) == pytest.approx(pld, rel=1e-4)
    assert epsilon_rdp(releases, delta=delta) == pytest.approx(rdp, rel=1e-4)


@pytest.mark.parametrize(("limit", "pld"), [(550, 4.836), (700, 1.829)])
def test_cutting_off_large_draws_is_not_free(limit, pld):
    release = Release(1.0, 0.01, 1000)
    found = epsilon_truncated(release, delta=1e-5, dataset_size=50_000, max_batch_size=limit)
    assert found == pytest.approx(pld, rel=1e-3)


def test_what_cannot_be_calibrated_ends():
    plan = {"target_epsilon": 0.01, "delta": 1e-30, "sample_rate": 0.01, "steps": 10}
    with pytest.raises(PrivacyError, match="no amount of noise"):  # its orders end
        calibrate_noise(**plan, accountant="opacus-rdp")
    with pytest.raises(PrivacyError, match="promises nothing"):  # a row is drawn more rarely
        calibrate_noise(target_epsilon=0.5, delta=0.3, sample_rate=0.01, steps=10)


def test_a_tiny_delta_can_be_calibrated_for():
    noise = calibrate_noise(target_epsilon=1.0, delta=1e-30, sample_rate=0.01, steps=10)
    assert 0.99 <= epsilon_pld([Release(noise, 0.01, 10)], delta=1e-30) <= 1.0


def test_moments_that_round_below_zero_do_not_make_epsilon_zero():
    release = [Release(3e7, 0.01, 10)]
    assert epsilon_rdp(release, delta=1e-12) >= epsilon_pld(release, delta=1e-12) > 0


def test_the_gaussian_mechanism_agrees_with_its_closed_form():
    from scipy.stats import norm

    def delta_of(epsilon, sigma):  # Balle and Wang 2018, arXiv:1805.06530, theorem 8
        a, b = 1 / (2 * sigma), epsilon * sigma
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)

    for sigma in (0.8, 1.0, 3.0):
        epsilon = epsilon_pld([Release(sigma, 1.0, 1)], delta=1e-5)
        assert delta_of(epsilon, sigma) == pytest.approx(1e-5, rel=1e-2)


def test_no_release_costs_nothing_and_no_noise_costs_everything():
    assert epsilon_pld([], delta=1e-5) == 0
    assert epsilon_pld([Release(1.0, 0.1, 0), Release(0.0, 0.1, 0)], delta=1e-5) == 0
    for epsilon in (epsilon_pld, epsilon_rdp):
        assert epsilon([Release(0.0, 0.1, 1)], delta=1e-5) == math.inf


def test_releases_add_up():
    whole = epsilon_pld([Release(1.0, 0.01, 1000)], delta=1e-5)
    parts = epsilon_pld([Release(1.0, 0.01, 400), Release(1.0, 0.01, 600)], delta=1e-5)
    assert parts == pytest.approx(whole, rel=1e-3)
    mixed = epsilon_pld([Release(1.0, 0.01, 1000), Release(2.0, 0.05, 10)], delta=1e-5)
    assert mixed > whole


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(8.0, 1e-4, 128 / 455, 128), (3.0, 1e-5, 0.00512, 2000), (0.1, 1e-6, 0.00512, 20_000)],
)
def test_calibrated_noise_spends_the_budget_and_no_more(target, delta, rate, steps):
    noise = calibrate_noise(target_epsilon=target, delta=delta, sample_rate=rate, steps=steps)
    spent = epsilon_pld([Release(noise, rate, steps)], delta=delta)
    assert target * (1 - 1e-3) <= spent <= target


def test_what_was_spent_before_is_taken_into_account():
    before = [Release(1.0, 0.01, 500)]
    arguments = {"target_epsilon": 2.5, "delta": 1e-5, "sample_rate": 0.01, "steps": 500}
    noise = calibrate_noise(**arguments, before=before)
    assert noise > calibrate_noise(**arguments)
    assert epsilon_pld([*before, Release(noise, 0.01, 500)], delta=1e-5) <= 2.5


def test_a_spent_budget_cannot_be_calibrated_for():
    with pytest.raises(PrivacyError, match="spent already"):
        calibrate_noise(
            target_epsilon=1.0,
            delta=1e-5,
            sample_rate=0.01,
            steps=10,
            before=[Release(1.0, 0.01, 1000)],
        )


def test_affordable_steps_are_the_last_that_fit():
    budget = {"target_epsilon": 1.0, "delta": 1e-5}
    steps = affordable_steps(**budget, noise_multiplier=2.0, sample_rate=0.02)
    assert epsilon_pld([Release(2.0, 0.02, steps)], delta=1e-5) <= 1.0
    assert epsilon_pld([Release(2.0, 0.02, steps + 1)], delta=1e-5) > 1.0
    before = [Release(2.0, 0.02, steps - 3)]
    assert affordable_steps(**budget, noise_multiplier=2.0, sample_rate=0.02, before=before) == 3


def test_a_budget_smaller_than_one_step_affords_none():
    assert (
        affordable_steps(target_epsilon=0.1, delta=1e-5, noise_multiplier=0.5, sample_rate=0.5) == 0
    )


def test_almost_endless_budgets_end():
    plan = {"target_epsilon": 5e9, "delta": 1e-5, "noise_multiplier": 1e3, "sample_rate": 1.0}
    assert affordable_steps(**plan) == 2**40
    assert affordable_steps(**plan, at_most=8) == 8
    assert affordable_steps(**plan, at_most=0) == 0


def test_a_budget_that_is_spent_affords_no_step():
    plan = {"target_epsilon": 1.0, "delta": 1e-5, "noise_multiplier": 2.0, "sample_rate": 0.02}
    assert affordable_steps(**plan, before=[Release(1.0, 1.0, 1)]) == 0


def test_many_affordable_steps_are_counted_to_a_ten_thousandth():
    plan = {"delta": 1e-5, "noise_multiplier": 100.0, "sample_rate": 1.0}
    steps = affordable_steps(target_epsilon=50.0, **plan)
    assert epsilon_pld([Release(100.0, 1.0, steps)], delta=1e-5) <= 50.0
    assert epsilon_pld([Release(100.0, 1.0, int(steps * 1.0002))], delta=1e-5) > 50.0
