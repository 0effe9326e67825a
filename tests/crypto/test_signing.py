from __future__ import annotations

import json
import pickle

import pytest

from lightning_secure.crypto.encoding import b64encode
from lightning_secure.crypto.signing import (
    Signer,
    open_envelope,
    pre_authentication_encoding,
    seal_envelope,
)
from lightning_secure.errors import IntegrityError, KeyAccessError, ManifestMismatchError

SIGNER = Signer(bytes(range(32)))
STRANGER = Signer(bytes(32))
TRUSTED = {SIGNER.key_id: SIGNER.public_key}
KIND = "application/test"


def opened(data, trusted=TRUSTED, kind=KIND):
    return open_envelope(data, payload_type=kind, trusted=trusted, what="the document")


def changed(**fields):
    envelope = json.loads(seal_envelope(b"hello", payload_type=KIND, signer=SIGNER))
    return json.dumps({**envelope, **fields}).encode()


def test_the_payload_comes_back():
    assert opened(seal_envelope(b"hello", payload_type=KIND, signer=SIGNER)) == b"hello"


def test_the_signed_bytes_are_those_of_the_dsse_specification():
    signed = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_strangers_signature_is_refused():
    data = seal_envelope(b"hello", payload_type=KIND, signer=STRANGER)
    with pytest.raises(ManifestMismatchError, match=SIGNER.key_id):
        opened(data)
    with pytest.raises(ManifestMismatchError, match="none is trusted"):
        opened(data, trusted={})


def test_a_stranger_cannot_pose_under_a_trusted_id():
    envelope = json.loads(seal_envelope(b"hello", payload_type=KIND, signer=STRANGER))
    envelope["signatures"][0]["keyid"] = SIGNER.key_id
    with pytest.raises(ManifestMismatchError):
        opened(json.dumps(envelope).encode())


def test_another_payload_under_the_signature_is_refused():
    with pytest.raises(ManifestMismatchError):
        opened(changed(payload=b64encode(b"other")))


def test_a_document_of_another_type_is_refused():
    with pytest.raises(ManifestMismatchError, match="type"):
        opened(seal_envelope(b"hello", payload_type="application/other", signer=SIGNER))
    # and so is the same payload whose type was only relabelled
    with pytest.raises(ManifestMismatchError):
        opened(changed(payloadType="application/other"), kind="application/other")


def test_one_good_signature_among_others_is_enough():
    good = json.loads(seal_envelope(b"hello", payload_type=KIND, signer=SIGNER))["signatures"]
    foreign = json.loads(seal_envelope(b"hello", payload_type=KIND, signer=STRANGER))["signatures"]
    broken = [{"keyid": SIGNER.key_id, "sig": b64encode(bytes(64))}]
    assert opened(changed(signatures=[*foreign, *broken, *good])) == b"hello"


@pytest.mark.parametrize("signatures", [None, {}, [], [1], [{}], [{"keyid": ["x"]}]])
def test_malformed_signatures_count_for_nothing(signatures):
    with pytest.raises(ManifestMismatchError):
        opened(changed(signatures=signatures))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", changed(payload=None), changed(signatures=[{"keyid": SIGNER.key_id}])],
)
def test_what_is_not_an_envelope_is_refused(data):
    with pytest.raises(IntegrityError):
        opened(data)


def test_a_signer_shows_nothing_and_refuses_pickling():
    assert bytes(range(32)).hex() not in repr(SIGNER)
    assert repr(SIGNER) == f"Signer({SIGNER.key_id})"
    with pytest.raises(KeyAccessError):
        pickle.dumps(SIGNER)


def test_a_signing_key_has_32_bytes():
    with pytest.raises(KeyAccessError, match="32 bytes"):
        Signer(bytes(31))
