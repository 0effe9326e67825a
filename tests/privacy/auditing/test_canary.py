from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lightning_secure.errors import ConfigError, PrivacyError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.auditing import AuditReport, CanaryRun, canary_audit
from lightning_secure.privacy.gradients import clipped_sums
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.sampling import PoissonBatchSampler

CLAIMED = 4.37718  # of one step on all rows with noise of one clipping norm, at delta 1e-5


def audited(canaries=400_000, *, runs=8, noise=1.0, confidence=0.95, **settings):
    run = CanaryRun(canaries, noise_multiplier=noise, delta=1e-5, insecure_seed=1, **settings)
    return canary_audit(
        run,
        canaries=canaries,
        claimed=run.epsilon,
        delta=1e-5,
        runs=runs,
        confidence=confidence,
        gaussian=not settings,
        insecure_seed=2,
    )


def test_correct_code_comes_close_to_its_claim_and_not_above():
    report = audited()
    assert report.claimed == pytest.approx(CLAIMED, rel=1e-4)
    assert 3.0 <= report.lower_bound <= 4.38
    assert 4.2 <= report.lower_bound_gaussian <= 4.38
    assert report.holds
    report.require()


def test_without_clipping_the_claim_is_refuted(monkeypatch, caplog):
    # The weakness itself, put in: what the audit is for.
    monkeypatch.setattr(
        clipped_sums, "clip_factor", lambda norms, max_grad_norm: torch.ones_like(norms)
    )
    report = audited(20_000)
    assert report.largest >= 20
    assert report.lower_bound > CLAIMED, "whatever the mechanism"
    assert not report.holds
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    with pytest.raises(PrivacyError, match="the claim is false"):
        report.require()


# Weaknesses, put in one by one: what the audit is there to see.


def half_the_noise(monkeypatch):
    add = GaussianNoise.add_
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, t, *, std: add(self, t, std=std / 2))


def no_noise(monkeypatch):
    monkeypatch.setattr(GaussianNoise, "add_", lambda self, tensor, *, std: tensor)


def twice_the_norm(monkeypatch):
    clip = clipped_sums.clip_factor
    monkeypatch.setattr(
        clipped_sums,
        "clip_factor",
        lambda n, max_grad_norm: clip(n, max_grad_norm=2 * max_grad_norm),
    )


def steps_forgotten(monkeypatch):
    monkeypatch.setattr(Ledger, "record", lambda self: None)


def rows_drawn_too_often(monkeypatch):
    monkeypatch.setattr(
        PoissonBatchSampler,
        "__iter__",
        lambda self: (list(self._part) for _ in range(self._steps)),
    )


@pytest.mark.parametrize(
    ("weakness", "settings"),
    [
        (half_the_noise, {}),
        (no_noise, {}),
        (twice_the_norm, {}),
        (steps_forgotten, {}),
        (rows_drawn_too_often, {"steps": 4, "expected_batch_size": 2000}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weakness_is_seen(monkeypatch, weakness, settings):
    weakness(monkeypatch)
    report = audited(20_000, **settings)
    assert report.lower_bound > report.claimed


def test_steps_and_draws_are_accounted_for():
    report = audited(20_000, steps=20, expected_batch_size=2000)
    assert 1.0 < report.lower_bound <= report.claimed
    assert report.lower_bound_gaussian is None


def test_by_default_no_two_audits_are_alike():
    runs = [CanaryRun(100, noise_multiplier=1.0, delta=1e-5) for _ in range(2)]
    everybody = np.ones(100, bool)
    assert not np.array_equal(runs[0](everybody), runs[1](everybody))
    assert not np.array_equal(runs[0](everybody), runs[0](everybody))


def test_a_score_that_is_no_number_tells_its_canary():
    def overflowing(included):
        return np.where(included, np.nan, 0.0)

    report = canary_audit(overflowing, canaries=1000, claimed=1.0, delta=1e-5)
    assert not report.holds


def test_what_cannot_be_audited_is_refused():
    settings = {"canaries": 10, "claimed": 1.0, "delta": 1e-5}
    with pytest.raises(ConfigError, match="runs must be at least 2"):
        canary_audit(lambda included: included, **settings, runs=1)
    with pytest.raises(ConfigError, match=r"scores of shape \(3,\)"):
        canary_audit(lambda included: np.zeros(3), **settings)
    with pytest.raises(ConfigError, match="more than the 10 canaries"):
        CanaryRun(10, noise_multiplier=1.0, delta=1e-5, expected_batch_size=11)
    with pytest.raises(ConfigError, match="confidence"):
        canary_audit(lambda included: included, **settings, confidence=1.0)


def test_a_run_without_canaries_among_its_rows_is_noise():
    scores = CanaryRun(1000, noise_multiplier=3.0, delta=1e-5, insecure_seed=1)(
        np.zeros(1000, bool)
    )
    assert abs(scores.mean()) < 0.5
    assert scores.std() == pytest.approx(3.0, rel=0.1)


def test_a_bound_that_is_no_number_does_not_hold():
    report = AuditReport(
        method="canary",
        lower_bound=float("nan"),
        claimed=1.0,
        delta=1e-5,
        confidence=0.95,
        trials=1,
    )
    assert not report.holds
