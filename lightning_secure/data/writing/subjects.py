"""Rows by the person they are about: each has shards, and keys, of its own."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from lightning_secure.crypto.encoding import utf8
from lightning_secure.crypto.keys import DataKey
from lightning_secure.data.format.columns import ColumnData
from lightning_secure.errors import DataError

PSEUDONYM_BYTES: Final = 16


class SubjectPseudonyms:
    """Turns subjects' ids into what the manifest shows of them.

    Args:
        key: Of one split. Without it a pseudonym cannot be traced back, not even by trying every
            possible id, and the same id has another pseudonym in every other split.

    Source:
        HMAC-SHA256, RFC 2104, truncated to 128 bits.
    """

    def __init__(self, key: DataKey) -> None:
        self._key = key.derive(info=b"lsec/v1/subject")

    def __call__(self, subject: object) -> bytes:
        """Return the 16 bytes that stand for a subject.

        Args:
            subject: Its id, text or a whole number; 7 and ``"7"`` are different subjects.

        Raises:
            DataError: if the subject's value is of neither type.
        """
        if isinstance(subject, str):
            message = b"s" + utf8(subject, what="a subject's id")
        elif isinstance(subject, int) and not isinstance(subject, bool):
            message = b"i" + str(subject).encode()
        else:
            raise DataError(
                f"a {type(subject).__name__} does not name a subject; text and whole numbers do. "
                "Nothing was changed."
            )
        return hmac.digest(self._key, message, hashlib.sha256)[:PSEUDONYM_BYTES]

    def of_column(self, columns: Mapping[str, Any], name: str) -> list[bytes]:
        """Return the pseudonym of each row's subject.

        Raises:
            DataError: if there is no such column, or a value in it does not name a subject.
        """
        if name not in columns:
            raise DataError(
                f"the rows have no column {name!r}, which says whose they are. Nothing of this "
                "call was sealed."
            )
        values = columns[name]
        plain = values.tolist() if hasattr(values, "tolist") else values
        return [self(one.item() if hasattr(one, "item") else one) for one in plain]


def by_subject(subjects: Sequence[bytes], most: int) -> Iterator[tuple[bytes, list[int]]]:
    """Return each subject with its rows, in the order of their first rows, ``most`` at a time."""
    rows: dict[bytes, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows.setdefault(subject, []).append(row)
    for subject, own in rows.items():
        for start in range(0, len(own), most):
            yield subject, own[start : start + most]


def taken(values: ColumnData, rows: Sequence[int]) -> ColumnData:
    """Return some rows of a column."""
    if isinstance(values, Tensor):
        return values[torch.tensor(rows)]
    return [values[row] for row in rows]  # type: ignore[return-value] # of one type, as `values` is
