"""Bytes flipped, cut, repeated, moved and zeroed at every place where the format has a seam.

Each mutation gives an IntegrityError, or the very rows that were sealed; never another exception, a
hang, much memory or other rows. The second reader says what other rows would be.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import shutil
import struct

import make
import pytest
import reference
import torch
from test_files import bounded

from lightning_secure import EncryptedShardDataset, LocalKeyProvider
from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import Schema, decode_segment
from lightning_secure.data.shards.shard import ShardReader
from lightning_secure.data.storage import LocalStorage
from lightning_secure.errors import (
    CheckpointCorruptedError,
    ConfigError,
    IntegrityError,
    WrongKeyError,
)
from lightning_secure.plugins.checkpoint import opened

SCHEMA, ROWS = make.tables()["all kinds"]
TYPED = Schema.from_json(SCHEMA)
HEADER_FIELDS = [0, 8, 10, 12, 16, 32, 48, 52, 56, 64, 68, 72, 104, 136]


def as_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return value.encode() if isinstance(value, str) else value


def raw(columns):
    return {name: [as_bytes(value) for value in values] for name, values in columns.items()}


def mutations(data: bytes, seams: list[int], size: int = 9):
    """Each seam with what can be done there; ``size`` is how much is cut, repeated and moved."""
    for at in seams:
        block, rest = data[at : at + size], data[at + size :]
        if at < len(data):
            for bit in (1, 0x80):
                yield data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            yield data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        yield data[:at] + bytes(len(block)) + rest  # zeroed
        yield data[:at] + b"\xff" * len(block) + rest
        yield data[:at]  # cut off
        yield data[:at] + rest  # cut out
        yield data[:at] + block + block + rest  # repeated
        yield data[:at] + rest[:size] + block + rest[size:]  # moved
        yield data[:at] + b"\0" + data[at:]  # inserted


@pytest.fixture
def sealed(tmp_path):
    root = shutil.copytree(make.HERE / "v1" / "dataset", tmp_path / "dataset")
    key_file = tmp_path / "project.kek"
    make.key_file(key_file)
    return root, LocalKeyProvider(key_file)


def read(root, keys):
    data = EncryptedShardDataset(root, split="train", keys=keys, output="dict")
    return raw(data.__getitems__(range(len(data))).batch())


def test_a_shard(sealed):
    root, keys = sealed
    assert read(root, keys) == ROWS
    for path in sorted((root / "train").iterdir()):
        good = path.read_bytes()
        length = struct.unpack_from("<I", good, 68)[0]
        starts = range(4096, len(good), length + 16)
        seams = [*HEADER_FIELDS, 2000, 4095, *starts, *(start + 8 for start in starts)]
        seams += [start - 16 for start in starts[1:]] + [len(good) - 17, len(good) - 16]
        for bad in mutations(good, [*seams, len(good) - 1, len(good)]):
            if bad != good:
                path.write_bytes(bad)
                with pytest.raises(IntegrityError):
                    read(root, keys)
        path.write_bytes(good)
    assert read(root, keys) == ROWS


def test_an_envelope(sealed):
    """No byte of it may differ, except for white space, which nothing depends on."""
    root, keys = sealed
    path = root / "manifest.json"
    good = path.read_bytes()
    digest = read_manifest(root, trusted=keys.trusted_signers).digest
    seams = [at for at, byte in enumerate(good) if byte in b'{}[]:,"=']
    seams += [at + 1 for at in seams] + list(range(0, len(good), 41))
    for bad in itertools.chain(
        mutations(good, seams), (good[:at] + b" " + good[at:] for at in seams)
    ):
        path.write_bytes(bad)
        try:
            assert read_manifest(root, trusted=keys.trusted_signers).digest == digest
        except IntegrityError:
            continue
        assert json.loads(bad) == json.loads(good)


# ---------------------------------------------------------------- signed by somebody trusted

VALUES = [
    None, True, -1, 0, 1, 3, 2**31, 2**53, 2**63 - 1, 2**63, 10**400, 1.5, float("nan"),
    "", "x", "0" * 32, "../../etc/passwd", "train/../x", "\ud800", "AAAA", "é",
    [], {}, [[]], ["x"], [1] * 70, [2**31 - 1] * 4, {"": ""}, "deep",
]  # fmt: skip


def places(value, path=()):
    """The path to each part of a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        if isinstance(part, dict | list):
            yield from places(part, (*path, name))
        else:
            yield (*path, name)


def with_value(manifest, path, value):
    changed = json.loads(json.dumps(manifest))
    *above, last = path
    target = changed
    for name in above:
        target = target[name]
    target[last] = value
    return changed


def sign(root, manifest):
    deep = "[" * 500 + "]" * 500
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    text = text.replace('"deep"', deep)
    payload = text.encode(errors="surrogatepass")
    (root / "manifest.json").write_bytes(reference.seal_envelope(payload, make.SEED))


