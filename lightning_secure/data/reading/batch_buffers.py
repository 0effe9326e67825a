"""Memory that batches are assembled in, used again once no reference to a batch is left."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_secure.data.format.columns import Column

_SPARE: Final = 3
#: Fewer rows than this, or longer ones, are copied one at a time.
_FEW: Final = 5
_LONG_ROW_BYTES: Final = 65536

Ints = npt.NDArray[np.int64]


class Buffers:
    """Lends memory for tensors, and takes it back when the last of them is gone.

    Args:
        pin: Lend page-locked memory, for copies to a CUDA device. Torch has a ring of its own for
            it, which also waits for copies under way.
        spare: How many returned pieces are kept for each column.

    Guarantees:
        Memory is lent again only after every tensor, view and numpy array over it was collected:
        a batch that a user keeps is never overwritten.
    """

    def __init__(self, *, pin: bool = False, spare: int = _SPARE) -> None:
        self._pin = pin
        self._spare: defaultdict[str, deque[npt.NDArray[np.uint8]]] = defaultdict(
            partial(deque, maxlen=spare)
        )

    def lend(self, name: str, length: int) -> tuple[Tensor, npt.NDArray[np.uint8]]:
        """Lend memory for one column.

        Args:
            name: The column's. Memory is used again for the same column, where it fits.
            length: In bytes.

        Returns:
            A tensor to hand out, and an array to write through. The array does not keep the memory
            lent; hold the tensor as long as something is written.
        """
        if self._pin:
            pinned = torch.empty(length, dtype=torch.uint8, pin_memory=True)
            return pinned, pinned.numpy()
        spare = self._spare[name]
        try:
            memory = spare.popleft()
        except IndexError:
            memory = np.empty(0, dtype=np.uint8)
        if len(memory) < length:
            memory = np.empty(length, dtype=np.uint8)
        # The tensor's storage keeps this very array alive, and nothing else does.
        lent = memory[:length]
        weakref.finalize(lent, spare.append, memory).atexit = False
        return torch.from_numpy(lent), memory[:length]


class Rows:
    """Rows under assembly, column by column.

    Args:
        columns: The columns.
        count: How many rows.
        buffers: Where tensors come from.

    Attributes:
        values: By name: a tensor of shape ``(count, *shape)``, or a list. To hand out.
    """

    def __init__(self, columns: Sequence[Column], count: int, buffers: Buffers) -> None:
        self.values: dict[str, Any] = {}
        self._sinks: dict[str, tuple[int, memoryview, npt.NDArray[Any]]] = {}
        for column in columns:
            if column.kind != "tensor":
                self.values[column.name] = [None] * count
                continue
            some = max(1, count)  # torch cannot change the type of nothing
            tensor, memory = buffers.lend(column.name, some * column.item_bytes)
            rows = tensor.view(column.torch_dtype).view(some, *column.shape)
            self.values[column.name] = rows if count else rows[:0]
            by_row = memory.view(_row_type(column.item_bytes))
            self._sinks[column.name] = column.item_bytes, memory.data, by_row

    def span(self, name: str, target: int, until: int, length: int) -> memoryview | None:
        """Return ``length`` bytes from a row's place on, unless they reach to row ``until``."""
        item_bytes, sink, _ = self._sinks[name]
        start = target * item_bytes
        return sink[start : start + length] if start + length <= until * item_bytes else None

    def put(
        self,
        columns: Iterable[tuple[str, int]],
        targets: Ints,
        plaintext: memoryview | npt.NDArray[np.uint8],
        records: int,
        sources: Ints | None = None,
    ) -> None:
        """Copy rows of tensor columns.

        Args:
            columns: Names, and where in ``plaintext`` their rows begin, one after another.
            targets: Where the rows go.
            plaintext: Holds the columns.
            records: How many rows it holds.
            sources: Which of them are meant, as many as targets. All by default.
        """
        few: list[tuple[int, int]] | None = None
        for name, offset in columns:
            length, sink, by_row = self._sinks[name]
            if len(targets) >= _FEW and length < _LONG_ROW_BYTES:
                rows = np.ndarray((records,), by_row.dtype, plaintext, offset)
                by_row[targets] = rows if sources is None else rows[sources]
                continue
            if few is None:
                numbers = range(records) if sources is None else sources.tolist()
                few = list(zip(numbers, targets.tolist(), strict=True))
                view = plaintext if isinstance(plaintext, memoryview) else plaintext.data
            for row, target in few:
                start, place = offset + row * length, target * length
                sink[place : place + length] = view[start : start + length]

    def gather(
        self,
        columns: Iterable[tuple[str, int]],
        targets: Ints,
        plaintext: memoryview,
        length: int,
        records: int,
        segments: Ints,
        sources: Ints,
    ) -> None:
        """Copy rows of tensor columns out of several segments that are alike.

        Args:
            columns: Names, and where in each segment their rows begin, one after another.
            targets: Where the rows go.
            plaintext: Holds the segments, one after another.
            length: Of one segment, in bytes.
            records: How many rows a segment holds.
            segments: In which of them each row lies, as many as targets.
            sources: Which row of that it is.
        """
        shape = len(plaintext) // length, records
        for name, offset in columns:
            item_bytes, _, by_row = self._sinks[name]
            strides = length, item_bytes
            rows = np.ndarray(shape, by_row.dtype, plaintext, offset, strides)
            by_row[targets] = rows[segments, sources]

    def put_values(self, name: str, targets: Ints, source: Sequence[Any]) -> None:
        """Put values of a column of variable length at ``targets``."""
        values = self.values[name]
        for target, value in zip(targets.tolist(), source, strict=True):
            # A view would keep the whole segment in memory for one row.
            values[target] = value.clone() if isinstance(value, Tensor) else value


@functools.cache
def _row_type(item_bytes: int) -> np.dtype[np.void]:
    return np.dtype((np.void, item_bytes))
