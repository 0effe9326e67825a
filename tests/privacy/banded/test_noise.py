from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_secure.errors import BudgetExhaustedError, PrivacyError
from lightning_secure.privacy.noise.banded.matrix import diagonals, sensitivity
from lightning_secure.privacy.noise.banded.noise import BandedNoise
from lightning_secure.privacy.noise.banded.order import FixedOrderBatchSampler
from lightning_secure.privacy.noise.banded.planned import Planned
from lightning_secure.privacy.noise.gaussian import GaussianNoise

STEPS, BANDS = 9, 3
PARAMETERS = [nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(7))]


def banded(seed=5):
    return BandedNoise(GaussianNoise(seed), bands=BANDS, steps=STEPS, separation=4)


def step(noise, *, std=2.0, parameters=PARAMETERS, dtype=torch.float64):
    noise.begin_step(parameters)
    return [noise.add_(torch.ones(p.shape, dtype=dtype), std=std) for p in parameters]


def test_it_is_the_inverse_matrix_times_independent_noise():
    source, noise = GaussianNoise(5), banded()
    found = [step(noise) for _ in range(STEPS)]
    own = [
        [source.add_(torch.zeros(p.shape, dtype=torch.float64), std=1.0) for p in PARAMETERS]
        for _ in range(STEPS)
    ]
    matrix = sum(c * np.eye(STEPS, k=-i) for i, c in enumerate(diagonals(BANDS)))
    width = 2.0 * sensitivity(diagonals(BANDS), steps=STEPS, separation=4)
    for index in range(len(PARAMETERS)):
        independent = np.stack([row[index].numpy().ravel() for row in own])
        ours = np.stack([row[index].numpy().ravel() for row in found]) - 1.0
        np.testing.assert_allclose(
            ours, width * np.linalg.solve(matrix, independent), rtol=1e-9, atol=1e-12
        )


def test_secure_noise_is_rounded_once_where_it_is_added():
    noise = BandedNoise(
        GaussianNoise(secure=True), bands=2, steps=2, separation=2, dtype=torch.float64
    )
    for _ in range(2):
        assert step(noise, dtype=torch.float32)[0].dtype == torch.float32
    assert {tensor.dtype for past in noise._past for tensor in past} == {torch.float64}


def test_there_is_no_noise_for_a_step_too_many():
    noise = banded()
    for _ in range(STEPS):
        step(noise)
    with pytest.raises(PrivacyError, match="covers no further step"):
        step(noise)


def test_noise_of_one_parameter_is_not_taken_back_from_another():
    noise = banded()
    step(noise)
    with pytest.raises(PrivacyError, match="parameters are not those"):
        step(noise, parameters=PARAMETERS[::-1])
    with pytest.raises(PrivacyError, match="parameters are not those"):
        step(noise, parameters=PARAMETERS[:1])
    noise = banded()
    noise.begin_step(PARAMETERS)
    noise.add_(torch.zeros(4, 5), std=1.0)
    with pytest.raises(PrivacyError, match="broke off"):
        noise.begin_step(PARAMETERS)


def test_its_width_cannot_change_on_the_way():
    noise = banded()
    step(noise)
    with pytest.raises(PrivacyError, match="cannot change"):
        step(noise, std=1.0)
    noise = banded()
    step(noise)
    with pytest.raises(PrivacyError, match="cannot change"):
        noise.add_(torch.zeros(3), std=2.0)


def test_without_a_width_there_is_none():
    assert step(banded(), std=0)[0].eq(1).all()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_will_be_taken_back_leaves_the_process_in_no_copy(copied):
    noise = banded()
    step(noise)
    with pytest.raises(PrivacyError, match="take it off"):
        copied(noise)


def test_rows_keep_their_order_and_distance():
    sampler = FixedOrderBatchSampler(10, steps=4)
    first, second = list(sampler), list(sampler)
    assert first == second
    assert len(sampler) == len(first) == 4
    assert sorted(row for batch in first for row in batch) == list(range(10))
    assert {len(batch) for batch in first} == {2, 3}
    assert list(FixedOrderBatchSampler(10**4, steps=4)) != list(
        FixedOrderBatchSampler(10**4, steps=4)
    )
    assert list(FixedOrderBatchSampler(10, steps=4, seed=1)) == list(
        FixedOrderBatchSampler(10, steps=4, seed=1)
    )


def test_a_plan_is_charged_once_and_has_an_end():
    plan = Planned(2)
    assert plan.goes_on() is None
    assert plan.take()
    assert plan.goes_on() is True
    assert not plan.take()
    assert plan.goes_on() is False
    with pytest.raises(BudgetExhaustedError, match="charged anew"):
        plan.take()
    assert Planned().goes_on() is False
    with pytest.raises(BudgetExhaustedError):
        Planned().take()
