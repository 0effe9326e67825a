"""A second reader of the format, written from docs/format.md alone, without this package."""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lightning_secure import Column, EncryptedShardWriter, Schema


def hkdf(key, info, salt=None, length=32):
    return HKDF(SHA256(), length, salt, info).derive(key)


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def unwrap(key, blob, context):
    aad = b"lsec/v1/wrap\0" + canonical(context)
    return AESGCM(hkdf(key, b"lsec/v1/key-wrap")).decrypt(blob[:12], blob[12:], aad)


def tree_hash(leaves):
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    half = 1
    while half * 2 < len(leaves):
        half *= 2
    left, right = tree_hash(leaves[:half]), tree_hash(leaves[half:])
    return hashlib.sha256(b"\1" + left + right).digest()


def up(position):
    return -(-position // 8) * 8


def read(root: Path, split: str, key_file: Path) -> dict[str, list]:
    secrets = json.loads(key_file.read_text())
    kek = base64.b64decode(secrets["kek"])
    public = Ed25519PrivateKey.from_private_bytes(
        base64.b64decode(secrets["signing_key"])
    ).public_key()

    envelope = json.loads((root / "manifest.json").read_text())
    kind = envelope["payloadType"].encode()
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    assert signature["keyid"] == hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    public.verify(base64.b64decode(signature["sig"]), signed)
    manifest = json.loads(payload)
    assert canonical(manifest) == payload

    entry = manifest["splits"][split]
    groups = [entry, *entry.get("groups", [])]
    names = [column["name"] for group in groups for column in group["schema"]]
    columns: dict[str, list] = {name: [] for name in entry.get("order", names)}
    assert sorted(columns) == sorted(names)
    for group in groups:
        (wrapped,) = manifest["partitions"][group["partition"]]
        assert wrapped["key_id"] == hkdf(kek, b"lsec/v1/key-id", length=16).hex()
        context = {"dataset": manifest["dataset_id"], "partition": group["partition"]}
        partition = unwrap(
            kek, base64.b64decode(wrapped["blob"]), {**context, "purpose": "partition"}
        )
        for shard in group["shards"]:
            dek = unwrap(
                partition,
                base64.b64decode(shard["wrapped_key"]),
                {**context, "purpose": "shard", "shard": shard["uuid"]},
            )
            read_shard((root / shard["file"]).read_bytes(), shard, group["schema"], dek, columns)
        if "subject_key" in group:
            blob = base64.b64decode(group["subject_key"])
            key = unwrap(partition, blob, {**context, "purpose": "subjects"})
            owners = [(shard["subject"], shard["records"]) for shard in entry["shards"]]
            columns["(subject)"] = [owner for owner, count in owners for _ in range(count)]
            columns["(pseudonyms)"] = [hkdf(key, b"lsec/v1/subject")]
    return columns


def read_shard(data, shard, schema, dek, columns):
    header = data[:4096]
    assert len(data) == shard["size"]
    assert hashlib.sha256(header).digest() == base64.b64decode(shard["header_sha256"])
    magic, version, suite, flags = struct.unpack_from("<8sHHI", header, 0)
    dataset, uuid = header[16:32], header[32:48]
    number, segments, records, per_segment, length = struct.unpack_from("<IIQII", header, 48)
    schema_digest, commitment = header[72:104], header[104:136]
    assert (magic, version, suite, flags) == (b"LSECSHRD", 1, 1, 0)
    assert (uuid.hex(), number, segments, records) == (
        shard["uuid"],
        shard["number"],
        shard["segments"],
        shard["records"],
    )
    assert schema_digest == hashlib.sha256(canonical(schema)).digest()
    assert not any(header[136:])
    info = b"lsec/v1" + struct.pack("<H", suite) + dataset
    expanded = hkdf(dek, info, salt=uuid, length=64)
    assert expanded[32:] == commitment == base64.b64decode(shard["commitment"])

    sealed = [
        data[4096 + i * (length + 16) : min(4096 + (i + 1) * (length + 16), len(data))]
        for i in range(segments)
    ]
    assert tree_hash([part[-16:] for part in sealed]) == base64.b64decode(shard["merkle_root"])
    for i, part in enumerate(sealed):
        count = min(per_segment, records - i * per_segment)
        nonce = b"\1\0\0\0" + struct.pack("<Q", i)
        aad = hashlib.sha256(header).digest() + struct.pack("<QQB", i, count, 1)
        read_segment(AESGCM(expanded[:32]).decrypt(nonce, part, aad), schema, count, columns)


def read_segment(plain, schema, n, columns):
    position = 0
    for column in schema:
        position = up(position)
        shape = tuple(column["shape"])
        dtype = "int16" if column["dtype"] == "bfloat16" else column["dtype"]  # the bits
        size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        if column["kind"] == "tensor":
            end = position + n * size
            columns[column["name"]] += list(
                np.frombuffer(plain[position:end], dtype).reshape(n, *shape)
            )
        else:
            offsets = struct.unpack_from(f"<{n + 1}I", plain, position)
            start = up(position + 4 * (n + 1))
            for low, high in itertools.pairwise(offsets):
                raw = plain[start + low * size : start + high * size]
                if column["kind"] == "ragged":
                    value = np.frombuffer(raw, dtype).reshape(-1, *shape)
                else:
                    value = raw.decode() if column["kind"] == "string" else raw
                columns[column["name"]].append(value)
            end = start + offsets[-1] * size
        position = end
    assert not any(plain[position:])


def test_the_document_is_enough_to_read_a_dataset(tmp_path, keys):
    rows = 57
    rng = np.random.default_rng(5)
    x = rng.normal(size=(rows, 3, 2)).astype("float32")
    flag = rng.integers(0, 2, rows).astype(bool)
    half = torch.randn(rows, 4).bfloat16()
    name = [f"n{i}é" * (i % 4) for i in range(rows)]
    blob = [rng.bytes(i % 9) for i in range(rows)]
    ragged = [rng.integers(0, 99, (i % 5, 2)).astype("int16") for i in range(rows)]
    schema = Schema(
        (
            Column("x", "tensor", "float32", (3, 2)),
            Column("flag", "tensor", "bool"),
            Column("half", "tensor", "bfloat16", (4,)),
            Column("name", "string"),
            Column("blob", "bytes"),
            Column("ragged", "ragged", "int16", (2,)),
        )
    )
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, schema=schema, segment_bytes=300, shard_bytes=1500
    ) as writer:
        writer.write_batch(
            {"x": x, "flag": flag, "half": half, "name": name, "blob": blob, "ragged": ragged}
        )
    columns = read(tmp_path, "train", keys._path)
    assert np.array_equal(np.stack(columns["x"]), x)
    assert np.array_equal(np.stack(columns["flag"]), flag)
    assert np.array_equal(np.stack(columns["half"]), half.view(torch.int16).numpy())
    assert columns["name"] == name
    assert columns["blob"] == blob
    assert all(np.array_equal(a, b) for a, b in zip(columns["ragged"], ragged, strict=True))


def test_the_document_is_enough_for_column_keys_and_subjects(tmp_path, keys):
    x = np.arange(30, dtype="float32").reshape(10, 3)
    who = [f"patient {i % 3}" for i in range(10)]
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, column_keys={"y": "sensitive"}, subject_column="who",
        segment_bytes=64,
    ) as writer:  # fmt: skip
        writer.write_batch({"y": np.arange(10), "x": x, "who": who})
    columns = read(tmp_path, "train", keys._path)
    assert list(columns)[:3] == ["y", "x", "who"]
    order = [int(y) for y in columns["y"]]
    assert sorted(order) == list(range(10))
    assert np.array_equal(np.stack(columns["x"]), x[order])
    assert columns["who"] == [who[i] for i in order]
    (key,) = columns["(pseudonyms)"]
    assert columns["(subject)"] == [
        hmac.digest(key, b"s" + who[i].encode(), "sha256")[:16].hex() for i in order
    ]
