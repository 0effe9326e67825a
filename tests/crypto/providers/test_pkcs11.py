"""A key in a token that it never leaves, on SoftHSM."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys

import pytest

from lightning_secure.crypto.keys import DataKey, WrappedKey, associated_data
from lightning_secure.crypto.providers import EnvironmentSecret, Pkcs11KeyProvider
from lightning_secure.crypto.providers import pkcs11 as module
from lightning_secure.crypto.providers.external import bound_payload
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    MissingExtraError,
)

CONTEXT = {"purpose": "partition", "dataset": "00" * 16, "partition": "train"}
PIN = EnvironmentSecret("LSEC_TEST_PIN")


@pytest.fixture
def where(softhsm):
    return {"module": softhsm.module, "token": softhsm.label, "pin": PIN}


@pytest.fixture
def label(request):
    return f"{os.getpid()}-{request.node.name}"


@pytest.fixture
def session(softhsm):
    """The token without this package between."""
    import pkcs11

    token = pkcs11.lib(softhsm.module).get_token(token_label=softhsm.label)
    with token.open(rw=True, user_pin=PIN()) as opened:
        yield opened


def raw_key(session, label):
    import pkcs11

    return session.get_key(object_class=pkcs11.ObjectClass.SECRET_KEY, label=label)


def test_the_key_does_not_leave_the_token(where, label, softhsm):
    import pkcs11

    Pkcs11KeyProvider.generate(**where, key=label)
    token = pkcs11.lib(softhsm.module).get_token(token_label=softhsm.label)
    with token.open(rw=True, user_pin=PIN()) as session:
        key = raw_key(session, label)
        for name in ("SENSITIVE", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE", "PRIVATE"):
            assert key[pkcs11.Attribute[name]] is True, name
        assert key[pkcs11.Attribute.EXTRACTABLE] is False
        with pytest.raises(pkcs11.exceptions.AttributeSensitive):
            key[pkcs11.Attribute.VALUE]
        for name in ("WRAP", "UNWRAP", "DERIVE", "SIGN"):  # does one thing alone
            assert key[pkcs11.Attribute[name]] is False, name
        with pytest.raises(pkcs11.exceptions.PKCS11Error):
            key[pkcs11.Attribute.EXTRACTABLE] = True
    with token.open() as session, pytest.raises(pkcs11.exceptions.NoSuchKey):
        raw_key(session, label)  # not even seen without the PIN


def test_it_is_wrapped_on_the_token_with_its_context(where, label, session):
    import pkcs11

    provider = Pkcs11KeyProvider.generate(**where, key=label)
    key = DataKey.generate()
    blob = provider.wrap(key, context=CONTEXT).blob
    assert len(blob) == 92

    def opened(context):
        parameters = pkcs11.GCMParams(blob[:12], associated_data(context), 128)
        return raw_key(session, label).decrypt(
            blob[12:], mechanism=pkcs11.Mechanism.AES_GCM, mechanism_param=parameters
        )

    assert opened(CONTEXT) == bound_payload(key, CONTEXT)
    with pytest.raises(pkcs11.exceptions.PKCS11Error):
        opened({**CONTEXT, "partition": "val"})


def test_a_context_that_the_token_did_not_check_is_checked_here(where, label, session):
    import pkcs11

    provider = Pkcs11KeyProvider.generate(**where, key=label)
    other = {**CONTEXT, "partition": "val"}
    parameters = pkcs11.GCMParams(bytes(12), associated_data(CONTEXT), 128)
    sealed = raw_key(session, label).encrypt(
        bound_payload(DataKey.generate(), other),
        mechanism=pkcs11.Mechanism.AES_GCM,
        mechanism_param=parameters,
    )
    wrapped = WrappedKey(provider="pkcs11", key_id=provider.key_id, blob=bytes(12) + bytes(sealed))
    with pytest.raises(IntegrityError, match="its context is another one"):
        provider.unwrap(wrapped, context=CONTEXT)


@pytest.mark.parametrize(
    ("sensitive", "extractable", "bits"),
    [(False, False, 256), (True, True, 256), (False, True, 256), (True, False, 128)],
)
def test_a_key_that_could_leave_is_refused(where, label, session, sensitive, extractable, bits):
    import pkcs11

    session.generate_key(
        pkcs11.KeyType.AES,
        bits,
        label=label,
        id=b"\1",
        store=True,
        template={
            pkcs11.Attribute.SENSITIVE: sensitive,
            pkcs11.Attribute.EXTRACTABLE: extractable,
        },
    )
    with pytest.raises(KeyUnavailableError, match="could leave the token"):
        Pkcs11KeyProvider(**where, key=label)


def test_a_key_without_an_id_is_refused(where, label, session):
    import pkcs11

    session.generate_key(
        pkcs11.KeyType.AES,
        256,
        label=label,
        store=True,
        template={pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False},
    )
    with pytest.raises(KeyUnavailableError, match="no CKA_ID"):
        Pkcs11KeyProvider(**where, key=label)


def test_an_existing_key_is_left_as_it_is(where, label):
    first = Pkcs11KeyProvider.generate(**where, key=label)
    with pytest.raises(ConfigError, match="left as it is"):
        Pkcs11KeyProvider.generate(**where, key=label)
    assert Pkcs11KeyProvider(**where, key=label).key_id == first.key_id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"module": "/nowhere.so"}, "PKCS11Error"),
        ({"token": "nowhere"}, "NoSuchToken"),
        ({"key": "nowhere"}, "NoSuchKey"),
        ({"pin": EnvironmentSecret("LSEC_TEST_NOTHING")}, "LSEC_TEST_NOTHING"),
    ],
    ids=["module", "token", "key", "pin"],
)
def test_what_is_not_there_is_named(where, changes, words):
    with pytest.raises(KeyUnavailableError, match=words):
        Pkcs11KeyProvider(**{**where, "key": "nowhere", **changes})


def test_a_wrong_pin_is_refused_and_not_shown(where, label):
    Pkcs11KeyProvider.generate(**where, key=label)
    with pytest.raises(KeyUnavailableError, match="PinIncorrect") as caught:
        Pkcs11KeyProvider(**{**where, "pin": lambda: "8888-wrong-pin"}, key=label)
    assert "8888" not in str(caught.value)
    assert caught.value.__context__ is None
    with pytest.raises(ConfigError, match="does not keep secrets"):
        Pkcs11KeyProvider(**{**where, "pin": "8888-wrong-pin"}, key=label)


def test_a_pin_that_could_travel_is_not_pickled(where, label):
    import pickle

    provider = Pkcs11KeyProvider.generate(**{**where, "pin": lambda: PIN()}, key=label)
    with pytest.raises(KeyAccessError, match="cannot be pickled"):
        pickle.dumps(provider)


def test_one_login_unwraps_one_key(where, label, monkeypatch):
    """Counted where the provider talks to the token."""
    provider = Pkcs11KeyProvider.generate(**where, key=label)
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    logins = []
    original = module._session
    monkeypatch.setattr(
        module, "_session", lambda *args, **rest: logins.append(args) or original(*args, **rest)
    )
    provider.unwrap(wrapped, context=CONTEXT)
    assert len(logins) == 1


def test_a_login_of_somebody_else_is_shared_and_left(where, label, softhsm):
    import pkcs11

    provider = Pkcs11KeyProvider.generate(**where, key=label)
    token = pkcs11.lib(softhsm.module).get_token(token_label=softhsm.label)
    with token.open(user_pin=PIN()) as session:
        key = DataKey.generate()
        assert provider.unwrap(provider.wrap(key, context=CONTEXT), context=CONTEXT) == key
        assert raw_key(session, label) is not None


def test_a_failing_token_is_not_taken_for_a_wrong_key(where, label, monkeypatch):
    """A token that breaks cannot be had on demand, so its error is made here."""
    import pkcs11

    provider = Pkcs11KeyProvider.generate(**where, key=label)
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)

    class Broken:
        def decrypt(self, *args, **rest):
            raise pkcs11.exceptions.DeviceRemoved("8888-secret")

    @contextlib.contextmanager
    def broken():
        with module._session(pkcs11, where["module"], where["token"], PIN, write=False):
            yield Broken()

    monkeypatch.setattr(provider, "_key", broken)
    with pytest.raises(KeyUnavailableError, match="DeviceRemoved") as caught:
        provider.unwrap(wrapped, context=CONTEXT)
    assert "8888" not in str(caught.value)


def use_after_fork(provider, wrapped, outcome):
    try:
        provider.unwrap(wrapped, context=CONTEXT)
    except KeyUnavailableError as error:
        outcome.put(str(error))
    else:
        outcome.put("released")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_is_told(where, label):
    provider = Pkcs11KeyProvider.generate(**where, key=label)
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()
    child = context.Process(target=use_after_fork, args=(provider, wrapped, outcome))
    child.start()
    assert "was forked" in outcome.get(timeout=20)
    child.join(timeout=20)
    provider._pid = -1  # and seen in this process, too
    with pytest.raises(KeyUnavailableError, match="was forked"):
        provider.unwrap(wrapped, context=CONTEXT)


def test_without_its_package_the_extra_is_named(where, monkeypatch):
    monkeypatch.setitem(sys.modules, "pkcs11", None)  # as if it were not installed
    for act in (Pkcs11KeyProvider, Pkcs11KeyProvider.generate):
        with pytest.raises(MissingExtraError, match=r"lightning-secure\[pkcs11\]"):
            act(**where, key="x")


@pytest.mark.parametrize("may", ["ENCRYPT", "DECRYPT"])
def test_a_key_that_may_only_wrap_seals_and_one_that_may_not_is_named(where, label, session, may):
    import pkcs11

    attribute = pkcs11.Attribute
    session.generate_key(
        pkcs11.KeyType.AES,
        256,
        label=label,
        id=os.urandom(16),
        store=True,
        capabilities=pkcs11.MechanismFlag[may],
        template={
            attribute.PRIVATE: True,
            attribute.SENSITIVE: True,
            attribute.EXTRACTABLE: False,
        },
    )
    provider = Pkcs11KeyProvider(**where, key=label)
    if may == "DECRYPT":
        with pytest.raises(KeyUnavailableError, match="may not encrypt"):
            provider.wrap_all(DataKey.generate(), context=CONTEXT)
        return
    wrapped = provider.wrap_all(DataKey.generate(), context=CONTEXT)
    provider.confirm(wrapped, context=CONTEXT)
    with pytest.raises(KeyUnavailableError, match="may not decrypt"):
        provider.unwrap_any(wrapped, context=CONTEXT)
