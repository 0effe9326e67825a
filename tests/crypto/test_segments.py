from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.segments import SegmentCipher, SegmentKeys
from lightning_secure.errors import IntegrityError

KEY = DataKey(bytes(range(32)))
UUID, DATASET = bytes(range(16)), bytes(16)
PLAIN = b"eight by eight by eight" * 10


def keys(**changes):
    arguments = {"shard_uuid": UUID, "dataset_id": DATASET, "suite": 1, **changes}
    return SegmentKeys.derive(KEY, **arguments)


def cipher(digest=bytes(32)):
    return SegmentCipher(keys(), header_digest=digest)


def sealed(index=3, records=7):
    out = bytearray(len(PLAIN) + 16)
    assert cipher().seal_into(index, PLAIN, records=records, out=out) == len(out)
    return bytes(out)


def test_a_segment_comes_back():
    out = bytearray(len(PLAIN))
    assert cipher().open_into(3, sealed(), records=7, out=out) == len(PLAIN)
    assert out == PLAIN


def test_the_bytes_are_what_the_format_says():
    """A second implementation, from docs/format.md: nonce, associated data and key derivation."""
    import hmac

    prk = hmac.digest(UUID, bytes(range(32)), hashlib.sha256)
    info = b"lsec/v1" + (1).to_bytes(2, "little") + DATASET
    first = hmac.digest(prk, info + b"\x01", hashlib.sha256)
    second = hmac.digest(prk, first + info + b"\x02", hashlib.sha256)
    assert (keys().encryption, keys().commitment) == (first, second)

    nonce = b"\x01\0\0\0" + (3).to_bytes(8, "little")
    aad = bytes(32) + (3).to_bytes(8, "little") + (7).to_bytes(8, "little") + b"\x01"
    assert AESGCM(first).decrypt(nonce, sealed(), aad) == PLAIN


@pytest.mark.parametrize(("index", "records"), [(2, 7), (4, 7), (3, 6), (3, 8)])
def test_a_segment_belongs_to_its_place_and_count(index, records):
    with pytest.raises(IntegrityError, match=f"segment {index}"):
        cipher().open_into(index, sealed(), records=records, out=bytearray(len(PLAIN)))


def test_a_segment_belongs_to_its_header():
    other = cipher(hashlib.sha256(b"another header").digest())
    with pytest.raises(IntegrityError):
        other.open_into(3, sealed(), records=7, out=bytearray(len(PLAIN)))


@pytest.mark.parametrize("place", [0, 100, len(PLAIN) - 1, len(PLAIN), len(PLAIN) + 15])
def test_a_flipped_bit_is_refused(place):
    data = bytearray(sealed())
    data[place] ^= 1
    with pytest.raises(IntegrityError):
        cipher().open_into(3, data, records=7, out=bytearray(len(PLAIN)))


@pytest.mark.parametrize("length", [0, 15, 16, 100])
def test_a_cut_segment_is_refused(length):
    with pytest.raises(IntegrityError):
        cipher().open_into(3, sealed()[:length], records=7, out=bytearray(max(0, length - 16)))


def test_a_buffer_of_another_length_is_refused():
    with pytest.raises(IntegrityError):
        cipher().open_into(3, sealed(), records=7, out=bytearray(len(PLAIN) - 1))


@pytest.mark.parametrize(
    "change", [{"shard_uuid": bytes(16)}, {"dataset_id": bytes(15) + b"\1"}, {"suite": 2}]
)
def test_the_keys_belong_to_shard_dataset_and_suite(change):
    assert keys(**change).encryption != keys().encryption
    assert keys(**change).commitment != keys().commitment


def test_the_keys_have_no_printed_form():
    assert keys().encryption.hex() not in repr(keys())
    assert repr(keys().encryption) not in repr(keys())
