"""Rows in an order that is shuffled once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class FixedOrderBatchSampler(Sampler[list[int]]):
    """Yields the same batches in the same order in every epoch, each row once.

    Args:
        dataset_size: Number of rows there are.
        steps: Batches an epoch; their sizes differ by one at most.
        seed: Makes the order repeatable, and so not private. By default the operating system's.

    Guarantees:
        From one use of a row to the next it is always ``steps`` batches.

    >>> sampler = FixedOrderBatchSampler(6, steps=3, seed=7)
    >>> list(sampler) == list(sampler)
    True
    >>> sorted(row for batch in sampler for row in batch)
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, dataset_size: int, *, steps: int, seed: int | None = None) -> None:
        rows = np.random.default_rng(seed).permutation(dataset_size)
        self._batches: list[list[int]] = [part.tolist() for part in np.array_split(rows, steps)]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(batch) for batch in self._batches])
