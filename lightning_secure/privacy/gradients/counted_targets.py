"""Means of ``cross_entropy`` and ``nll_loss`` that depend on no other row's targets.

torch divides their mean by the number of targets that are not ignored, or by the sum of those
targets' class weights. Both count the targets of all rows that were drawn, so one row of padding,
or of a heavy class, changes the gradients of all others. While a chunk goes forward and backward,
such a mean is another one: of each row over its own counted targets, and then over rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import _reduction

from lightning_secure.compat.torch import FUNCTIONS

#: From input, target, class weights, reduction and ignored index to the loss.
_TORCHS: Final = {name: getattr(FUNCTIONS, name) for name in ("cross_entropy_loss", "nll_loss_nd")}
_MEAN: Final = _reduction.get_enum("mean")
_NONE: Final = _reduction.get_enum("none")
_SUM: Final = _reduction.get_enum("sum")


class CountedMeans:
    """Exchanges the means of ``cross_entropy`` and ``nll_loss`` while a block runs.

    Attributes:
        by_row: Whether the first dimension of each call's targets, flattened or not, runs over the
            rows, as trial runs have shown. Otherwise the sum is divided by the number of targets,
            ignored ones included. So it is where a call in the trial runs has targets that cannot
            be dealt out to the rows evenly, or is compiled.
        calls: How many means were taken of targets that can.
        settled: Whether trial runs have decided ``by_row``.
    """

    def __init__(self) -> None:
        self.by_row = False
        self.calls = 0
        self.settled = False
        self._rows = 1
        self._kept: int | None = None
        self._exchanged = {name: partial(self._loss, torchs) for name, torchs in _TORCHS.items()}

    @contextlib.contextmanager
    def applied(self, rows: int | None) -> Iterator[None]:
        """Exchange the means of what runs in the block, in any thread.

        Args:
            rows: Rows of the chunk; None if they are not known.

        Backward passes belong into the block as well: what is checkpointed runs again in them.
        """
        self._rows = rows or 0
        before = {name: getattr(FUNCTIONS, name) for name in _TORCHS}
        try:
            for name, function in self._exchanged.items():
                setattr(FUNCTIONS, name, function)
            yield
        finally:
            for name, function in before.items():
                setattr(FUNCTIONS, name, function)

    @contextlib.contextmanager
    def ignoring_all_but(self, row: int) -> Iterator[None]:
        """Have every second target of all rows but one ignored, to see whose mean that changes."""
        self._kept = row
        try:
            yield
        finally:
            self._kept = None

    def _loss(
        self,
        torchs: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: int = _MEAN,
        ignore_index: int = -100,
        *smoothing: float,
    ) -> Tensor:
        # Probabilities in place of classes are divided by their number already.
        if reduction != _MEAN or target.is_floating_point():
            result: Tensor = torchs(input, target, weight, reduction, ignore_index, *smoothing)
            return result
        rows, number = self._rows, target.numel()
        # In what is compiled the number of rows would be a constant; that of targets is not.
        if rows == 0 or torch.compiler.is_compiling() or number == 0 or number % rows:
            # Later it must not be: what rows have shown would decide about all steps that follow.
            self.by_row = self.by_row and self.settled
            total: Tensor = torchs(input, target, weight, _SUM, ignore_index, *smoothing)
            return total / max(number, 1)
        self.calls += 1
        if self._kept is not None:
            target = _ignored(target, rows, self._kept, ignore_index)
        if number == rows or not self.by_row:
            total = torchs(input, target, weight, _SUM, ignore_index, *smoothing)
            return total / number
        each: Tensor = torchs(input, target, weight, _NONE, ignore_index, *smoothing)
        counted = (target != ignore_index).reshape(rows, -1).sum(1).clamp_(min=1)
        return (each.reshape(rows, -1).sum(1) / counted).mean()


def _ignored(target: Tensor, rows: int, kept: int, ignore_index: int) -> Tensor:
    places = target.clone().reshape(rows, -1)
    own = places[kept].clone()
    places[:, ::2] = ignore_index
    places[kept] = own
    return places.reshape(target.shape)
