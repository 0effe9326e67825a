from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from lightning_secure.privacy.auditing.bounds import (
    best_threshold,
    epsilon_gaussian,
    epsilon_of_rates,
    epsilon_one_run,
    mu_of_rates,
    p_value_one_run,
    rates,
)


def test_rates_are_those_of_clopper_and_pearson():
    low, high = rates(7, 20, 3, 30, alpha=0.1)
    test = scipy.stats.binomtest
    assert low == pytest.approx(test(7, 20, alternative="greater").proportion_ci(0.95).low)
    assert high == pytest.approx(test(3, 30, alternative="less").proportion_ci(0.95).high)
    assert rates(0, 20, 30, 30, alpha=0.1) == (0.0, 1.0)


def test_rates_cover_what_they_promise():
    rng = np.random.default_rng(0)
    low, high = rates(
        rng.binomial(50, 0.6, 20_000), 50, rng.binomial(50, 0.1, 20_000), 50, alpha=0.1
    )
    assert np.mean(low > 0.6) < 0.05
    assert np.mean(high < 0.1) < 0.05


def test_an_epsilon_is_that_of_randomised_response():
    truth = math.e / (1 + math.e)
    assert epsilon_of_rates(truth, 1 - truth, delta=0) == pytest.approx(1.0)
    # Rare alarms, and turned around rare misses.
    assert epsilon_of_rates(0.2 * math.e, 0.2, delta=0) == pytest.approx(1.0)
    assert epsilon_of_rates(0.8, 1 - 0.2 * math.e, delta=0) == pytest.approx(1.0)
    assert epsilon_of_rates(0.3, 0.3, delta=1e-5) == 0
    assert epsilon_of_rates(0.2, 0.4, delta=1e-5) == 0


def test_no_rates_of_a_gaussian_mechanism_show_more_than_its_epsilon():
    thresholds = np.linspace(-2, 6, 2001)  # where no rate is rounded to one
    normal = scipy.stats.norm
    for mu in (0.3, 1.0, 1.5):
        tpr, fpr = normal.sf(thresholds - mu), normal.sf(thresholds)
        epsilon = epsilon_gaussian(mu, delta=1e-5)
        shown = epsilon_of_rates(tpr, fpr, delta=1e-5)
        assert shown.max() <= epsilon + 1e-9
        assert shown.max() == pytest.approx(epsilon, rel=2e-3)
        assert mu_of_rates(tpr[700], fpr[700]) == pytest.approx(mu)


@pytest.mark.parametrize("mu", [0.01, 0.5, 5.0, 60.0, 2000.0])
def test_a_gaussian_epsilon_has_its_delta(mu):
    epsilon = epsilon_gaussian(mu, delta=1e-6)
    log_ndtr = scipy.stats.norm.logcdf
    first = log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    delta = math.exp(first) - math.exp(second)
    assert delta == pytest.approx(1e-6, rel=1e-2)


def test_nothing_shown_is_an_epsilon_of_nothing():
    assert epsilon_gaussian(0.0, delta=1e-5) == 0
    assert epsilon_gaussian(1e-6, delta=1e-5) == 0


def test_the_best_threshold_is_found_among_the_scores():
    members, others = np.array([2.0, 3.0, 4.0]), np.array([0.0, 1.0])
    assert best_threshold(members, others, by=lambda hits, alarms: hits - alarms) == 2.0


def reference_p_value(m, r, v, eps, delta):
    """Appendix D of Steinke et al. 2023, as printed."""
    q = 1 / (1 + math.exp(-eps))
    beta = scipy.stats.binom.sf(v - 1, r, q)
    alpha = total = 0.0
    for i in range(1, v + 1):
        total += scipy.stats.binom.pmf(v - i, r, q)
        alpha = max(alpha, total / i)
    return min(beta + alpha * delta * 2 * m, 1)


@pytest.mark.parametrize(
    ("m", "r", "v", "epsilon", "delta"),
    [(1000, 100, 100, 3.0, 1e-5), (1000, 500, 400, 1.0, 1e-5), (50, 20, 0, 1.0, 1e-3)],
)
def test_the_p_value_is_that_of_the_paper(m, r, v, epsilon, delta):
    ours = p_value_one_run(canaries=m, guesses=r, right=v, epsilon=epsilon, delta=delta)
    assert ours == pytest.approx(reference_p_value(m, r, v, epsilon, delta))


def test_a_run_that_is_private_is_rarely_refuted():
    # Randomised response answers each canary truly as often as epsilon allows, and no oftener.
    rng = np.random.default_rng(1)
    right = rng.binomial(200, math.e / (1 + math.e), 100)
    bounds = [
        epsilon_one_run(canaries=200, guesses=200, right=int(v), delta=1e-6, alpha=0.05)
        for v in right
    ]
    assert np.mean(np.array(bounds) > 1.0) < 0.1
    assert np.median(bounds) > 0.5


def test_guessing_says_nothing():
    assert epsilon_one_run(canaries=200, guesses=200, right=100, delta=1e-6, alpha=0.05) == 0
