from __future__ import annotations

import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.crypto.keystream import Keystream
from lightning_secure.errors import ConfigError
from lightning_secure.privacy import sampling
from lightning_secure.privacy.sampling import (
    Chunk,
    LogicalBatch,
    LogicalCollate,
    PoissonBatchSampler,
    SecureGaps,
    poisson_draw,
)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    ("size", "rate"), [(500, 0.03), (300, 0.4), (50, 0.9), (40, 1.0), (7, 0.5)]
)
def test_each_row_is_drawn_at_the_rate(size, rate, secure):
    rng = SecureGaps(Keystream(bytes(32))) if secure else np.random.default_rng(11)
    draws = [poisson_draw(size, rate, rng) for _ in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=size)
    assert len(counts) == size
    # Binomial for every row; the sum of squared scores is chi-squared.
    if rate == 1.0:
        assert (counts == 2000).all()
        return
    scores = (counts - 2000 * rate) / np.sqrt(2000 * rate * (1 - rate))
    assert stats.chi2.cdf((scores**2).sum(), size) < 0.9999
    sizes = np.array([len(draw) for draw in draws])
    spread = sizes.var() / (size * rate * (1 - rate))
    assert 0.85 < spread < 1.15  # binomial, and not of one size


def test_rows_are_drawn_independently():
    rng = np.random.default_rng(5)
    drawn = np.zeros((4000, 20), bool)
    for i in range(4000):
        drawn[i, poisson_draw(20, 0.3, rng)] = True
    correlation = np.corrcoef(drawn.T) - np.eye(20)
    assert np.abs(correlation).max() < 0.08


def test_rows_come_in_order_without_repetition_and_inside_the_dataset():
    for rng in (np.random.default_rng(1), SecureGaps()):
        for size, rate in [(10, 0.99), (1000, 0.001), (3, 1e-9), (1, 0.5), (10**9, 1e-8)]:
            for _ in range(50):
                rows = poisson_draw(size, rate, rng)
                assert (np.diff(rows) > 0).all()
                assert rows.size == 0 or (rows[0] >= 0 and rows[-1] < size)


def test_empty_draws_happen_and_are_draws():
    sampler = PoissonBatchSampler(10, sample_rate=0.01, steps=200, seed=1)
    draws = list(sampler)
    assert len(draws) == len(sampler) == 200
    assert [] in draws


def test_seed_everything_does_not_decide_who_is_drawn():
    def drawn():
        L.seed_everything(42, verbose=False)
        np.random.seed(42)
        random.seed(42)
        return list(PoissonBatchSampler(1000, sample_rate=0.1, steps=3))

    assert drawn() != drawn()


def test_a_seed_repeats_the_draws():
    one, two = (list(PoissonBatchSampler(99, sample_rate=0.3, steps=4, seed=8)) for _ in range(2))
    assert one == two


def test_secure_draws_take_no_seed_and_a_copy_draws_others():
    with pytest.raises(ConfigError, match="insecure_seed"):
        PoissonBatchSampler(9, sample_rate=0.5, steps=1, seed=1, secure=True)
    sampler = PoissonBatchSampler(1000, sample_rate=0.1, steps=1, secure=True)
    draws = [*sampler, *sampler, *pickle.loads(pickle.dumps(sampler))]
    assert len({tuple(draw) for draw in draws}) == 3


def test_gaps_are_those_of_the_inverse_distribution():
    gaps = SecureGaps(Keystream(bytes(32))).geometric(0.2, 20_000)
    counts = np.bincount(gaps, minlength=20)[1:15]
    expected = 20_000 * 0.2 * 0.8 ** np.arange(14)
    assert stats.chi2.cdf(((counts - expected) ** 2 / expected).sum(), 14) < 0.9999
    assert SecureGaps().geometric(1e-300, 3).min() > 10**15


def test_a_draw_is_split_into_chunks():
    collate = LogicalCollate(torch.stack, max_physical_batch_size=3)
    batch = collate([torch.tensor(i) for i in range(8)])
    assert [chunk.data.tolist() for chunk in batch.chunks] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [chunk.size for chunk in batch.chunks] == [3, 3, 2]
    assert not {"size", "__len__"} & set(dir(batch))
    assert collate([]).chunks == ()


def test_pinning_reaches_the_tensors(monkeypatch):
    """Without a GPU nothing can be pinned; that the DataLoader's way in is there can be seen."""
    seen = []
    monkeypatch.setattr(sampling, "pin_memory", lambda data: seen.append(data) or data)
    batch = LogicalBatch((Chunk(2, "a"), Chunk(1, "b")))
    assert batch.pin_memory().chunks == batch.chunks
    assert seen == ["a", "b"]


def test_workers_can_load_logical_batches():
    loader = DataLoader(
        TensorDataset(torch.arange(50)),
        batch_sampler=PoissonBatchSampler(50, sample_rate=0.2, steps=4, seed=0),
        collate_fn=LogicalCollate(torch.utils.data.default_collate, max_physical_batch_size=4),
        num_workers=1,
    )
    assert sum(chunk.size for batch in loader for chunk in batch.chunks) > 10
