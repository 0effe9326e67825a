from __future__ import annotations

import math

import pytest
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant

from lightning_secure.errors import ConfigError, PrivacyError
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.opacus import epsilon_by_opacus
from lightning_secure.privacy.accounting.pld import (
    ACCOUNTANTS,
    BOUNDS,
    affordable_steps,
    calibrate_noise,
    epsilon_by,
    epsilon_pld,
)
from lightning_secure.privacy.config import DPConfig

OURS = [Release(1.0, 0.01, 400), Release(1.0, 0.01, 600)]
KINDS = {"opacus-prv": PRVAccountant, "opacus-rdp": RDPAccountant, "opacus-gdp": GaussianAccountant}


@pytest.mark.filterwarnings("ignore:GDP accounting is experimental:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_it_is_what_opacus_reports(name):
    opacus = KINDS[name]()
    for _ in range(1000):
        opacus.step(noise_multiplier=1.0, sample_rate=0.01)
    assert epsilon_by(name, OURS, delta=1e-5) == opacus.get_epsilon(delta=1e-5)


def test_which_of_them_bound_epsilon():
    """Opacus' GDP lies below what a tight accountant shows, so no budget is kept by it."""
    truth = epsilon_pld(OURS, delta=1e-5)
    for name in ACCOUNTANTS:
        bounds = epsilon_by(name, OURS, delta=1e-5) >= truth * (1 - 1e-6)
        assert bounds == (name in BOUNDS), name


def test_the_exact_epsilon_counts_where_opacus_rounds_below_it():
    release = [Release(300.0, 1.0, 10_000)]
    alone = epsilon_by_opacus("opacus-prv", release, delta=1e-13)
    assert alone < 2.3 < 2.3622  # which is exact
    assert epsilon_by("opacus-prv", release, delta=1e-13) >= 2.3622


@pytest.mark.parametrize("name", ACCOUNTANTS)
def test_nothing_costs_nothing_and_no_noise_everything(name):
    assert epsilon_by(name, [], delta=1e-5) == 0
    assert epsilon_by(name, [Release(0.0, 0.1, 1)], delta=1e-5) == math.inf


def test_steps_of_several_kinds():
    mixed = [*OURS, Release(2.0, 0.02, 100)]
    for name in BOUNDS:
        assert epsilon_by(name, mixed, delta=1e-5) > epsilon_by(name, OURS, delta=1e-5)
    with pytest.raises(PrivacyError, match="the ledger itself is intact"):
        epsilon_by("opacus-gdp", mixed, delta=1e-5)


def test_what_opacus_cannot_answer_is_an_error_of_ours():
    with pytest.raises(PrivacyError, match="has no answer"):
        epsilon_by("opacus-gdp", [Release(0.01, 1.0, 10_000)], delta=1e-5)


@pytest.mark.parametrize("name", ["opacus-rdp", "opacus-prv", "rdp"])
def test_a_budget_is_kept_by_the_chosen_one(name):
    plan = {"target_epsilon": 2.0, "delta": 1e-5, "sample_rate": 0.02, "accountant": name}
    noise = calibrate_noise(**plan, steps=200)
    assert 2.0 * (1 - 1e-3) <= epsilon_by(name, [Release(noise, 0.02, 200)], delta=1e-5) <= 2.0
    assert affordable_steps(**plan, noise_multiplier=noise) in (200, 201)


def test_a_budget_is_not_kept_by_an_approximation():
    plan = {"target_epsilon": 2.0, "delta": 1e-5, "sample_rate": 0.02, "accountant": "opacus-gdp"}
    for refused in (
        lambda: calibrate_noise(**plan, steps=200),
        lambda: affordable_steps(**plan, noise_multiplier=1.0),
        lambda: DPConfig(delta=1e-5, max_grad_norm=1.0, target_epsilon=1, accountant="opacus-gdp"),
    ):
        with pytest.raises(ConfigError, match="can lie below the true one"):
            refused()
    with pytest.raises(ConfigError, match="must be one of pld, rdp"):
        DPConfig(delta=1e-5, max_grad_norm=1.0, target_epsilon=1, accountant="moments")
