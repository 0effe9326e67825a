"""Canonical bytes of a value, which are signed, hashed or bound as associated data."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from typing import Any

from lightning_secure.errors import DataError, IntegrityError


def utf8(text: str, *, what: str) -> bytes:
    r"""Encode text that comes from outside.

    Python's text may hold halves of surrogate pairs, which no encoding has; they come from broken
    JSON and from file names. The error of ``str.encode`` carries the whole text along.

    Raises:
        DataError: if the text has no UTF-8 form. The message names ``what`` and holds nothing of
            the text.

    >>> utf8("ü", what="name")
    b'\xc3\xbc'
    """
    data = None
    with contextlib.suppress(UnicodeEncodeError):
        data = text.encode()
    if data is None:
        raise DataError(
            f"{what} is text with a lone surrogate (half of a character), which has no UTF-8 form. "
            "Nothing of it was used."
        )
    return data


def canonical_json(value: Any) -> bytes:
    r"""Encode JSON with sorted keys and no white space, in UTF-8.

    Equal to RFC 8785 for the values used here: strings, booleans, integers, lists and objects with
    ASCII keys.

    Raises:
        DataError: if ``value`` has no canonical form.

    >>> canonical_json({"b": [1, True], "a": "ü"})
    b'{"a":"\xc3\xbc","b":[1,true]}'
    """
    text = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    if text is None:
        raise DataError("a value has no JSON form, for example NaN. Nothing of it was used.")
    return utf8(text, what="a value that is to be signed, recorded or bound to a key")


def is_canonical(value: Any, data: bytes) -> bool:
    """Return whether ``data`` is the canonical JSON of ``value``.

    NaN, lone surrogates and very deep nesting can be parsed and have no canonical form.

    >>> is_canonical({"a": 1}, b'{"a":1}'), is_canonical({"a": 1}, b'{"a": 1}')
    (True, False)
    """
    result = False
    with contextlib.suppress(ValueError, RecursionError):
        result = canonical_json(value) == data
    return result


def parse_json_object(data: bytes, *, what: str, canonical: bool = False) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, refusing duplicate keys and text that has no UTF-8 form.

    Args:
        data: The bytes.
        what: Names the document in errors.
        canonical: Whether only the bytes that :func:`canonical_json` makes of the object pass.

    Raises:
        IntegrityError: if ``data`` is not one JSON object with unique keys, or not its canonical
            form. The message names ``what`` and holds nothing of the data.

    >>> parse_json_object(b'{"a": 1, "a": 2}', what="header")
    Traceback (most recent call last):
    lightning_secure.errors.IntegrityError: ...
    """
    value: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(data.decode(), object_pairs_hook=_unique)
        if b"\\u" in data:  # such an escape can spell half of a surrogate pair
            json.dumps(parsed, ensure_ascii=False).encode()
        value = parsed
    if canonical and not is_canonical(value, data):
        value = None
    if not isinstance(value, dict):
        # Raised outside the handler: a JSONDecodeError carries the whole document with it.
        raise IntegrityError(
            f"{what} is not {'canonical' if canonical else 'valid'} JSON; it was cut off or "
            "altered. Nothing from it was used."
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def b64encode(data: bytes) -> str:
    """Encode as standard base64.

    >>> b64encode(b"shard")
    'c2hhcmQ='
    """
    return base64.b64encode(data).decode("ascii")


def b64decode(text: Any, *, what: str, length: int | None = None) -> bytes:
    """Decode standard base64 strictly: no other text stands for the same bytes.

    Raises:
        IntegrityError: if ``text`` is not base64 or does not have ``length`` bytes.

    >>> b64decode("c2hhcmQ=", what="name")
    b'shard'
    """
    data: bytes | None = None
    if isinstance(text, str):
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            data = None
    # The last character may have bits to spare, which a decoder ignores.
    if data is None or b64encode(data) != text or (length is not None and len(data) != length):
        raise IntegrityError(
            f"{what} is not valid base64 of the expected length. Nothing from it was used."
        )
    return data
