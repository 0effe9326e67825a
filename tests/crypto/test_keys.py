from __future__ import annotations

import copy
import pickle

import pytest

from lightning_secure.crypto.keys import DataKey, WrappedKey
from lightning_secure.errors import (
    AuditWriteError,
    IntegrityError,
    KeyAccessError,
    WrongKeyError,
)
from lightning_secure.util import events

CONTEXT = {"purpose": "test", "dataset": "00"}
MATERIAL = bytes(range(32))


def test_a_wrapped_key_comes_back():
    kek, key = DataKey.generate(), DataKey.generate()
    blob = kek.wrap(key, context=CONTEXT)
    assert len(blob) == 60
    assert kek.unwrap(blob, context=CONTEXT) == key
    assert kek.wrap(key, context=CONTEXT) != blob  # a fresh nonce each time


@pytest.mark.parametrize("place", range(60))
def test_a_wrapped_key_with_any_changed_byte_is_refused(place):
    kek = DataKey(MATERIAL)
    blob = bytearray(kek.wrap(DataKey.generate(), context=CONTEXT))
    blob[place] ^= 0x80
    with pytest.raises(IntegrityError, match="altered"):
        kek.unwrap(bytes(blob), context=CONTEXT)


@pytest.mark.parametrize("cut", [0, 1, 28, 59, 61])
def test_a_wrapped_key_of_another_length_is_refused(cut):
    kek = DataKey(MATERIAL)
    blob = (kek.wrap(DataKey.generate(), context=CONTEXT) + b"\0")[:cut]
    with pytest.raises(IntegrityError):
        kek.unwrap(blob, context=CONTEXT)


@pytest.mark.parametrize("context", [{}, {"purpose": "test"}, {**CONTEXT, "dataset": "01"}])
def test_a_wrapped_key_belongs_to_its_context(context):
    kek = DataKey(MATERIAL)
    blob = kek.wrap(DataKey.generate(), context=CONTEXT)
    with pytest.raises(IntegrityError):
        kek.unwrap(blob, context=context)


def test_a_wrapped_key_belongs_to_its_wrapping_key():
    blob = DataKey.generate().wrap(DataKey.generate(), context=CONTEXT)
    with pytest.raises(IntegrityError):
        DataKey.generate().unwrap(blob, context=CONTEXT)


def test_derivation_is_hkdf_sha256():
    # RFC 5869, test case 1 has another length of key material; this is its construction by hand.
    import hashlib
    import hmac

    salt, info = b"salt", b"info"
    prk = hmac.digest(salt, MATERIAL, hashlib.sha256)
    block = hmac.digest(prk, info + b"\x01", hashlib.sha256)
    assert DataKey(MATERIAL).derive(info=info, salt=salt) == block


def test_keys_of_different_purposes_differ():
    key = DataKey(MATERIAL)
    assert key.subkey("a") == key.subkey("a")
    assert key.subkey("a") != key.subkey("b")
    assert key.subkey("a").key_id != key.key_id


def test_a_key_shows_nothing_of_itself():
    key = DataKey(MATERIAL)
    shown = repr(key) + str(key) + f"{key}" + key.key_id
    assert MATERIAL.hex() not in shown
    assert repr(MATERIAL) not in shown
    assert not hasattr(key, "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_key_refuses_pickling(protocol):
    with pytest.raises(KeyAccessError, match="cannot be pickled"):
        pickle.dumps(DataKey(MATERIAL), protocol=protocol)


def test_a_key_is_copied_by_reference_and_not_hashable():
    key = DataKey(MATERIAL)
    assert copy.copy(key) is key
    assert copy.deepcopy({"key": key})["key"] is key
    with pytest.raises(TypeError):
        hash(key)
    assert key != "key"


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_has_256_bits(length):
    with pytest.raises(KeyAccessError, match="32 bytes"):
        DataKey(bytes(length))


def test_every_use_of_a_provider_is_announced(keys, heard):
    wrapped = keys.wrap(DataKey.generate(), context=CONTEXT)
    keys.unwrap(wrapped, context=CONTEXT)
    keys.derive("pseudonym/patient")
    with pytest.raises(IntegrityError):
        keys.unwrap(wrapped, context={})
    assert [(event.action, event.outcome) for event in heard] == [
        ("key.wrap", "success"),
        ("key.unwrap", "success"),
        ("key.derive", "success"),
        ("key.unwrap", "failure"),
    ]
    assert all(event.details["key_id"] == keys.key_id for event in heard)


@pytest.mark.parametrize("use", ["wrap", "unwrap", "derive"])
def test_a_use_that_cannot_be_recorded_is_refused(keys, use):
    wrapped = keys.wrap(DataKey.generate(), context=CONTEXT)

    def full(event: events.Event) -> None:
        raise AuditWriteError("the log is full")

    events.subscribe("full", full)
    act = {
        "wrap": lambda: keys.wrap(DataKey.generate(), context=CONTEXT),
        "unwrap": lambda: keys.unwrap(wrapped, context=CONTEXT),
        "derive": lambda: keys.derive("x"),
    }[use]
    with pytest.raises(AuditWriteError):
        act()


def test_another_providers_key_is_named_and_the_attempt_announced(keys, other_keys, heard):
    wrapped = keys.wrap(DataKey.generate(), context=CONTEXT)
    with pytest.raises(WrongKeyError, match=keys.key_id):
        other_keys.unwrap(wrapped, context=CONTEXT)
    assert (heard[-1].action, heard[-1].outcome) == ("key.unwrap", "failure")


def test_a_wrapped_key_travels_as_json(keys):
    wrapped = keys.wrap(DataKey.generate(), context=CONTEXT)
    assert WrappedKey.from_json(wrapped.to_json()) == wrapped


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"provider": "local", "key_id": "1"},
        {"provider": "local", "key_id": "1", "blob": "!", "more": 1},
        {"provider": 1, "key_id": "1", "blob": "AA=="},
        {"provider": "local", "key_id": None, "blob": "AA=="},
        {"provider": "local", "key_id": "1", "blob": "not base64"},
        {"provider": "local", "key_id": "1", "blob": 7},
    ],
)
def test_a_malformed_wrapped_key_is_refused(value):
    with pytest.raises(IntegrityError):
        WrappedKey.from_json(value)


def _recorded(event):
    """A listener that can be pickled."""


def test_a_pickled_provider_takes_along_the_listeners_that_follow_it(keys):
    events.subscribe("follower", _recorded, follows_keys=True)
    try:
        sent = pickle.dumps(keys)
    finally:
        events.unsubscribe("follower")
    assert "follower" not in events.following()
    try:
        assert pickle.loads(sent).key_id == keys.key_id
        assert events.following()["follower"] is _recorded
    finally:
        events.unsubscribe("follower")
