"""Rows that are in memory, or come one by one: arrays, tensors, mappings, torch datasets."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lightning_secure.data.format.convert import count_rows
from lightning_secure.data.sources.source import (
    BATCH_BYTES,
    Batch,
    Checksum,
    Source,
    gathered,
    size_of,
)
from lightning_secure.errors import DataError


class ArraySource(Source):
    """Columns that are whole in memory.

    Args:
        columns: Arrays or tensors of shape ``(rows, *shape)``, or sequences, by name.

    Raises:
        DataError: if there is no column, or columns differ in length.

    >>> list(ArraySource({"age": np.array([34, 51])}).batches(1))
    [{'age': array([51])}]
    """

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = dict(columns)
        self._rows = count_rows(self._columns)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._rows

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield slices of the columns."""
        if self._rows == 0:
            return
        width = sum(size_of(values[0]) for values in self._columns.values())
        step = max(1, BATCH_BYTES // max(64, width))
        for first in range(start, self._rows, step):
            yield {name: values[first : first + step] for name, values in self._columns.items()}

    def identity(self) -> str | None:
        """Return a sum of the values, or None if one has no bytes of its own."""
        checksum = Checksum()
        for name, values in self._columns.items():
            checksum.update(b"column", name.encode())
            if not _feed_values(checksum, values):
                return None
        return f"values:{checksum.hexdigest()}"


class RowSource(Source):
    """Rows one by one.

    Args:
        rows: Mappings of values by column. An iterator is used up.

    >>> list(RowSource([{"age": 34}, {"age": 51}]).batches())
    [{'age': [34, 51]}]
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._iterable = rows

    @property
    def rows(self) -> int | None:
        """The number of rows, if they have a length."""
        return len(self._iterable) if isinstance(self._iterable, Sized) else None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the rows; those before ``start`` are taken and thrown away."""
        return gathered(itertools.islice(self._iterable, start, None), first_row=start)

    def identity(self) -> None:
        """Return None: what an iterable will yield cannot be told beforehand."""
        return


class _MapStyle(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class DatasetSource(Source):
    """A torch ``Dataset``, map-style or iterable, read in this process and in its own order.

    Args:
        dataset: Its samples may be mappings, tuples, or single values.
        names: Columns of a sample that is a tuple or a single value; ``("x", "y")`` by default, or
            ``("x",)``.

    Raises:
        DataError: if a sample has not as many parts as there are names.

    >>> rows = torch.utils.data.TensorDataset(torch.zeros(3, 2), torch.arange(3))
    >>> source = DatasetSource(rows, names=["x", "label"])
    >>> source.rows, [sorted(batch) for batch in source.batches()]
    (3, [['label', 'x']])
    """

    def __init__(self, dataset: Any, *, names: Sequence[str] | None = None) -> None:
        self._dataset = dataset
        self._names = tuple(names) if names is not None else None
        self._iterable = isinstance(dataset, torch.utils.data.IterableDataset)

    @property
    def rows(self) -> int | None:
        """The dataset's length, if it has one."""
        return len(self._dataset) if isinstance(self._dataset, Sized) else None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the samples; an iterable dataset's first ``start`` are taken and thrown away."""
        samples: Iterator[Any]
        if self._iterable:
            samples = itertools.islice(iter(self._dataset), start, None)
        else:
            dataset = cast("_MapStyle", self._dataset)
            samples = (dataset[index] for index in range(start, len(dataset)))
        return gathered(map(self._row, samples), first_row=start)

    def identity(self) -> str | None:
        """Return None, but for a ``TensorDataset``: code may return what it likes."""
        if type(self._dataset) is torch.utils.data.TensorDataset:
            return ArraySource(dict(enumerate_names(self._dataset.tensors))).identity()
        return None

    def _row(self, sample: Any) -> Mapping[str, Any]:
        if isinstance(sample, Mapping):
            return sample
        parts = sample if isinstance(sample, tuple | list) else (sample,)
        names = self._names or ("x", "y")[: len(parts)]
        if len(names) != len(parts):
            raise DataError(
                f"a sample has {len(parts)} parts and there are {len(names)} names for them "
                f"({', '.join(names)}); pass names=. Nothing of the split was put into the dataset."
            )
        return dict(zip(names, parts, strict=True))


def enumerate_names(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each value with its number as a name."""
    return ((str(number), value) for number, value in enumerate(values))


def _feed_values(checksum: Checksum, values: Any) -> bool:
    if isinstance(values, Tensor):
        flat: Any = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        checksum.update(str((values.dtype, tuple(values.shape))).encode(), flat)
        return True
    if isinstance(values, np.ndarray) and values.dtype.kind not in "OU":
        kind = str((values.dtype, values.shape)).encode()
        raw: Any = np.ascontiguousarray(values).reshape(-1).view("uint8")
        checksum.update(kind, raw)
        return True
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return False
    checksum.update(b"list %d" % len(values))
    for value in values:
        if isinstance(value, str | bytes):
            checksum.update(
                b"text", value.encode(errors="surrogatepass") if isinstance(value, str) else value
            )
        elif isinstance(value, bool | int | float | np.generic):
            checksum.update(type(value).__name__.encode(), repr(value).encode())
        elif not _feed_values(checksum, value):
            return False
    return True
