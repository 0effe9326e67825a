"""The schedule of repeated trial rows: in steps 2, 4, 8, ..., and in steps unlike those before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lightning_secure.privacy.checks.batch_rows import leaves
from lightning_secure.privacy.checks.loss_graph import LossGraph, loss_graph, require_linear

#: Of the time since the first step.
_SHARE: Final = 0.02
#: Trials of steps unlike those before that run whatever time they take.
_FREE: Final = 8
_SLOPES: Final = 16  # that are remembered for each way through the model
_WAYS: Final = 256
_LARGEST: Final = 1 << 16  # numbers of a tensor that is looked through in each step
_STEP: Final = "This step was not taken."

Slopes = tuple[tuple[float, float], ...]


class Repeats:
    """Looks at the loss of every chunk, and says when trial rows are due again.

    Args:
        clock: Seconds.

    They are due in steps 2, 4, 8 and so on; where layers or operations between the rows' means
    and the loss are others, or the loss has another slope at these means, as when a penalty sets
    in or a step is skipped; and where whole numbers of the batch leave the range they had, or rows
    that were alike are not any more, as when the first target is left out.

    Those of powers of two always run, and so do the first eight of the others. More of these run
    if all trials together would take at most a fiftieth of the time since the first step. Until
    then they stay due.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._free = _FREE
        self._spent = 0.0
        self._last = 0.0
        self._step = 0
        self._turn = self._due = False
        self._known: dict[object, list[Slopes]] = {}
        self._leaves: list[tuple[float, float] | bool] | None = None

    def begin(self) -> None:
        """Begin to count the time, after the first trials."""
        self._start = self._clock()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Measure trials that run again."""
        start = self._clock()
        try:
            yield
        finally:
            self._last = self._clock() - start
            self._spent += self._last
            if not self._turn:
                self._free -= 1
            self._turn = self._due = False

    def begin_step(self) -> None:
        """Count a step."""
        self._step += 1
        self._turn = self._turn or (self._step > 1 and self._step & (self._step - 1) == 0)

    def look(self, loss: Tensor, rows: int) -> LossGraph | None:
        """Look at a chunk's loss, before it goes backward.

        Returns:
            What is to be handed to :meth:`note` afterwards; None where one row is alone.

        Raises:
            UnsupportedModelError: if the loss is not linear in the means over the rows.
        """
        if rows < 2:
            return None
        graph = loss_graph(loss, rows)
        require_linear(graph.fault, outcome=_STEP)
        graph.watch()
        return graph

    def note(
        self, graph: LossGraph | None, batch: Any, *, rows: int, layers: Sequence[object]
    ) -> bool:
        """Note how a chunk went, and return whether trial rows are to run now.

        Args:
            graph: Of its loss, which went backward.
            batch: As it was collated.
            rows: Of the batch.
            layers: Those that it went through, in this order.
        """
        if graph is None:
            return False
        way = tuple(layers), graph.structure
        if self._bent(way, tuple((slope, slope / rows) for slope in graph.taken())):
            self._due = True
        if self._unlike(batch, rows):
            self._due = True
        share = _SHARE * (self._clock() - self._start)
        fits = self._free > 0 or self._spent + self._last <= share
        return self._turn or (self._due and fits)

    def _bent(self, way: object, slopes: Slopes) -> bool:
        """Return whether the loss has not yet had this slope, of a mean or of a sum."""
        first, known = not self._known, self._known.setdefault(way, [])
        if any(_alike(slopes, others) for others in known):
            return False
        known.append(slopes)
        del known[:-_SLOPES]
        for old in list(self._known)[:-_WAYS]:
            del self._known[old]
        return not first

    def _unlike(self, batch: Any, rows: int) -> bool:
        """Return whether there are numbers in a batch that no batch before had."""
        tensors = [leaf for leaf in leaves(batch, rows) if isinstance(leaf, Tensor)]
        if self._leaves is None or len(self._leaves) != len(tensors):
            first, self._leaves = self._leaves is None, [_seen(t, None) for t in tensors]
            return not first
        found = [_seen(t, known) for t, known in zip(tensors, self._leaves, strict=True)]
        unlike, self._leaves = found != self._leaves, found
        return unlike


def _alike(one: Slopes, other: Slopes) -> bool:
    """Return whether slopes are the same, or the same for each row, up to rounding."""
    return one == other or (
        len(one) == len(other)
        and all(
            any(a == b or abs(a - b) <= 1e-5 * abs(b) for a, b in zip(x, y, strict=True))
            for x, y in zip(one, other, strict=True)
        )
    )


def _seen(tensor: Tensor, known: tuple[float, float] | bool | None) -> tuple[float, float] | bool:
    """Return the range that whole numbers have had, or whether rows of real ones were all alike."""
    if tensor.numel() > _LARGEST or tensor.is_complex() or known is False:
        return False
    if tensor.is_floating_point():
        return torch.equal(tensor, tensor[:1].expand_as(tensor))
    ends = (tensor.byte() if tensor.dtype is torch.bool else tensor).aminmax()
    low, high = float(ends[0]), float(ends[1])
    return (min(low, known[0]), max(high, known[1])) if isinstance(known, tuple) else (low, high)
