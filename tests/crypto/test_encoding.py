from __future__ import annotations

import pytest

from lightning_secure.crypto.encoding import b64decode, canonical_json, parse_json_object, utf8
from lightning_secure.errors import DataError, IntegrityError


def test_canonical_json_has_one_form():
    assert (
        canonical_json({"b": 1, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()
    )
    assert utf8("é", what="it") == "é".encode()


@pytest.mark.parametrize(
    "value", [float("nan"), object(), {"hunter2": {1, 2}}, "hunter2\ud800", {"hunter2\udfff": 1}]
)
def test_what_has_no_canonical_form_is_refused_without_showing_it(value):
    with pytest.raises(DataError) as caught:
        canonical_json({"x": value})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_text_without_a_utf8_form_is_refused_without_showing_it():
    with pytest.raises(DataError, match="the note is text with a lone surrogate") as caught:
        utf8("hunter2\ud800", what="the note")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_escapes_of_whole_characters_are_read():
    assert parse_json_object(b'{"a":"\\ud83d\\ude00 \\u00e9"}', what="it") == {"a": "\U0001f600 é"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b'{"a":1,"a":2}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"secret": "hunter2',
        b'{"hunter2":"\\ud800"}',
        b'{"hunter2":"\xed\xa0\x80"}',
        '{"a":1}'.encode("utf-16"),
    ],
)
def test_what_is_not_one_object_is_refused_without_showing_it(data):
    with pytest.raises(IntegrityError) as caught:
        parse_json_object(data, what="a document")
    assert "hunter2" not in str(caught.value)
    # Tools that collect exceptions look into the chain as well.
    assert caught.value.__context__ is None


@pytest.mark.parametrize("data", [b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":NaN}', b'{"a":1e400}'])
def test_only_the_canonical_form_passes_where_it_is_asked_for(data):
    assert parse_json_object(data, what="it")
    with pytest.raises(IntegrityError, match="canonical") as caught:
        parse_json_object(data, what="it", canonical=True)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("text", [None, 1, "a", "AA=", "AA==\n", "é===", "AA== ", "AB=="])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(IntegrityError):
        b64decode(text, what="it")


def test_base64_of_another_length_is_refused():
    assert b64decode("AAA=", what="it", length=2) == b"\0\0"
    with pytest.raises(IntegrityError):
        b64decode("AAA=", what="it", length=3)
