"""Rows that a dataset lists several times: each index is drawn by itself, and epsilon is of one."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.errors import UnsupportedTrainerOptionError

Ints = npt.NDArray[np.int64]

#: Numbers of rows that a dataset which holds them has for itself.
_SPAN: Final = 2**40


def require_distinct_rows(dataset: Any) -> None:
    """Require that no two indices of a dataset name the same row.

    Args:
        dataset: Map-style. ``Subset``, ``ConcatDataset``, ``StackDataset``, wrappers around one
            dataset, views of tensors, encrypted splits and lists are followed down to the rows.

    Raises:
        UnsupportedTrainerOptionError: if a row is listed several times.

    What a ``__getitem__`` makes of an index, and copies of a row, are not seen. A row of several
    columns repeats if all of them do. 10**7 indices take about a second.
    """
    if any(tensor.stride(0) for tensor in _dense(dataset)):
        return  # each row has memory of its own
    places = _Places().of(dataset, np.arange(len(dataset), dtype=np.int64))
    rows, distinct, most = len(places), *_distinct(places)
    if distinct < rows:
        raise UnsupportedTrainerOptionError(
            f"the training dataset has {rows} indices for {distinct} rows, and lists a row up to "
            f"{most} times, as a Subset with repeats or a dataset in a ConcatDataset twice. Each "
            f"index is drawn by itself, so one row counts up to {most} times in a step, and "
            "epsilon is that of one index. List each row once. To give rare rows more weight, "
            "multiply their losses: (weight[y] * cross_entropy(z, y, reduction='none')).mean(). "
            "No step was taken."
        )


class _Places:
    """Numbers rows by where they lie, the same for every index that leads there."""

    def __init__(self) -> None:
        self._sources: dict[Hashable, int] = {}
        self._objects: dict[Hashable, int] = {}
        self._open: set[int] = set()

    def of(self, dataset: Any, rows: Ints) -> Ints:
        """Return the places of some rows, shape ``(rows, columns)``; equal rows are one row."""
        if isinstance(dataset, ConcatDataset):
            return self._of_parts(dataset, rows)
        if isinstance(dataset, StackDataset):
            held = dataset.datasets
            parts = held.values() if isinstance(held, dict) else held
            return np.concatenate([self.of(part, rows) for part in parts], axis=1)
        if tensors := _dense(dataset):
            return np.stack([_addresses(tensor, rows) for tensor in tensors], axis=1)
        if isinstance(dataset, list | tuple) and dataset and _has_identity(dataset[0]):
            return self._of_objects(dataset, rows)
        inner, indices = _wrapped(dataset)
        if inner is None or id(inner) in self._open:  # as one that knows its own wrapper
            return self._numbered(_source(dataset), rows)
        self._open.add(id(dataset))
        try:
            return self.of(inner, rows if indices is None else indices[rows])
        finally:
            self._open.discard(id(dataset))

    def _of_parts(self, dataset: ConcatDataset[Any], rows: Ints) -> Ints:
        ends = np.asarray(dataset.cumulative_sizes)
        part_of = np.searchsorted(ends, rows, side="right")
        found = []
        for number, part in enumerate(dataset.datasets):
            chosen = part_of == number
            begin = ends[number - 1] if number else 0
            found.append((chosen, self.of(part, rows[chosen] - begin)))
        width = max(places.shape[1] for _, places in found)
        together = np.zeros((len(rows), width), np.int64)
        for chosen, places in found:
            together[chosen, : places.shape[1]] = places
        return together

    def _of_objects(self, items: Sequence[Any], rows: Ints) -> Ints:
        numbers = (self._objects.setdefault(_key(items[row]), len(self._objects)) for row in rows)
        return self._numbered("objects", np.fromiter(numbers, np.int64, len(rows)))

    def _numbered(self, source: Hashable, rows: Ints) -> Ints:
        number = self._sources.setdefault(source, len(self._sources))
        return rows[:, None] - (number + 1) * _SPAN  # below zero: apart from addresses


def _wrapped(dataset: Any) -> tuple[Any, Ints | None]:
    """Return the one dataset whose rows another passes on, and which rows; None if there is none.

    A wrapper is told by what it holds: one dataset, and ``indices`` or no list of its own.
    """
    held: dict[str, Any] = getattr(dataset, "__dict__", {})
    inner = [value for value in held.values() if isinstance(value, Dataset)]
    length = _length(dataset)
    listed = {name for name, value in held.items() if _is_list_of(value, length)}
    indices = held.get("indices")
    if isinstance(dataset, Subset):  # whatever its dataset and its indices are
        inner, listed, indices = [dataset.dataset], {"indices"}, dataset.indices
    if len(inner) != 1:
        return None, None
    if not listed and length is not None and length == _length(inner[0]):
        return inner[0], None
    chosen = _chosen(indices, _length(inner[0])) if listed == {"indices"} else None
    return (None, None) if chosen is None else (inner[0], chosen)


def _chosen(indices: Any, rows: int | None) -> Ints | None:
    """Return numbers of rows, from 0; None for anything else."""
    found = np.empty((0, 0))
    with contextlib.suppress(TypeError, ValueError):  # pairs of unlike lengths, for example
        found = np.asarray(indices)
    if found.ndim != 1 or (found.dtype.kind not in "iub" and len(found)):
        return None
    chosen = found.astype(np.int64)
    if rows is not None:
        chosen = np.where(chosen < 0, chosen + rows, chosen)
    return chosen if len(chosen) == 0 or 0 <= chosen.min() <= chosen.max() < _SPAN else None


def _length(dataset: Any) -> int | None:
    with contextlib.suppress(TypeError, NotImplementedError):
        return len(dataset)
    return None


def _is_list_of(value: Any, rows: int | None) -> bool:
    return isinstance(value, Tensor | np.ndarray | list | tuple | range) and _length(value) == rows


def _source(dataset: Any) -> Hashable:
    """Return what is the same for two objects that read the same rows."""
    manifest = getattr(dataset, "manifest", None)
    if isinstance(manifest, Manifest):
        return manifest.dataset_id, frozenset(dataset.entry.files)
    return id(dataset)


def _dense(dataset: Any) -> Sequence[Tensor]:
    """Return the tensors that rows are taken from, if it is known where each lies; else none."""
    held = dataset.tensors if isinstance(dataset, TensorDataset) else (dataset,)
    placed = (
        isinstance(t, Tensor) and t.layout is torch.strided and t.device.type != "meta"
        for t in held
    )
    return held if all(placed) else ()


def _addresses(tensor: Tensor, rows: Ints) -> Ints:
    return tensor.data_ptr() + rows * (tensor.stride(0) * tensor.element_size())


def _has_identity(item: Any) -> bool:
    """Return whether two entries that are one object are one row; equal numbers need not be."""
    if isinstance(item, tuple):
        return any(map(_has_identity, item))
    return isinstance(item, Tensor | np.ndarray | dict | list)


def _key(item: Any) -> Hashable:
    """Return what is the same for one object, and for equal numbers and texts beside it."""
    if isinstance(item, tuple):
        return tuple(map(_key, item))
    return item if isinstance(item, int | float | str | bytes | None) else (id(item),)


def _distinct(places: Ints) -> tuple[int, int]:
    """Return how many rows differ, and how often the commonest occurs."""
    rows = len(places)
    for column in places.T:
        steps = np.diff(column)  # mostly they are in order
        if (steps > 0).all() or (np.diff(np.sort(column)) > 0).all():
            return rows, 1
    # What differs from all others in one column is settled.
    for column in range(places.shape[1]):
        _, inverse, counts = np.unique(places[:, column], return_inverse=True, return_counts=True)
        places = places[counts[inverse] > 1]
    if not len(places):
        return rows, 1
    _, counts = np.unique(places, axis=0, return_counts=True)
    return rows - len(places) + len(counts), int(counts.max())
