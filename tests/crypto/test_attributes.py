"""Remarks that only readers of a split see: bound to their name, their split and its key."""

from __future__ import annotations

import pytest

from lightning_secure.crypto import attributes
from lightning_secure.crypto.attributes import (
    open_attributes,
    reseal_attributes,
    seal_attributes,
)
from lightning_secure.crypto.encoding import b64decode, b64encode
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.errors import IntegrityError

CLEAR = {"image": "decoded", "encrypted.a": "one", "encrypted.b": "two"}
SEEN = {"image": "decoded", "a": "one", "b": "two"}


def partition(name="train", dataset=bytes(16)):
    return PartitionKey.generate(dataset, name)


def test_they_come_back_for_who_has_the_key():
    key, new = partition(), partition()
    sealed = seal_attributes(CLEAR, key)
    assert sealed.keys() == CLEAR.keys()
    assert sealed["image"] == "decoded"
    assert open_attributes(sealed, key) == SEEN
    assert open_attributes(sealed, None) == {"image": "decoded"}
    assert sealed != seal_attributes(CLEAR, key), "each time another nonce"
    again = reseal_attributes(sealed, old=key, new=new)
    assert open_attributes(again, new) == SEEN
    with pytest.raises(IntegrityError, match="rejected"):
        open_attributes(again, key)


def test_a_short_text_is_as_long_as_another():
    key = partition()
    lengths = {
        len(seal_attributes({"encrypted.a": "x" * n}, key)["encrypted.a"]) for n in range(256)
    }
    assert len(lengths) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda sealed: {"encrypted.a": sealed["encrypted.b"]},
        lambda sealed: {"encrypted.a": ""},
        lambda sealed: {"encrypted.a": "!"},
        lambda sealed: {"encrypted.a": b64encode(b64decode(sealed["encrypted.a"], what="it")[:-1])},
        lambda sealed: {"encrypted.a": "one"},
    ],
)
def test_what_was_changed_is_refused(change):
    key = partition()
    with pytest.raises(IntegrityError):
        open_attributes(change(seal_attributes(CLEAR, key)), key)


def test_what_another_split_says_is_refused():
    key = partition()
    other = PartitionKey(key._key, dataset_id=bytes(16), partition="val")
    with pytest.raises(IntegrityError):
        open_attributes(seal_attributes(CLEAR, key), other)


def test_a_text_without_its_end_is_refused(monkeypatch):
    key = partition()
    # No sound sealer writes such a thing.
    monkeypatch.setattr(attributes, "utf8", lambda text, what: b"")
    monkeypatch.setattr(attributes, "_BLOCK", 1)
    sealed = seal_attributes({"encrypted.a": ""}, key)
    assert open_attributes(sealed, key) == {"a": ""}
    cipher, nonce = attributes._cipher(key), bytes(12)
    for plain in (b"text", b"", b"\xff\x80"):
        data = nonce + cipher.encrypt(nonce, plain, attributes._bound("encrypted.a", key))
        with pytest.raises(IntegrityError):
            open_attributes({"encrypted.a": b64encode(data)}, key)
