"""A known weakness, as a change that would bring it back, and the tests that must notice."""

from __future__ import annotations

import importlib
from pathlib import Path
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


def catalogue() -> list[Mutation]:
    """Return all of them."""
    return [
        mutation
        for path in sorted((Path(__file__).parent / "catalogue").glob("*.py"))
        for mutation in importlib.import_module(f"catalogue.{path.stem}").CATALOGUE
    ]
