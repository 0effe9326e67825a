from __future__ import annotations

import pytest

from lightning_secure.crypto.encoding import b64decode, canonical_json, parse_json_object
from lightning_secure.errors import IntegrityError


def test_canonical_json_has_one_form():
    assert (
        canonical_json({"b": 1, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()
    )
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"1", b"{", b'{"a":1,"a":2}', b"\xff\xfe", b"[" * 100_000, b'{"secret": "hunter2'],
)
def test_what_is_not_one_object_is_refused_without_showing_it(data):
    with pytest.raises(IntegrityError) as caught:
        parse_json_object(data, what="a document")
    assert "hunter2" not in str(caught.value)
    # Tools that collect exceptions look into the chain as well.
    assert caught.value.__context__ is None


@pytest.mark.parametrize("text", [None, 1, "a", "AA=", "AA==\n", "é===", "AA== "])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(IntegrityError):
        b64decode(text, what="it")


def test_base64_of_another_length_is_refused():
    assert b64decode("AAA=", what="it", length=2) == b"\0\0"
    with pytest.raises(IntegrityError):
        b64decode("AAA=", what="it", length=3)