def test_a_manifest_that_a_trusted_key_signed(sealed):
    """Each part of it replaced by each of many values, taken out, and joined by another."""
    root, keys = sealed
    public = keys.signer.public_key
    good = reference.read_manifest(root, public)
    accepted = set()
    with bounded(seconds=60):
        for path in list(places(good))[1:]:
            for value in VALUES:
                changed = with_value(good, path, value)
                if json.dumps(changed) == json.dumps(good):
                    continue
                sign(root, changed)
                try:
                    rows = read(root, keys)
                except (IntegrityError, WrongKeyError):
                    continue
                except ConfigError:  # a dataset without splits is one
                    assert (path, value) == (("splits",), {})
                    continue
                assert rows == ROWS, (path, value)
                accepted.add(path)
    # What does not say which rows there are, and may be anything of its type.
    assert accepted <= {
        ("created",),
        ("generation",),
        ("previous",),
        ("splits", "train", "attributes"),
        ("splits", "train", "attributes", "anonymize.name"),
    }


def test_a_manifest_with_a_field_more_or_less(sealed):
    root, keys = sealed
    good = reference.read_manifest(root, keys.signer.public_key)
    for path in places(good):
        changed = json.loads(json.dumps(good))
        target = changed
        for name in path[:-1]:
            target = target[name]
        inner = target if not path else target[path[-1]]
        if path:
            del target[path[-1]]
            sign(root, changed)
            # What is left is a dataset of its signer: fewer remarks, fewer rows, no split.
            if path[-1] not in ("anonymize.name", "train") and path[-2:-1] != ("shards",):
                with pytest.raises(IntegrityError):
                    read(root, keys)
        if isinstance(inner, dict) and path[-1:] not in [("attributes",), ("partitions",)]:
            changed = json.loads(json.dumps(good))
            target = changed
            for name in path:
                target = target[name]
            target["more"] = 1
            sign(root, changed)
            with pytest.raises(IntegrityError):
                read(root, keys)


def test_a_manifest_that_a_stranger_signed(sealed):
    root, keys = sealed
    good = json.loads((root / "manifest.json").read_bytes())
    payload = base64.b64decode(good["payload"])
    forged = json.loads(reference.seal_envelope(payload, bytes(32)))
    renamed = json.loads(json.dumps(forged))
    renamed["signatures"][0]["keyid"] = good["signatures"][0]["keyid"]
    for bad in (forged, renamed):
        (root / "manifest.json").write_bytes(reference.canonical(bad))
        with pytest.raises(IntegrityError):
            read(root, keys)


# ---------------------------------------------------------------- sealed by somebody with the key


def open_shard(folder, data, entry, schema=TYPED):
    """Read a shard whose manifest entry agrees with it, whatever it holds."""
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "x.lsec").write_bytes(data)
    partition = PartitionKey(DataKey(make.PARTITION), dataset_id=make.DATASET, partition="train")
    wrapped = partition.seal(DataKey(make.drawn("dek", 32)), shard_uuid=make.drawn("uuid", 16))
    typed = ShardEntry.from_json(
        {**entry, "file": "train/x.lsec", "wrapped_key": reference.b64(wrapped)}
    )
    reader = ShardReader(
        LocalStorage(folder),
        typed,
        key=partition.open(typed),
        schema=schema,
        dataset_id=make.DATASET,
    )
    with contextlib.closing(reader):
        columns = {name: [] for name in schema.names}
        for index in range(reader.header.segments):
            for name, values in raw(reader.read_segment(index)).items():
                columns[name] += values
    return columns


def seal(plaintexts, counts, schema=SCHEMA):
    return reference.seal_shard(
        make.drawn("dek", 32),
        plaintexts,
        counts,
        dataset=make.DATASET,
        uuid=make.drawn("uuid", 16),
        number=0,
        schema=schema,
    )


def seams_of(schema, columns, n):
    """Where columns, offset tables, offsets and values begin, and a byte before and after."""
    position, found = 0, []
    for column in schema:
        position = reference.up(position)
        found.append(position)
        rows = columns[column["name"]]
        if column["kind"] != "tensor":
            found += range(position, position + 4 * (n + 1), 4)
            position = reference.up(position + 4 * (n + 1))
            found.append(position)
        position += sum(map(len, rows))
        found.append(position)
    return sorted({at + step for at in found for step in (-1, 0, 1) if at + step >= 0})


@pytest.mark.parametrize("name", make.tables())
def test_a_segment_with_any_content(name):
    """The second reader and this package agree on what it holds, or both refuse it."""
    schema, rows = make.tables()[name]
    n = len(next(iter(rows.values())))
    typed = Schema.from_json(schema)
    good = reference.encode_segment(schema, rows)
    refused = 0
    with bounded(seconds=60):
        for size in (4, 9):
            for bad in mutations(good, seams_of(schema, rows, n), size):
                for records in (n, n + 1, n - 1, 2**31):
                    try:
                        expected = reference.decode_segment(schema, bad, records)
                    except reference.RefusedError:
                        expected = None
                    try:
                        found = raw(decode_segment(typed, bytearray(bad), records=records))
                    except IntegrityError:
                        found = None
                    assert found == expected, (bad, records)
                    refused += found is None
    assert refused > 100


