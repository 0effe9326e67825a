from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.privacy.sampling import (
    Chunk,
    LogicalBatch,
    LogicalCollate,
    PoissonBatchSampler,
    poisson_draw,
)


@pytest.mark.parametrize(
    ("size", "rate"), [(500, 0.03), (300, 0.4), (50, 0.9), (40, 1.0), (7, 0.5)]
)
def test_each_row_is_drawn_at_the_rate(size, rate):
    rng = np.random.default_rng(11)
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
    rng = np.random.default_rng(1)
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


def test_a_draw_is_split_into_chunks():
    collate = LogicalCollate(torch.stack, max_physical_batch_size=3)
    batch = collate([torch.tensor(i) for i in range(8)])
    assert [chunk.data.tolist() for chunk in batch.chunks] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [chunk.size for chunk in batch.chunks] == [3, 3, 2]
    assert batch.size == 8
    assert collate([]).chunks == ()


def test_pinning_reaches_the_tensors(monkeypatch):
    """Without a GPU nothing can be pinned; that the DataLoader's way in is there can be seen."""
    seen = []
    from torch.utils.data._utils import pin_memory

    monkeypatch.setattr(pin_memory, "pin_memory", lambda data: seen.append(data) or data)
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
    assert sum(batch.size for batch in loader) > 10
