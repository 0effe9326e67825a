from __future__ import annotations

import copy
import pickle

import lightning as L
import pytest
import torch
from scipy import stats

from lightning_secure.privacy.noise import GaussianNoise


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_it_is_gaussian_of_that_width(std):
    noise = GaussianNoise(seed=3).add_(torch.zeros(100_000), std=std)
    assert stats.kstest(noise.numpy() / std, "norm").pvalue > 1e-3


def test_it_is_added_in_place_and_afresh_each_time():
    source = GaussianNoise(seed=1)
    tensor = torch.full((1000,), 5.0)
    assert source.add_(tensor, std=1.0) is tensor
    assert 4.8 < tensor.mean() < 5.2
    again = source.add_(torch.full((1000,), 5.0), std=1.0)
    assert abs(float(torch.corrcoef(torch.stack([tensor, again]))[0, 1])) < 0.15


def test_zero_adds_nothing():
    assert torch.equal(GaussianNoise().add_(torch.ones(3), std=0.0), torch.ones(3))


def test_seed_everything_does_not_decide_the_noise():
    def drawn():
        L.seed_everything(42, verbose=False)
        return GaussianNoise().add_(torch.zeros(5), std=1.0)

    assert not torch.equal(drawn(), drawn())


def test_it_takes_nothing_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    GaussianNoise().add_(torch.zeros(100), std=1.0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_does_not_repeat_the_noise(duplicate):
    source = GaussianNoise()
    source.add_(torch.zeros(1), std=1.0)
    other = duplicate(source)
    a, b = source.add_(torch.zeros(5), std=1.0), other.add_(torch.zeros(5), std=1.0)
    assert not torch.equal(a, b)


def test_double_precision_gets_noise_in_double_precision():
    noise = GaussianNoise(seed=1).add_(torch.zeros(10, dtype=torch.float64), std=1.0)
    assert not torch.equal(noise, noise.float().double())
