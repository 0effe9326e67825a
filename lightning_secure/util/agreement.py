"""Agreement of a run's processes on what they were given.

Each process makes a :data:`Statement`. All statements are compared before anything depends on them,
and every process gets the same list of differences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

from torch import distributed

#: By name: a text, which an error shows; or bytes such as a digest, of which it shows the name.
Statement = Mapping[str, str | bytes]

_MOST_NAMES: Final = 5
_MOST_RANKS: Final = 8
_MOST_CHARACTERS: Final = 80


@runtime_checkable
class DescribesRows(Protocol):
    """A dataset that names its rows without reading them."""

    def rows_statement(self) -> Statement:
        """Return what the rows, their order and the form of a sample follow from."""


def gathered(value: Any) -> list[Any]:
    """Return the value of each process, in the order of the ranks.

    Raises:
        RuntimeError: if another process has gone or does not answer in time.
    """
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def compared(statement: Statement | None) -> list[str]:
    """Compare the statements of all processes; call it in every one.

    Args:
        statement: This process's; None if making it failed.

    Returns:
        The differences, each with the ranks; the same list in every process, empty if equal.

    Raises:
        RuntimeError: if another process has gone or does not answer in time.
    """
    digests = gathered(None if statement is None else _digest(statement))
    if failed := [rank for rank, digest in enumerate(digests) if digest is None]:
        return [f"{ranks(failed)} failed, and its own message says why"]
    if len(set(digests)) == 1:
        return []
    return differences(gathered(dict(statement or {})))


def differences(statements: Sequence[Statement]) -> list[str]:
    """Return what differs between statements, with the ranks.

    >>> differences([{"delta": "1e-05", "rows": b"x"}, {"delta": "1e-06", "rows": b"y"}])
    ['delta is 1e-05 on rank 0, 1e-06 on rank 1', 'rows (rank 1 differs from rank 0)']
    """
    names = dict.fromkeys(name for statement in statements for name in statement)
    found = []
    for name in names:
        values = [statement.get(name, "absent") for statement in statements]
        if len(set(values)) > 1:
            found.append(f"{name} {_told(values)}")
    more = len(found) - _MOST_NAMES
    return found if more <= 0 else [*found[:_MOST_NAMES], f"{more} more"]


def ranks(numbers: Sequence[int]) -> str:
    """Return the name of some ranks.

    >>> ranks([1]), ranks([0, 2])
    ('rank 1', 'ranks 0, 2')
    """
    shown = ", ".join(map(str, numbers[:_MOST_RANKS]))
    more = len(numbers) - _MOST_RANKS
    return f"rank{'s' * (len(numbers) > 1)} {shown}{f' and {more} more' if more > 0 else ''}"


def _told(values: Sequence[str | bytes]) -> str:
    if any(isinstance(value, bytes) for value in values):
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        return f"({ranks(others)} differ{'s' * (len(others) == 1)} from rank 0)"
    who: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        who.setdefault(str(value), []).append(rank)
    return "is " + ", ".join(f"{_short(value)} on {ranks(at)}" for value, at in who.items())


def _short(value: str) -> str:
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."


def _digest(statement: Statement) -> bytes:
    sha = hashlib.sha256()
    for name, value in sorted(statement.items()):
        for part in (name.encode(), value.encode() if isinstance(value, str) else value):
            sha.update(len(part).to_bytes(8, "little") + part)
    return sha.digest()