def test_a_shard_with_any_content(tmp_path):
    """The same through the whole reader, with a valid tag, root and manifest over the content."""
    good = reference.encode_segment(SCHEMA, ROWS)
    assert open_shard(tmp_path, *seal([good], [6])) == ROWS
    for bad in mutations(good, seams_of(SCHEMA, ROWS, 6)[::5]):
        if not bad:
            continue
        try:
            expected = reference.decode_segment(SCHEMA, bad, 6)
        except reference.RefusedError:
            with pytest.raises(IntegrityError):
                open_shard(tmp_path, *seal([bad], [6]))
        else:
            assert open_shard(tmp_path, *seal([bad], [6])) == expected


@pytest.mark.parametrize("name", ["tensor of bool", "tensor of int16"])
def test_a_dataset_of_fixed_rows_with_any_content(sealed, name):
    """It is read by a way of its own, which knows beforehand where everything lies."""
    root, keys = sealed
    schema, rows = make.tables()[name]
    manifest = reference.read_manifest(root, keys.signer.public_key)
    split = manifest["splits"]["train"]
    dek, uuid = make.drawn("dek", 32), make.drawn("uuid", 16)
    context = {"dataset": make.DATASET.hex(), "partition": "train"}
    context |= {"purpose": "shard", "shard": uuid.hex()}
    wrapped = reference.b64(reference.wrap(make.PARTITION, dek, context, nonce=bytes(12)))
    good = reference.encode_segment(schema, rows)
    refused = 0
    for plain in [good, *mutations(good, list(range(len(good) + 1)))]:
        if not plain:
            continue
        data, entry = seal([plain], [3], schema)
        (root / "train" / "x.lsec").write_bytes(data)
        split["schema"] = schema
        split["shards"] = [{**entry, "file": "train/x.lsec", "wrapped_key": wrapped}]
        sign(root, manifest)
        try:
            expected = reference.decode_segment(schema, plain, 3)
        except reference.RefusedError:
            refused += 1
            with pytest.raises(IntegrityError):
                read(root, keys)
        else:
            assert read(root, keys) == expected
    assert refused > 30


EXTREMES = {"<H": [0, 1, 2, 2**16 - 1], "<I": [0, 1, 2, 5, 7, 2**20 + 1, 2**26, 2**32 - 1]}
EXTREMES["<Q"] = [0, 1, 2, 5, 7, 2**32, 2**63, 2**64 - 1]


def test_a_header_with_any_numbers(tmp_path):
    """Hashed and signed over, and contradicting itself, the file or the manifest."""
    parts = [
        reference.encode_segment(SCHEMA, {k: v[a:b] for k, v in ROWS.items()})
        for a, b in ((0, 2), (2, 4), (4, 6))
    ]
    length = max(map(len, parts))
    plain = [part.ljust(length, b"\0") for part in parts[:-1]] + parts[-1:]
    good, entry = seal(plain, [2, 2, 2])
    assert open_shard(tmp_path, good, entry) == ROWS
    fields = [(8, "<H"), (10, "<H"), (12, "<I"), (48, "<I"), (52, "<I"), (56, "<Q")]
    fields += [(64, "<I"), (68, "<I")]
    names = {48: "number", 52: "segments", 56: "records"}
    with bounded(seconds=60):
        for offset, form in fields:
            for value in EXTREMES[form]:
                bad = bytearray(good)
                struct.pack_into(form, bad, offset, value)
                if bad == good:
                    continue
                signed = {**entry, "header_sha256": header_digest(bad)}
                for claims in ({}, {names.get(offset, "number"): value}):
                    with pytest.raises(IntegrityError):
                        open_shard(tmp_path, bytes(bad), {**signed, **claims})
        for size in (1, 4096, len(good) - 1, len(good) + 1, 2**62):
            with pytest.raises(IntegrityError):
                open_shard(tmp_path, good, {**entry, "size": size})


def header_digest(data):
    return reference.b64(hashlib.sha256(data[:4096]).digest())


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint(tmp_path, sealed):
    _, keys = sealed
    good = (make.HERE / "v1" / "stream.ckpt").read_bytes()
    path = tmp_path / "x.ckpt"
    start = 14 + int.from_bytes(good[10:14], "little")
    end = start + 56 + 16384
    seams = [*range(0, 16), *range(16, start, 37), start - 1, start, start + 24, start + 56]
    seams += [end - 1, end, end + 15, end + 16, len(good) - 17, len(good) - 1, len(good)]
    for bad in mutations(good, seams):
        if bad == good:
            continue
        path.write_bytes(bad)
        with (
            pytest.raises((CheckpointCorruptedError, WrongKeyError)),
            opened(path, keys=keys) as stream,
        ):
            stream.read()
