"""A known weakness, as a change that would bring it back, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One weakness.

    Attributes:
        name: What goes wrong.
        file: Where, below ``lightning_secure``.
        old: Text that stands there exactly once.
        new: What takes its place.
        tests: Which must turn red: arguments of pytest.
        more: Further texts and replacements.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    more: tuple[tuple[str, str], ...] = ()
