from __future__ import annotations

import dataclasses

import pytest

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.config import DPConfig

GOOD = {"target_epsilon": 3.0, "delta": 1e-5, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 0},
        {"delta": 1.0},
        {"delta": -1e-5},
        {"delta": float("nan")},
        {"delta": "1e-5"},
        {"delta": True},
        {"max_grad_norm": 0.0},
        {"max_grad_norm": -1},
        {"max_grad_norm": float("inf")},
        {"target_epsilon": 0},
        {"target_epsilon": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"expected_batch_size": 0},
        {"expected_batch_size": 1.5},
        {"expected_batch_size": True},
        {"max_physical_batch_size": 0},
        {"public_dataset_size": -3},
        {"planned_epochs": 0},
        {"insecure_noise_off": True},
        {"loss_scale": 0.0},
        {"loss_scale": 1000.0},
        {"secure_noise": True, "insecure_seed": 1},
    ],
)
def test_a_wrong_value_is_refused_by_name(change):
    with pytest.raises(ConfigError) as caught:
        DPConfig(**{**GOOD, **change})
    assert any(name in str(caught.value) for name in (*change, "target_epsilon"))


def test_it_is_frozen_and_keyword_only():
    config = DPConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.delta = 0.1
    with pytest.raises(TypeError):
        DPConfig(1e-5, 1.0)


def test_what_breaks_the_promise_is_named():
    assert DPConfig(**GOOD).insecure == ()
    off = DPConfig(delta=1e-5, max_grad_norm=1.0, insecure_noise_off=True, insecure_seed=1)
    assert off.insecure == ("insecure_seed", "insecure_noise_off")
