"""What happens to identifying columns before a row is encrypted.

Encryption hides rows from whoever lacks the key; it does nothing against whoever has it. Columns
that training does not need, or does not need in full, are changed before they are sealed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lightning_secure.crypto.encoding import utf8
from lightning_secure.crypto.keys import DataKey, KeyProvider
from lightning_secure.errors import ConfigError, DataError

__all__ = [
    "AnonymizationPlan",
    "BoundPlan",
    "Generalize",
    "Keep",
    "Operator",
    "Pseudonymize",
    "Suppress",
]

_PSEUDONYM_BYTES: Final = 16


class Operator(ABC):
    """What is done to one column."""

    @abstractmethod
    def bind(self, keys: KeyProvider) -> Bound | None:
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
    """Seal the column as it is: somebody looked at it and says that it may stay."""

    def bind(self, keys: KeyProvider) -> Bound:
        """Return the identity."""
        return _Identity()

    def describe(self) -> str:
        """Return ``keep``."""
        return "keep"


@dataclass(frozen=True, kw_only=True)
class Suppress(Operator):
    """Drop the column: nothing of it is written."""

    def bind(self, keys: KeyProvider) -> None:
        """Return None."""
        return

    def describe(self) -> str:
        """Return ``suppress``."""
        return "suppress"


@dataclass(frozen=True, kw_only=True)
class Pseudonymize(Operator):
    """Replace each value by a keyed hash of it.

    Attributes:
        domain: What kind of thing is named, for example ``patient``. The same value has the same
            pseudonym in every dataset under one key and domain, so tables can be joined; under
            another key or domain the pseudonyms have nothing to do with each other.

    Without the key a pseudonym cannot be traced back, not even by hashing every possible value.
    Whoever has the key can do that: pseudonymous data is still personal data.

    Source:
        HMAC-SHA256, RFC 2104, truncated to 128 bits. ENISA, Pseudonymisation techniques and best
        practices, 2019, section 5.1.4.
    """

    domain: str

    def __post_init__(self) -> None:
        if not self.domain:
            raise ConfigError("Pseudonymize needs a domain, for example domain='patient'.")
        utf8(self.domain, what="the domain of a Pseudonymize")

    def bind(self, keys: KeyProvider) -> Bound:
        """Derive the domain's key from the provider."""
        return _Pseudonym(keys.derive(f"pseudonym/{self.domain}"))

    def describe(self) -> str:
        """Return the operation and its domain."""
        return f"pseudonymize(domain={self.domain})"


@dataclass(frozen=True, kw_only=True)
class Generalize(Operator):
    """Replace each value by a coarser one.

    Exactly one of:

    Attributes:
        date: Keep only the ``year`` or the ``decade`` of a date, as an integer.
        prefix: Keep so many leading characters, for example of a postcode.
        width: Round a number down to a multiple of this, in the column's unit.

    Raises:
        ConfigError: None or several are given, or one is not positive.
    """

    date: Literal["year", "decade"] | None = None
    prefix: int | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.date, self.prefix, self.width) if value is not None]
        if len(given) != 1:
            raise ConfigError("Generalize takes exactly one of date, prefix and width.")
        if self.date not in (None, "year", "decade"):
            raise ConfigError("Generalize(date=) is 'year' or 'decade'.")
        if self.date is None and not (isinstance(given[0], int | float) and given[0] > 0):
            raise ConfigError("Generalize(prefix=) and Generalize(width=) are positive numbers.")

    def bind(self, keys: KeyProvider) -> Bound:
        """Return the rounding."""
        return _Coarser(self)

    def describe(self) -> str:
        """Return the operation and its size."""
        name = next(n for n in ("date", "prefix", "width") if getattr(self, n) is not None)
        return f"generalize({name}={getattr(self, name)})"


@dataclass(frozen=True)
class AnonymizationPlan:
    """What to do to which column of a table before it is sealed.

    Attributes:
        columns: An operator for each named column.

    Columns of numbers that the plan does not name are sealed as they are. A column of text or
    bytes that it does not name is refused: text is where identities hide, so somebody must have
    said :class:`Keep` on purpose.

    >>> AnonymizationPlan({"name": Suppress(), "zip": Generalize(prefix=2)}).describe()
    {'name': 'suppress', 'zip': 'generalize(prefix=2)'}
    """

    columns: Mapping[str, Operator] = field(default_factory=dict)

    def bind(self, keys: KeyProvider) -> BoundPlan:
        """Derive the keys that the operators need."""
        return BoundPlan({name: operator.bind(keys) for name, operator in self.columns.items()})

    def describe(self) -> dict[str, str]:
        """Return column and operation, for the manifest."""
        return {name: operator.describe() for name, operator in self.columns.items()}


class BoundPlan:
    """A plan with its keys.

    Args:
        operators: The function per column; None drops the column.
    """

    def __init__(self, operators: Mapping[str, Bound | None]) -> None:
        self._operators = operators

    def apply(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Return the columns to seal.

        Args:
            columns: Equally long sequences of values by name.

        Raises:
            DataError: A planned column is absent, a column of text is not in the plan, or a value
                does not fit its operator. Nothing was changed.
        """
        if missing := self._operators.keys() - columns.keys():
            raise DataError(
                f"the anonymisation plan names {_quoted(missing)}, which the rows do not have: a "
                "renamed column would be sealed in the clear. Nothing of this call was sealed."
            )
        result: dict[str, Sequence[Any]] = {}
        for name, values in columns.items():
            if name not in self._operators:
                if _holds_text(values):
                    raise DataError(
                        f"column {name!r} holds text and the anonymisation plan does not say what "
                        "to do with it; use Keep() if it may be sealed as it is. Nothing of this "
                        "call was sealed."
                    )
                result[name] = values
            elif (operator := self._operators[name]) is not None:
                plain = values.tolist() if hasattr(values, "tolist") else values
                try:
                    result[name] = [operator(value) for value in plain]
                except DataError as error:
                    raise DataError(
                        f"column {name!r}: {error} Nothing of this call was sealed."
                    ) from None
        return result


class _Identity(Bound):
    def __call__(self, value: Any) -> Any:
        return value


class _Pseudonym(Bound):
    def __init__(self, key: DataKey) -> None:
        self._key = key.derive(info=b"lsec/v1/pseudonym")

    def __call__(self, value: Any) -> str:
        # The type is part of the message: 7 and "7" are different things.
        if isinstance(value, str):
            message = b"s" + utf8(value, what="a value")
        elif isinstance(value, int) and not isinstance(value, bool):
            message = b"i" + str(value).encode()
        else:
            raise DataError(f"a {type(value).__name__} cannot be pseudonymised; text and int can.")
        return hmac.digest(self._key, message, hashlib.sha256)[:_PSEUDONYM_BYTES].hex()


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
        assert rule.width is not None  # noqa: S101 # exactly one is given, see Generalize
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise DataError(f"a {type(value).__name__} cannot be rounded; numbers can.")
        return type(value)(value // rule.width * rule.width)


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


def _holds_text(values: Sequence[Any]) -> bool:
    # Arrays and tensors of numbers say so by their dtype and need not be walked.
    dtype = str(getattr(values, "dtype", "object")).lstrip("<>|=")
    return dtype.startswith(("object", "U", "S", "str")) and any(
        isinstance(value, str | bytes) for value in values
    )


def _quoted(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
