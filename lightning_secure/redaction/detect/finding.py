"""The interface of a detector, and its findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Finding(NamedTuple):
    """A part of a text that should not be shown.

    Attributes:
        rule: The name of the rule that matched.
        start: Where it begins, in characters.
        end: Where it ends.
    """

    rule: str
    start: int
    end: int


class Detector(Protocol):
    """Finds parts of texts."""

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what is found in ``text``, in any order; findings may overlap."""
