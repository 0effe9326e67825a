"""k-anonymity and l-diversity, counted row by row.

Rows that agree in all quasi-identifiers are one class. What is kept of a class is a keyed hash and
a count, so memory does not grow with what the columns hold, and nothing of a row is kept.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_secure.errors import DataError

#: Classes of which all are kept, each in 24 bytes; of more, a share is. So it is with classes and a
#: sensitive value, in 40.
MOST_CLASSES: Final = 2**20

#: Two 64-bit halves a row, shape ``(rows, 2)``.
Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]


class RowHash:
    """Hashes rows by some columns, under a throw-away key.

    The hash of a row is the exclusive or of keyed hashes (BLAKE2b, 128 bits) of its values, each
    with the name of its column. Two rows that differ agree in it with probability 2^-128.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def rows(self, columns: Sequence[tuple[str, Sequence[Any]]], *, count: int) -> Hashes:
        """Return a hash of each row.

        Args:
            columns: Names and values.
            count: How many rows there are, also if there is no column.

        Raises:
            DataError: if a value is none of text, bytes, a number, a date or None.
        """
        result: Hashes = np.zeros((count, 2), np.uint64)
        for name, values in columns:
            result ^= self._column(name, values)
        return result

    def _column(self, name: str, values: Sequence[Any]) -> Hashes:
        # A name of any length, and names that are parts of each other.
        key = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), key=self._key).digest()
        plain = values.tolist() if hasattr(values, "tolist") else values
        texts: dict[str, int] = {}
        others: dict[tuple[type, Any], int] = {}
        digests: list[bytes] = []

        def place(value: Any) -> int:
            label = _label(value.item() if isinstance(value, np.generic) else value, name)
            if label not in others:
                data = hashlib.blake2b(_bytes_of(label), key=key, digest_size=16).digest()
                others[label] = len(digests)
                digests.append(data)
            return others[label]

        places = []
        for value in plain:
            if type(value) is str:
                found = texts.get(value)
                if found is None:
                    found = texts[value] = place(value)
            else:
                found = place(value)
            places.append(found)
        table: Hashes = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
        return table[np.asarray(places, np.intp)]


def _label(value: Any, name: str) -> tuple[type, Any]:
    """Return what is equal for two values if they are the same."""
    # 1, 1.0 and True are equal and not the same; a NaN is not equal to itself, and 0.0 to -0.0.
    for kind in (str, bytes, bool, int):
        if isinstance(value, kind):
            return kind, str.__str__(value) if kind is str else value
    if value is not None and not isinstance(value, float | dt.date):
        raise DataError(
            f"column {name!r} is counted by the anonymisation plan, as quasi-identifier or "
            f"sensitive, and holds a {type(value).__name__}; it must hold text, bytes, numbers or "
            "dates. Nothing of this call was sealed."
        )
    return type(value), repr(value + 0.0 if isinstance(value, float) else value)


def _bytes_of(label: tuple[type, Any]) -> bytes:
    kind, value = label
    if kind is bytes:
        return b"bytes " + bytes(value)
    return f"{kind.__name__} {value}".encode("utf-8", "surrogatepass")


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """The smallest class.

    Attributes:
        least: Rows in the smallest class (k), or different values in the one with the fewest (l);
            None if there is no row or no class was kept, and if, with ``exact``, the sensitive
            column is not sealed at all.
        exact: Whether it is that. Otherwise only a share of the classes was counted, because there
            are too many, and a smaller one may be among the others.
    """

    least: int | None
    exact: bool


