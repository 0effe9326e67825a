from __future__ import annotations

import copy
import math
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from scipy import stats

from lightning_secure.crypto.keystream import Keystream
from lightning_secure.errors import ConfigError
from lightning_secure.privacy.noise import gaussian as module
from lightning_secure.privacy.noise.gaussian import GaussianNoise, normals, secure_normals

KEY = bytes(range(32))


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


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_does_not_repeat_the_noise(duplicate, secure):
    source = GaussianNoise(secure=secure)
    source.add_(torch.zeros(1), std=1.0)
    other = duplicate(source)
    a, b = source.add_(torch.zeros(5), std=1.0), other.add_(torch.zeros(5), std=1.0)
    assert not torch.equal(a, b)


def test_double_precision_gets_noise_in_double_precision():
    noise = GaussianNoise(seed=1).add_(torch.zeros(10, dtype=torch.float64), std=1.0)
    assert not torch.equal(noise, noise.float().double())


@pytest.mark.parametrize("secure", [False, True])
def test_a_fork_does_not_repeat_the_noise(secure, in_fork):
    source = GaussianNoise(secure=secure)
    source.add_(torch.zeros(1), std=1.0)  # some numbers are ready for the next call
    drawn = in_fork(lambda: source.add_(torch.zeros(5), std=1.0).numpy().tobytes())
    theirs = np.frombuffer(drawn, np.float32)
    ours = source.add_(torch.zeros(5), std=1.0)
    assert len(theirs) == 5
    assert not set(theirs.tolist()) & set(ours.tolist())


@pytest.mark.parametrize("secure", [False, True])
def test_no_number_is_used_twice(secure, monkeypatch):
    # Blocks so small that their ends are met.
    monkeypatch.setattr(module, "_LARGEST", 64)
    monkeypatch.setattr(module, "_SMALLEST", 8)
    source = GaussianNoise(secure=secure)
    shapes = [(), (1,), (7,), (3, 5), (200,), (64,), (0,), (65,), (2,)] * 3
    drawn = torch.cat(
        [source.add_(torch.zeros(s, dtype=torch.float64), std=1.0).flatten() for s in shapes]
    )
    assert len(drawn.unique()) == len(drawn) == 3 * (1 + 1 + 7 + 15 + 200 + 64 + 65 + 2)


@pytest.mark.parametrize("secure", [False, True])
def test_every_element_gets_noise_wherever_it_lies(secure):
    base = torch.zeros(6, 4)
    tensor = base.t()[:, ::2]
    assert GaussianNoise(secure=secure).add_(tensor, std=1.0) is tensor
    assert (base != 0).sum() == 12
    assert (base[1::2] == 0).all()


def test_noise_is_what_the_keystream_says():
    """Box and Muller's formula, by another library, from the bytes of a known key."""
    pairs = 1000
    bits = Keystream(KEY).read(16 * pairs)
    words = np.frombuffer(bits, np.uint64)
    uniform = ((words[:pairs] >> np.uint64(11)) + 0.5) / 2**53
    radius = np.sqrt(-2 * np.log(uniform))
    angle = words[pairs:].view(np.int64) * (math.pi / 2**63)
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    found = normals(Keystream(KEY), pairs, torch.float64).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_secure_noise_is_four_numbers_each():
    four = normals(Keystream(KEY), 4 * 10, torch.float64).view(2, 4, 10)
    found = secure_normals(Keystream(KEY), 10).view(2, 10)
    for i in range(2):
        expected = (four[i, 0] + four[i, 1] + four[i, 2] + four[i, 3]) / 2
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make", [normals, secure_normals])
def test_the_distribution_is_normal_and_numbers_do_not_depend_on_each_other(make):
    found = make(Keystream(KEY), 60_000, torch.float64).numpy()
    assert stats.kstest(found, "norm").pvalue > 1e-3
    # Squares too: those of a pair, which share a radius, and those of one call after another.
    for lag in (1, 60_000):
        for power in (1, 2):
            a, b = found[:-lag] ** power, found[lag:] ** power
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    # Beyond four standard deviations lie 63 in a million.
    assert 1 <= (abs(found) > 4).sum() <= 25


def test_the_tail_of_single_precision_is_not_cut_off():
    """torch's generator ends at 5.8 standard deviations; a row there would stand out."""

    class Smallest:
        def read(self, count):
            return bytearray(count)

    assert normals(Smallest(), 1, torch.float32)[0] == pytest.approx(9.419, abs=1e-3)
    assert normals(Smallest(), 1, torch.float64)[0] == pytest.approx(8.652, abs=1e-3)

    class Largest:
        def read(self, count):
            return bytearray(b"\xff" * count)

    for dtype in (torch.float32, torch.float64):
        assert torch.isfinite(normals(Largest(), 1, dtype)).all()


def test_secure_noise_is_rounded_once(monkeypatch):
    drawn = torch.tensor([1.0 + 2.0**-30, 0.5], dtype=torch.float64)
    monkeypatch.setattr(module, "secure_normals", lambda *a: drawn.clone())  # values to round
    tensor = torch.tensor([2.0**-24, 1.0])
    GaussianNoise(secure=True).add_(tensor, std=1.0)
    # In single precision the first would be 1 + 2**-24, and round to 1.
    assert tensor.tolist() == [1.0 + 2.0**-23, 1.5]


def test_secure_noise_from_a_seed_is_refused():
    with pytest.raises(ConfigError, match="insecure_seed"):
        GaussianNoise(seed=1, secure=True)
