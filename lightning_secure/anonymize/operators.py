"""Operators on a column that need no key."""

from __future__ import annotations

import bisect
import contextlib
import datetime as dt
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lightning_secure.crypto.keys import DataKey
from lightning_secure.errors import ConfigError, DataError


class KeySource(Protocol):
    """The source of the operators' keys: any :class:`KeyProvider`."""

    def derive(self, purpose: str) -> DataKey:
        """Return the same key for the same purpose each time."""


class Operator(ABC):
    """A rule for one column."""

    @abstractmethod
    def bind(self, keys: KeySource) -> Bound | None:
        """Return the function to apply to each value, or None to drop the column."""

    @abstractmethod
    def describe(self) -> str:
        """Return what goes into the signed manifest: the operation, never a key or a value."""


class Bound(ABC):
    """An operator with its key."""

    @abstractmethod
    def __call__(self, value: Any) -> Any:
        """Return what is sealed in place of ``value``."""


@dataclass(frozen=True, kw_only=True)
class Keep(Operator):
    """Seal the column unchanged: the plan's author has looked at it and decided so.

    >>> Keep().bind(None)("left ear")
    'left ear'
    """

    def bind(self, keys: KeySource) -> Bound:
        """Return the identity."""
        return _Identity()

    def describe(self) -> str:
        """Return ``keep``."""
        return "keep"


@dataclass(frozen=True, kw_only=True)
class Suppress(Operator):
    """Drop the column: nothing of it is written.

    >>> Suppress().bind(None) is None  # the column is left out
    True
    """

    def bind(self, keys: KeySource) -> None:
        """Return None."""
        return

    def describe(self) -> str:
        """Return ``suppress``."""
        return "suppress"


@dataclass(frozen=True, kw_only=True)
class Redact(Operator):
    """Take secrets and personal data out of free text, as :class:`Redactor` does.

    Attributes:
        extra_patterns: Regular expressions of your own, see :class:`Redactor`.
        extra_rules: A file of rules of your own in the format of gitleaks (TOML).

    The column's name counts as a word before each value: under ``phone``, a number needs no other
    word to be one. In a column whose name is that of a secret, every value is taken out whole.
    A value that could not be checked is taken out whole, too.

    Names of people and places in running text are not found, by this or any pattern.

    Raises:
        ConfigError: if a pattern is no regular expression. The message does not repeat the pattern.

    >>> from lightning_secure import AnonymizationPlan
    >>> plan = AnonymizationPlan({"note": Redact()}).bind(keys)
    >>> plan.apply({"note": ["call jo@clinic.example"]})
    {'note': ['call REDACTED']}
    """

    extra_patterns: Sequence[str] = ()
    extra_rules: str | None = None

    def __post_init__(self) -> None:
        valid = not isinstance(self.extra_patterns, str)
        try:
            for pattern in self.extra_patterns if valid else ():
                re.compile(pattern)
        except (re.error, TypeError):
            valid = False
        if not valid:  # outside the handler: its error holds the pattern, which may hold a value
            raise ConfigError(
                "Redact(extra_patterns=) must be a list of regular expressions in Python's "
                "syntax. The value given is not, and is not shown."
            )
        object.__setattr__(self, "extra_patterns", tuple(self.extra_patterns))

    def bind(self, keys: KeySource) -> Bound:
        """Return a function that refuses what is no text; the plan takes out what it finds."""
        return OnlyText()

    def describe(self) -> str:
        """Return the operation, and how many rules of one's own it has; they may hold values."""
        more = [f"extra_patterns={len(self.extra_patterns)}"] if self.extra_patterns else []
        more += ["extra_rules"] if self.extra_rules is not None else []
        return f"redact({', '.join(more)})" if more else "redact"