class Classes:
    """Counts rows by class, and the different values that each class has of sensitive columns.

    Args:
        sensitive: How many such columns there are.
        most: Classes to keep. If there are more, those whose hash is odd are let go of, and so on
            with the next bit.

    Source:
        k-anonymity: Sweeney 2002. l-diversity: Machanavajjhala et al. 2007, counted as distinct
        values (Li, Li and Venkatasubramanian 2007, section 2). A share of the classes by their
        hash: Gibbons 2001, Distinct sampling.

    >>> rows = RowHash().rows([("zip", ["10", "10", "80"]), ("year", [1980, 1980, 1975])], count=3)
    >>> classes = Classes()
    >>> classes.add(rows)
    >>> classes.k.least
    1
    """

    def __init__(self, *, sensitive: int = 0, most: int = MOST_CLASSES) -> None:
        self._rows = _Table(2, most)
        self._pairs = [_Table(4, most) for _ in range(sensitive)]

    def add(self, classes: Hashes, values: Sequence[Hashes] = ()) -> None:
        """Count rows.

        Args:
            classes: A hash of the quasi-identifiers of each.
            values: For each sensitive column, a hash of its value in each row.
        """
        self._rows.add(classes)
        for table, hashes in zip(self._pairs, values, strict=True):
            table.add(np.concatenate([classes, hashes], axis=1))

    @property
    def k(self) -> ClassCount:
        """The rows of the smallest class."""
        _, counts = self._rows.merged()
        return self._least(counts, self._rows)

    def diversity(self, column: int) -> ClassCount:
        """Return how many different values the class with the fewest has of a sensitive column."""
        table = self._pairs[column]
        keys, _ = table.merged()
        if not len(keys):
            return self._least(np.zeros(0, np.int64), table)
        _, counts = _grouped(keys[:, :2], np.ones(len(keys), np.int64))
        return self._least(counts, table)

    @staticmethod
    def _least(counts: Counts, table: _Table) -> ClassCount:
        if not len(counts):
            return ClassCount(least=None, exact=False)
        least = int(counts.min())
        # Nothing is smaller than one.
        return ClassCount(least=least, exact=table.whole or least == 1)


class _Table:
    """Keys of 64-bit halves with counts, of which those that begin alike are kept together."""

    def __init__(self, halves: int, most: int) -> None:
        self._keys: npt.NDArray[np.uint64] = np.zeros((0, halves), np.uint64)
        self._counts: Counts = np.zeros(0, np.int64)
        self._new: list[npt.NDArray[np.uint64]] = []
        self._waiting = 0
        self._most = most
        self._bits = 0

    @property
    def whole(self) -> bool:
        """Whether every key was kept."""
        return self._bits == 0

    def add(self, keys: npt.NDArray[np.uint64]) -> None:
        """Count each of ``keys`` once."""
        kept = keys[self._chosen(keys)]
        self._new.append(kept)
        self._waiting += len(kept)
        if self._waiting > max(65536, len(self._keys) // 2):
            self.merged()

    def merged(self) -> tuple[npt.NDArray[np.uint64], Counts]:
        """Return the keys, each once, and their counts."""
        if self._waiting:
            keys = np.concatenate([self._keys, *self._new])
            ones = np.ones(self._waiting, np.int64)
            self._keys, self._counts = _grouped(keys, np.concatenate([self._counts, ones]))
            self._new, self._waiting = [], 0
        while len(self._keys) > self._most:
            self._bits += 1
            chosen = self._chosen(self._keys)
            self._keys, self._counts = self._keys[chosen], self._counts[chosen]
        return self._keys, self._counts

    def _chosen(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        # By the class, which is the first half: all values of a class stay or go together.
        result: npt.NDArray[np.bool_] = keys[:, 0] & np.uint64((1 << self._bits) - 1) == 0
        return result


def _grouped(keys: npt.NDArray[np.uint64], counts: Counts) -> tuple[npt.NDArray[np.uint64], Counts]:
    """Return each key once, with the sum of its counts."""
    order = np.lexsort(keys.T)
    keys, counts = keys[order], counts[order]
    first = np.ones(len(keys), np.bool_)
    first[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    starts = np.flatnonzero(first)
    return keys[starts], np.add.reduceat(counts, starts)
