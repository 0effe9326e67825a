"""Parts of a signed document, checked as they are taken out of it.

Every function raises IntegrityError on what it does not expect, and its message holds nothing of
the document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, TypeVar, overload

from lightning_secure.errors import IntegrityError

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_T = TypeVar("_T")


def fields(
    value: Any, names: Iterable[str], what: str, *, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Return an object that has exactly the fields ``names``, and may have those in ``optional``.

    Raises:
        IntegrityError: if the value is not an object, or has other fields.
    """
    required = set(names) - set(optional)
    if not isinstance(value, dict) or not required <= value.keys() <= required | set(optional):
        raise IntegrityError(f"{what} in the manifest does not have the expected fields.")
    return value


@overload
def typed(value: Any, kind: type[dict[Any, Any]], what: str) -> dict[Any, Any]: ...
@overload
def typed(value: Any, kind: type[_T], what: str) -> _T: ...
def typed(value: Any, kind: type[_T], what: str) -> Any:
    """Return ``value`` if it is of type ``kind``; raises IntegrityError otherwise."""
    if not isinstance(value, kind):
        raise IntegrityError(f"{what} in the manifest is not of the expected type.")
    return value


def count(value: Any, *, least: int = 0) -> int:
    """Return a whole number from ``least`` to 2**63 - 1; raises IntegrityError otherwise."""
    if type(value) is not int or not least <= value < 2**63:
        raise IntegrityError("a number in the manifest is not a count.")
    return value


def hexadecimal(value: Any, length: int) -> bytes:
    """Return ``length`` bytes given in lower case; raises IntegrityError otherwise."""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{2 * length}}}", value):
        raise IntegrityError("an id in the manifest is not hexadecimal of the expected length.")
    return bytes.fromhex(value)


def name(value: Any) -> str:
    """Return the name of a split or partition; raises IntegrityError otherwise."""
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise IntegrityError("a name in the manifest has characters that names may not have.")
    return value
