"""AES-GCM is not key-committing: one ciphertext can be made that opens under two keys.

Somebody who seals for two readers could so show each of them other rows, in one shard with one
signature. The commitment in the header is what stops it.
"""

from __future__ import annotations

import hashlib

import make
import numpy as np
import pytest
import reference
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.segments import SegmentCipher, SegmentKeys
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.shards.shard import ShardReader
from lightning_secure.data.storage import LocalStorage
from lightning_secure.errors import ShardCorruptedError

SCHEMA = [make.column("x", "tensor", "int64", [2])]
RECORDS = 4
UUID, KEYS = make.drawn("uuid", 16), [make.drawn("one", 32), make.drawn("two", 32)]
R = 0xE1 << 120  # GCM's polynomial, in its own order of bits


def times(a: int, b: int) -> int:
    """Multiply in GF(2^128) as GCM does (SP 800-38D, section 6.3)."""
    result = 0
    for bit in range(127, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (R if b & 1 else 0)
    return result


def inverse(a: int) -> int:
    result, power = 1 << 127, a  # a ^ (2^128 - 2)
    for _ in range(127):
        power = times(power, power)
        result = times(result, power)
    return result


def block(key: bytes, data: bytes) -> int:
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return int.from_bytes(cipher.update(data), "big")


def blocks(data: bytes) -> list[int]:
    padded = data.ljust(-(-len(data) // 16) * 16, b"\0")
    return [int.from_bytes(padded[i : i + 16], "big") for i in range(0, len(padded), 16)]


def tag(key: bytes, nonce: bytes, aad: bytes, sealed: bytes) -> int:
    h, total = block(key, bytes(16)), 0
    lengths = (len(aad) * 8 << 64) | len(sealed) * 8
    for value in [*blocks(aad), *blocks(sealed), lengths]:
        total = times(total ^ value, h)
    return total ^ block(key, nonce + b"\0\0\0\1")


def for_two_keys(keys: list[bytes], nonce: bytes, aad: bytes, length: int) -> bytes:
    """Return a ciphertext of ``length`` bytes, and its tag, that are valid under both keys.

    The last block is solved for; the tag is linear in it.
    """
    sealed = bytes(length)
    one, two = (tag(key, nonce, aad, sealed) for key in keys)
    squares = [times(h, h) for h in (block(key, bytes(16)) for key in keys)]
    last = times(one ^ two, inverse(squares[0] ^ squares[1]))
    sealed = sealed[:-16] + last.to_bytes(16, "big")
    return sealed + tag(keys[0], nonce, aad, sealed).to_bytes(16, "big")


@pytest.fixture(scope="module")
def forged():
    """A shard that commits to the first key, with a segment that opens under both."""
    encryption, commitment = zip(
        *(reference.segment_keys(dek, UUID, make.DATASET) for dek in KEYS), strict=True
    )
    header = reference.pack_header(
        dataset=make.DATASET,
        uuid=UUID,
        number=0,
        segments=1,
        records=RECORDS,
        per_segment=RECORDS,
        length=16 * RECORDS,
        schema=hashlib.sha256(reference.canonical(SCHEMA)).digest(),
        commitment=commitment[0],
    )
    nonce, aad = reference.nonce_of(0), reference.aad_of(header, 0, RECORDS)
    sealed = for_two_keys(list(encryption), nonce, aad, 16 * RECORDS)
    return header, sealed, [AESGCM(key).decrypt(nonce, sealed, aad) for key in encryption]


def opened(folder, forged, dek):
    """Let the sealer, who signs, name ``dek`` as the shard's key."""
    header, sealed, _ = forged
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "x.lsec").write_bytes(header + sealed)
    partition = PartitionKey(DataKey(make.PARTITION), dataset_id=make.DATASET, partition="train")
    entry = ShardEntry(
        file="train/x.lsec",
        uuid=UUID,
        number=0,
        records=RECORDS,
        segments=1,
        size=len(header) + len(sealed),
        header_sha256=hashlib.sha256(header).digest(),
        merkle_root=reference.tree_hash([sealed[-16:]]),
        commitment=header[104:136],
        wrapped_key=partition.seal(DataKey(dek), shard_uuid=UUID),
    )
    reader = ShardReader(
        LocalStorage(folder),
        entry,
        key=partition.open(entry),
        schema=Schema.from_json(SCHEMA),
        dataset_id=make.DATASET,
    )
    try:
        return reader.read_segment(0)["x"].numpy()
    finally:
        reader.close()


def test_the_cipher_alone_takes_it_under_both_keys(forged):
    header, sealed, (one, two) = forged
    assert one != two
    for dek, expected in zip(KEYS, (one, two), strict=True):
        keys = SegmentKeys.derive(DataKey(dek), shard_uuid=UUID, dataset_id=make.DATASET, suite=1)
        cipher = SegmentCipher(keys, header_digest=hashlib.sha256(header).digest())
        out = bytearray(len(expected))
        cipher.open_into(0, sealed, records=RECORDS, out=out)
        assert out == expected


def test_a_shard_opens_under_one_key_only(forged, tmp_path):
    rows = np.frombuffer(forged[2][0], "<i8").reshape(RECORDS, 2)
    assert np.array_equal(opened(tmp_path, forged, KEYS[0]), rows)
    with pytest.raises(ShardCorruptedError, match="commitment"):
        opened(tmp_path, forged, KEYS[1])