@dataclass(frozen=True, kw_only=True)
class Generalize(Operator):
    """Replace each value by a coarser one.

    Exactly one of:

    Attributes:
        date: Keep only the ``year`` or the ``decade`` of a date, as an integer.
        prefix: Keep so many leading characters, for example of a postcode.
        width: Round a number down to a multiple of this, in the column's unit.
        bins: Edges in ascending order. A number becomes that of its bin: how many edges are not
            above it, from 0 for what lies below the first edge.

    Raises:
        ConfigError: if none or several ways are given, a number is not positive, or edges do not
            ascend.

    >>> age = Generalize(bins=(18, 40, 65)).bind(None)
    >>> [age(17), age(18), age(64.9), age(90)]
    [0, 1, 2, 3]
    """

    date: Literal["year", "decade"] | None = None
    prefix: int | None = None
    width: float | None = None
    bins: Sequence[float] | None = None

    def __post_init__(self) -> None:
        every = (self.date, self.prefix, self.width, self.bins)
        given: list[Any] = [value for value in every if value is not None]
        if len(given) != 1:
            raise ConfigError(
                f"Generalize takes exactly one of date, prefix, width and bins, not {len(given)}."
            )
        if self.date not in (None, "year", "decade"):
            raise ConfigError("Generalize(date=) must be 'year' or 'decade'.")
        if self.bins is not None:
            edges = tuple(self.bins) if isinstance(self.bins, list | tuple) else ()
            if not edges or not all(_finite(edge) for edge in edges) or not _ascending(edges):
                raise ConfigError(
                    "Generalize(bins=) must be one or more finite numbers in ascending order."
                )
            object.__setattr__(self, "bins", edges)  # a list could be changed afterwards
        elif self.date is None and not (_finite(given[0]) and given[0] > 0):
            what = "width" if self.prefix is None else "prefix"
            raise ConfigError(f"Generalize({what}=) must be a positive number.")
        if self.prefix is not None and type(self.prefix) is not int:
            raise ConfigError("Generalize(prefix=) must be a whole number of characters.")

    def bind(self, keys: KeySource) -> Bound:
        """Return the rounding."""
        return _Coarser(self)

    def describe(self) -> str:
        """Return the operation and its size."""
        if self.bins is not None:
            return f"generalize(bins={list(self.bins)})"
        name = next(n for n in ("date", "prefix", "width") if getattr(self, n) is not None)
        return f"generalize({name}={getattr(self, name)})"


class _Identity(Bound):
    def __call__(self, value: Any) -> Any:
        return value


class OnlyText(Bound):
    """Hands on text and refuses everything else."""

    def __call__(self, value: Any) -> str:
        """Return ``value``; raises DataError if it is no text."""
        if not isinstance(value, str):
            raise DataError(f"a {type(value).__name__} cannot be redacted; text can.")
        return value


class _Coarser(Bound):
    def __init__(self, rule: Generalize) -> None:
        self._rule = rule

    def __call__(self, value: Any) -> Any:
        rule = self._rule
        if rule.date is not None:
            year = _year(value)
            return year if rule.date == "year" else year // 10 * 10
        if rule.prefix is not None:
            if not isinstance(value, str):
                raise DataError(f"a {type(value).__name__} has no prefix; only text has.")
            return value[: rule.prefix]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise DataError(f"a {type(value).__name__} cannot be rounded; numbers can.")
        if rule.bins is not None:
            if value != value:
                raise DataError("a NaN lies in no bin.")
            return bisect.bisect_right(rule.bins, value)
        assert rule.width is not None  # noqa: S101 # exactly one is given, see Generalize
        rounded = None
        with contextlib.suppress(OverflowError):
            rounded = type(value)(value // rule.width * rule.width)
        if rounded is None:
            raise DataError("a number is too large to be rounded.")
        return rounded


def _year(value: Any) -> int:
    if isinstance(value, dt.date):
        return value.year
    year = None
    if isinstance(value, str):
        try:
            year = dt.date.fromisoformat(value[:10]).year
        except ValueError:
            year = None
    if year is None:
        # Outside the handler: its error repeats the date.
        raise DataError("a value is not a date, nor ISO 8601 text of one.")
    return year


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _ascending(edges: Sequence[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(edges))
