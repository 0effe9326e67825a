"""Tensors in RAM, as tutorials feed them: what a DataLoader costs where nothing is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from loading.serving import Cell, Epoch, serve


class Ram:
    """``TensorDataset`` under torch's DataLoader.

    Variant ``rows`` takes a row at a time and stacks them, which is the DataLoader's default;
    ``batches`` takes a whole batch by its indices (``batch_size=None`` with a ``BatchSampler``, as
    torch's documentation has it), which is the fastest that a DataLoader does.
    """

    packages = ("torch", "numpy")

    def prepare(self, cell: Cell) -> None:
        """Store nothing."""

    def open(self, cell: Cell) -> Epoch:
        x, y, order = cell.rows()
        tensors = TensorDataset(torch.from_numpy(x.copy()), torch.from_numpy(y))
        batch = cell.size.batch
        sampler: Sampler[int] = SequentialSampler(tensors)
        if cell.mode == "shuffled":
            sampler = RandomSampler(tensors)
        elif cell.mode == "random":
            sampler, batch = Listed(order.tolist()), cell.size.random_batch
        workers: dict[str, Any] = {
            "num_workers": cell.workers,
            "persistent_workers": cell.workers > 0,
        }
        if cell.variant == "rows":
            loader = DataLoader(tensors, batch_size=batch, sampler=sampler, **workers)
        else:
            batches = BatchSampler(sampler, batch, drop_last=False)
            loader = DataLoader(tensors, batch_size=None, sampler=batches, **workers)
        return lambda number: loader


class Listed(Sampler[int]):
    """Rows in a given order."""

    def __init__(self, order: list[int]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Ram())
