"""What a storage administrator could try: everything but the keys is theirs to change.

Each attack is first seen to work on a naive store, files encrypted with Fernet and an index beside
them, and then to fail on an encrypted dataset.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cryptography.fernet import Fernet

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.manifest import MANIFEST_NAME, PAYLOAD_TYPE, read_manifest
from lightning_secure.crypto.segments import SegmentCipher, SegmentKeys
from lightning_secure.crypto.signing import seal_envelope
from lightning_secure.data.format.header import HEADER_BYTES
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    IntegrityError,
    ManifestMismatchError,
    ShardCorruptedError,
    WrongKeyError,
)

ROWS = np.arange(400, dtype="int64").reshape(200, 2)
OTHER = ROWS + 10_000


def seal(root, keys, rows=ROWS, split="train", **options):
    with EncryptedShardWriter(
        root, split=split, keys=keys, segment_bytes=160, shard_bytes=800, **options
    ) as writer:
        writer.write_batch({"x": rows})
    return root


def read(root, keys, **options):
    data = EncryptedShardDataset(root, split="train", keys=keys, **options)
    (x,) = data.__getitems__(range(len(data))).batch()
    return x.numpy()


def shards(root) -> list[Path]:
    return sorted((root / "train").glob("*.lsec"))


@pytest.fixture
def sealed(tmp_path, keys):
    root = seal(tmp_path / "dataset", keys)
    assert np.array_equal(read(root, keys), ROWS)
    return root


# ---------------------------------------------------------------- the naive store


class NaiveStore:
    """Encrypted files and an index: confidential, and nothing else."""

    def __init__(self, root: Path, key: bytes, rows=ROWS):
        self.root, self.key = root, Fernet(key)
        root.mkdir()
        self.write(rows)

    def write(self, rows):
        names = []
        for i, part in enumerate(np.split(rows, 5)):
            (self.root / f"{i}.bin").write_bytes(self.key.encrypt(part.tobytes()))
            names.append(f"{i}.bin")
        (self.root / "index.json").write_text(json.dumps(names))

    def read(self):
        names = json.loads((self.root / "index.json").read_text())
        parts = [self.key.decrypt((self.root / name).read_bytes()) for name in names]
        return np.frombuffer(b"".join(parts), "int64").reshape(-1, 2)


@pytest.fixture
def naive(tmp_path):
    return NaiveStore(tmp_path / "naive", Fernet.generate_key())


def test_the_naive_store_gives_other_rows_and_does_not_notice(naive, tmp_path):
    a, b = naive.root / "0.bin", naive.root / "1.bin"
    old = a.read_bytes()
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes), b.write_bytes(a_bytes)
    assert not np.array_equal(naive.read(), ROWS)  # swapped
    naive.write(OTHER)
    a.write_bytes(old)
    assert np.array_equal(naive.read()[:40], ROWS[:40])  # replayed
    (naive.root / "index.json").write_text('["1.bin"]')
    assert len(naive.read()) == 40  # dropped


# ---------------------------------------------------------------- shards


def test_two_shards_exchanged(sealed, keys):
    first, second, *_ = shards(sealed)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    with pytest.raises(ShardCorruptedError, match="another shard stands in its place"):
        read(sealed, keys)


def test_a_shard_of_another_dataset_under_the_same_key(sealed, keys, tmp_path):
    other = seal(tmp_path / "other", keys, OTHER)
    shutil.copyfile(shards(other)[0], shards(sealed)[0])
    with pytest.raises(ShardCorruptedError, match="another shard"):
        read(sealed, keys)


def test_an_older_shard_replayed(sealed, keys, tmp_path):
    old = [path.read_bytes() for path in shards(sealed)]
    seal(sealed, keys, OTHER, replace=True)
    for path, data in zip(shards(sealed), old, strict=True):
        path.write_bytes(data)
    with pytest.raises(ShardCorruptedError):
        read(sealed, keys)


def test_a_dropped_shard(sealed, keys):
    shards(sealed)[2].unlink()
    with pytest.raises(ShardCorruptedError, match="cannot be opened"):
        read(sealed, keys)


@pytest.mark.parametrize("length", [0, 100, HEADER_BYTES, HEADER_BYTES + 176, -176, -1])
def test_a_truncated_shard(sealed, keys, length):
    path = shards(sealed)[0]
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ShardCorruptedError, match="bytes where the manifest has"):
        read(sealed, keys)


@pytest.mark.parametrize("extra", [b"\0", bytes(176)])
def test_an_extended_shard(sealed, keys, extra):
    path = shards(sealed)[0]
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(ShardCorruptedError):
        read(sealed, keys)


def test_segments_reordered(sealed, keys):
    path = shards(sealed)[0]
    data = path.read_bytes()
    head, a, b = data[:HEADER_BYTES], data[HEADER_BYTES:][:176], data[HEADER_BYTES:][176:352]
    path.write_bytes(head + b + a + data[HEADER_BYTES + 352 :])
    with pytest.raises(ShardCorruptedError, match="not the ones that the manifest was signed for"):
        read(sealed, keys)


def test_segments_reordered_after_the_shard_was_opened(sealed, keys):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    data[0]
    path = shards(sealed)[0]
    raw = bytearray(path.read_bytes())
    second = slice(HEADER_BYTES + 176, HEADER_BYTES + 352)
    raw[second] = raw[HEADER_BYTES : HEADER_BYTES + 176]
    with path.open("r+b") as file:  # in place: the reader has this very file open
        file.write(raw)
    with pytest.raises(ShardCorruptedError, match="segment 1"):
        data[15]


def offsets(size):
    """Every byte of the header that means something, and some of the segments and their tags."""
    yield from (0, 8, 10, 12, *range(16, 136, 7), 136, HEADER_BYTES - 1)
    for segment in range(5):
        start = HEADER_BYTES + segment * 176
        yield from (start, start + 159, start + 160, start + 175)
    yield size - 1


def test_a_flipped_bit_anywhere(sealed, keys):
    path = shards(sealed)[1]
    good = path.read_bytes()
    for offset in offsets(len(good)):
        bad = bytearray(good)
        bad[offset] ^= 0x10
        path.write_bytes(bad)
        with pytest.raises(ShardCorruptedError, match=path.name):
            read(sealed, keys)
    path.write_bytes(good)
    assert np.array_equal(read(sealed, keys), ROWS)


def test_nothing_is_returned_of_a_batch_with_one_bad_row(sealed, keys):
    path = shards(sealed)[-1]
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    with pytest.raises(ShardCorruptedError):
        data.__getitems__([0, 1, 2, 199])
    assert data[0][0].tolist() == [0, 1]


# ---------------------------------------------------------------- the manifest


def test_a_bit_flipped_in_the_manifest(sealed, keys):
    path = sealed / MANIFEST_NAME
    good = path.read_bytes()
    for offset in range(0, len(good), 97):
        bad = bytearray(good)
        bad[offset] ^= 1
        path.write_bytes(bad)
        with pytest.raises(IntegrityError):
            read(sealed, keys)


def test_a_manifest_signed_by_another_key(sealed, keys, other_keys):
    manifest = read_manifest(sealed, trusted=keys.trusted_signers)
    payload = canonical_json(manifest.to_json())
    forged = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=other_keys.signer)
    (sealed / MANIFEST_NAME).write_bytes(forged)
    with pytest.raises(ManifestMismatchError, match="no valid signature"):
        read(sealed, keys)


def test_a_manifest_without_a_signature(sealed, keys):
    path = sealed / MANIFEST_NAME
    envelope = json.loads(path.read_text())
    for signatures in ([], None, [{}]):
        path.write_text(json.dumps({**envelope, "signatures": signatures}))
        with pytest.raises(ManifestMismatchError):
            read(sealed, keys)


def test_a_shard_dropped_from_the_manifest(sealed, keys):
    path = sealed / MANIFEST_NAME
    envelope = json.loads(path.read_text())
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["splits"]["train"]["shards"].pop()
    envelope["payload"] = base64.b64encode(canonical_json(payload)).decode()
    path.write_text(json.dumps(envelope))
    with pytest.raises(ManifestMismatchError):
        read(sealed, keys)


def test_the_manifest_of_another_dataset(sealed, keys, tmp_path):
    other = seal(tmp_path / "other", keys, OTHER)
    shutil.copyfile(other / MANIFEST_NAME, sealed / MANIFEST_NAME)
    with pytest.raises(ShardCorruptedError):
        read(sealed, keys)
    pin = read_manifest(other, trusted=keys.trusted_signers).digest
    with pytest.raises(ManifestMismatchError, match="pinned"):
        read(seal(tmp_path / "third", keys), keys, manifest_digest=pin)


def test_a_rolled_back_dataset_is_seen_with_a_pin_and_only_then(sealed, keys, tmp_path):
    old = shutil.copytree(sealed, tmp_path / "old")
    seal(sealed, keys, OTHER, replace=True)
    generation = read_manifest(sealed, trusted=keys.trusted_signers).generation
    shutil.rmtree(sealed)
    shutil.copytree(old, sealed)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        read(sealed, keys, min_generation=generation)
    assert np.array_equal(read(sealed, keys), ROWS)  # as docs/threat-model.md says


def test_a_plaintext_in_place_of_the_dataset(sealed, keys):
    (sealed / MANIFEST_NAME).unlink()
    np.save(sealed / "train" / "x.npy", OTHER)
    with pytest.raises(ManifestMismatchError, match="not an encrypted dataset"):
        read(sealed, keys)


# ---------------------------------------------------------------- insiders


def rewritten(root, keys, change):
    """Let the signer themselves write a manifest with a change, to test what is behind it."""
    manifest = read_manifest(root, trusted=keys.trusted_signers).to_json()
    change(manifest)
    payload = canonical_json(manifest)
    envelope = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=keys.signer)
    (root / MANIFEST_NAME).write_bytes(envelope)


def test_wrapped_keys_exchanged(sealed, keys):
    def change(manifest):
        a, b, *_ = manifest["splits"]["train"]["shards"]
        a["wrapped_key"], b["wrapped_key"] = b["wrapped_key"], a["wrapped_key"]

    rewritten(sealed, keys, change)
    with pytest.raises(IntegrityError, match="moved from elsewhere"):
        read(sealed, keys)


def test_a_key_that_the_shard_is_not_committed_to(sealed, keys):
    """The data key of one shard, properly wrapped for another one."""
    manifest = read_manifest(sealed, trusted=keys.trusted_signers)
    partition = manifest.open_partition("train", keys)
    first, second, *_ = manifest.splits["train"].shards
    stolen = partition.seal(partition.open(second), shard_uuid=first.uuid)

    def change(value):
        value["splits"]["train"]["shards"][0]["wrapped_key"] = base64.b64encode(stolen).decode()

    rewritten(sealed, keys, change)
    with pytest.raises(ShardCorruptedError, match="commitment"):
        read(sealed, keys)


@pytest.mark.parametrize("field", ["records", "segments"])
def test_a_manifest_that_contradicts_a_shards_header(sealed, keys, field):
    def change(manifest):
        manifest["splits"]["train"]["shards"][0][field] += 1

    rewritten(sealed, keys, change)
    with pytest.raises(ShardCorruptedError, match="contradict"):
        read(sealed, keys)


def forge_a_segment(root, keys):
    """Whoever may read has the data key, and can encrypt other rows under it, with a valid tag."""
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    entry = manifest.splits["train"].shards[0]
    key = manifest.open_partition("train", keys).open(entry)
    derived = SegmentKeys.derive(
        key, shard_uuid=entry.uuid, dataset_id=manifest.dataset_id, suite=1
    )
    cipher = SegmentCipher(derived, header_digest=entry.header_sha256)
    forged = bytearray(176)
    cipher.seal_into(0, OTHER[:10].tobytes(), records=10, out=forged)
    with (root / entry.file).open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(forged)


def test_a_reader_who_rewrites_a_segment(sealed, keys):
    forge_a_segment(sealed, keys)
    with pytest.raises(ShardCorruptedError, match="not the ones that the manifest was signed for"):
        read(sealed, keys)


def test_a_reader_who_rewrites_a_segment_of_an_open_shard(sealed, keys):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    data[30]
    forge_a_segment(sealed, keys)
    with pytest.raises(ShardCorruptedError, match="tag mismatch in segment 0"):
        data[0]


def test_an_unknown_version_or_suite_that_somebody_signed(sealed, keys):
    """A downgrade: the header says another suite, and the manifest was signed over it."""
    import hashlib

    path = shards(sealed)[0]
    for offset in (8, 10, 12):
        raw = bytearray(path.read_bytes())
        raw[offset] ^= 3
        original = bytes(raw)
        path.write_bytes(raw)
        digest = base64.b64encode(hashlib.sha256(original[:HEADER_BYTES]).digest()).decode()

        def change(manifest, digest=digest):
            manifest["splits"]["train"]["shards"][0]["header_sha256"] = digest

        rewritten(sealed, keys, change)
        with pytest.raises(ShardCorruptedError, match="unknown"):
            read(sealed, keys)
        raw[offset] ^= 3
        path.write_bytes(raw)


def test_a_partition_key_of_somebody_else(sealed, keys, other_keys):
    def change(manifest):
        for key in manifest["partitions"]["train"]:
            key["key_id"] = other_keys.key_id

    rewritten(sealed, keys, change)
    with pytest.raises(WrongKeyError, match=other_keys.key_id):
        read(sealed, keys)
