"""``docs/format.md`` is enough to write a second reader, and a second writer, and both agree."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

import make
import numpy as np
import pytest
import reference
import reference_files
import torch

from lightning_secure import (
    AuditLog,
    Column,
    EncryptedCheckpointIO,
    EncryptedShardDataset,
    EncryptedShardWriter,
    LocalKeyProvider,
    Schema,
)
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.manifest import PAYLOAD_TYPE, read_manifest
from lightning_secure.crypto.merkle import merkle_root
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.segments import SegmentKeys
from lightning_secure.crypto.signing import Signer, seal_envelope
from lightning_secure.crypto.stream import StreamReader, StreamWriter
from lightning_secure.data.format.columns import DTYPES, decode_segment, encode_segment
from lightning_secure.data.format.header import Header
from lightning_secure.data.shards.shard import seal_shard
from lightning_secure.plugins.checkpoint import opened

TESTS = Path(__file__).parent.parent
VECTORS = TESTS / "vectors" / "v1"
ARTEFACTS = TESTS / "artefacts" / "v0.1.0"


def vectors(name):
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


@pytest.fixture
def vector_keys(tmp_path):
    path = Path(shutil.copy(VECTORS / "project.kek", tmp_path))
    path.chmod(0o600)  # git does not keep it
    return LocalKeyProvider(path)


# ---------------------------------------------------------------- the second reader


@pytest.mark.parametrize("name", ["reference.py", "reference_files.py", "make.py"])
def test_the_second_reader_uses_nothing_of_the_package(name):
    allowed = {"cryptography", "numpy", "reference", "reference_files", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse((TESTS / "vectors" / name).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        assert {name.split(".")[0] for name in names} <= allowed


def test_the_vectors_are_what_their_script_makes(tmp_path):
    make.main(tmp_path)
    kept = {path.relative_to(VECTORS) for path in VECTORS.rglob("*") if path.is_file()}
    assert kept == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for path in kept:
        assert (tmp_path / path).read_bytes() == (VECTORS / path).read_bytes(), path


def test_it_reads_the_vectors():
    _, rows = make.tables()["all kinds"]
    key_file = VECTORS / "project.kek"
    assert reference.read_dataset(VECTORS / "dataset", "train", key_file) == rows
    for vector in vectors("columns.json"):
        expected = {k: [bytes.fromhex(row) for row in rows] for k, rows in vector["rows"].items()}
        plain = bytes.fromhex(vector["plaintext"])
        reference.check_schema(vector["schema"])
        assert reference.decode_segment(vector["schema"], plain, vector["records"]) == expected
    ckpt = (VECTORS / "stream.ckpt").read_bytes()
    header, plain = reference_files.open_checkpoint(make.KEK, ckpt)
    assert header["step"] == 7
    assert plain == make.drawn("stream", 16385)
    assert len(reference_files.read_audit_log((VECTORS / "audit.jsonl").read_bytes())) == 3


def test_it_reads_what_older_versions_wrote():
    key_file = ARTEFACTS / "project.kek"
    kek, _ = reference.read_key_file(key_file)
    columns = reference.read_dataset(ARTEFACTS / "dataset", "train", key_file)
    x = np.stack([np.frombuffer(row, "<f4") for row in columns["x"]])
    assert np.array_equal(x, (np.arange(60, dtype="float32") / 7).reshape(20, 3))
    assert columns["name"] == [f"row {i}".encode() for i in range(20)]
    _, plain = reference_files.open_checkpoint(kek, (ARTEFACTS / "x.ckpt").read_bytes())
    state = torch.load(io.BytesIO(plain), weights_only=True)
    assert np.array_equal(state["state_dict"]["w"].numpy(), x)
    assert len(reference_files.read_audit_log((ARTEFACTS / "audit.jsonl").read_bytes())) == 3


def test_it_reads_a_dataset_that_was_just_sealed(tmp_path, keys):
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
    raw = reference.read_dataset(tmp_path, "train", keys._path)
    columns = reference.as_arrays(schema.to_json(), raw)
    assert np.array_equal(np.stack(columns["x"]), x)
    assert np.array_equal(np.stack(columns["flag"]), flag)
    assert np.array_equal(np.stack(columns["half"]), half.view(torch.uint16).numpy())
    assert columns["name"] == name
    assert columns["blob"] == blob
    assert all(np.array_equal(a, b) for a, b in zip(columns["ragged"], ragged, strict=True))


def test_it_reads_column_keys_and_subjects(tmp_path, keys):
    x = np.arange(30, dtype="float32").reshape(10, 3)
    who = [f"patient {i % 3}" for i in range(10)]
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, column_keys={"y": "sensitive"}, subject_column="who",
        segment_bytes=64, remarks={"encrypted.from": "wärd 7", "encrypted.": "", "clear": "b"},
    ) as writer:  # fmt: skip
        writer.write_batch({"y": np.arange(10), "x": x, "who": who})
    columns = reference.read_dataset(tmp_path, "train", keys._path)
    assert list(columns) == ["y", "x", "who"]
    order = [int.from_bytes(y, "little") for y in columns["y"]]
    assert sorted(order) == list(range(10))
    assert columns["x"] == [x[i].tobytes() for i in order]
    assert columns["who"] == [who[i].encode() for i in order]
    owners, pseudonym = reference_files.read_subjects(tmp_path, "train", keys._path)
    assert owners == [pseudonym(who[i]) for i in order]
    attributes = reference_files.read_attributes(tmp_path, "train", keys._path)
    assert attributes == {"from": "wärd 7", "": "", "clear": "b"}
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert data.attributes == attributes
    alone = EncryptedShardDataset(tmp_path, split="train", keys=keys, columns=["y"])
    assert alone.attributes == {"clear": "b"}  # whoever has only that column's key reads no more


def test_it_reads_a_checkpoint_and_a_log_that_were_just_written(tmp_path, keys):
    weights = torch.randn(5000)
    EncryptedCheckpointIO(keys).save_checkpoint(
        {"state_dict": {"w": weights}, "global_step": 9}, tmp_path / "x.ckpt"
    )
    kek, _ = reference.read_key_file(keys._path)
    header, plain = reference_files.open_checkpoint(kek, (tmp_path / "x.ckpt").read_bytes())
    assert header["step"] == 9
    state = torch.load(io.BytesIO(plain), weights_only=True)
    assert torch.equal(state["state_dict"]["w"], weights)
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("größe", {"n": 1.5, "text": "東"})
    log.append("b")
    assert len(reference_files.read_audit_log(log.path.read_bytes())) == 2


# ---------------------------------------------------------------- this package, on the vectors


def test_keys_and_tree_hashes_are_as_known(monkeypatch):
    known = vectors("keys.json")
    kek = DataKey(bytes.fromhex(known["kek"]))
    assert kek.key_id == known["key_id"]
    assert kek.subkey("test") == DataKey(bytes.fromhex(known["subkey"]["key"]))
    wrap = known["wrap"]
    key, blob = DataKey(bytes.fromhex(wrap["key"])), bytes.fromhex(wrap["blob"])
    assert kek.unwrap(blob, context=wrap["context"]) == key
    # The nonce is random, and the only way to know the answer is to know the nonce.
    monkeypatch.setattr(os, "urandom", lambda n: bytes.fromhex(wrap["nonce"])[:n])
    assert kek.wrap(key, context=wrap["context"]) == blob
    shard = known["shard"]
    derived = SegmentKeys.derive(
        DataKey(bytes.fromhex(shard["dek"])),
        shard_uuid=bytes.fromhex(shard["uuid"]),
        dataset_id=bytes.fromhex(shard["dataset"]),
        suite=shard["suite"],
    )
    assert (derived.encryption.hex(), derived.commitment.hex()) == (
        shard["encryption"],
        shard["commitment"],
    )
    leaves = [bytes.fromhex(leaf) for leaf in known["merkle"]["leaves"]]
    for count, root in known["merkle"]["roots"].items():
        assert merkle_root(leaves[: int(count)]).hex() == root


def test_a_header_is_as_known():
    known = vectors("header.json")
    values = [
        bytes.fromhex(value) if isinstance(value, str) else value
        for value in known["fields"].values()
    ]
    header = Header(**dict(zip(Header.__annotations__, values, strict=True)))
    packed = header.pack()
    assert packed[:136].hex() == known["bytes"]
    assert hashlib.sha256(packed).hexdigest() == known["sha256"]
    assert Header.unpack(packed, size=known["size"]) == header


def as_values(column, rows):
    if column.kind == "string":
        return [row.decode() for row in rows]
    if column.kind == "bytes":
        return rows
    dtype = DTYPES[column.dtype]
    tensors = [
        torch.frombuffer(bytearray(row), dtype=dtype) if row else torch.empty(0, dtype=dtype)
        for row in rows
    ]
    if column.kind == "ragged":
        return [tensor.reshape(-1, *column.shape) for tensor in tensors]
    return torch.stack([tensor.reshape(column.shape) for tensor in tensors])


def as_bytes(values):
    return [
        value.numpy().tobytes()
        if value.dtype is not torch.bfloat16
        else value.view(torch.int16).numpy().tobytes()
        for value in values
    ]


@pytest.mark.parametrize("vector", vectors("columns.json"), ids=lambda vector: vector["table"])
def test_columns_are_as_known(vector):
    schema = Schema.from_json(vector["schema"])
    rows = {k: [bytes.fromhex(row) for row in rows] for k, rows in vector["rows"].items()}
    values = {column.name: as_values(column, rows[column.name]) for column in schema.columns}
    assert encode_segment(schema, values).hex() == vector["plaintext"]
    plain = bytearray.fromhex(vector["plaintext"])
    decoded = decode_segment(schema, plain, records=vector["records"])
    for column in schema.columns:
        found = decoded[column.name]
        if column.kind in ("string", "bytes"):
            assert found == values[column.name]
        else:
            assert as_bytes(found) == rows[column.name]
            assert all(row.dtype is DTYPES[column.dtype] for row in found)


def test_every_kind_and_dtype_has_a_vector():
    found = {
        (column["kind"], column["dtype"])
        for vector in vectors("columns.json")
        for column in vector["schema"]
    }
    assert {("tensor", dtype) for dtype in DTYPES} <= found
    assert {("bytes", "uint8"), ("string", "uint8"), ("ragged", "bool")} <= found


def test_the_dataset_of_the_second_writer_is_read(vector_keys):
    data = EncryptedShardDataset(VECTORS / "dataset", split="train", keys=vector_keys)
    schema, rows = make.tables()["all kinds"]
    columns = dict(zip(data.schema.names, data.__getitems__(range(len(data))).batch(), strict=True))
    assert data.schema.to_json() == schema
    assert columns["name"] == make.TEXTS
    assert columns["blob"] == make.BLOBS
    for name in ("flag", "x", "größe \N{CAT FACE}"):
        assert as_bytes(columns[name]) == rows[name]


def test_its_manifest_is_what_this_package_would_sign(vector_keys):
    envelope = (VECTORS / "dataset" / "manifest.json").read_bytes()
    payload = base64.b64decode(json.loads(envelope)["payload"])
    assert seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=Signer(make.SEED)) == envelope
    manifest = read_manifest(VECTORS / "dataset", trusted=vector_keys.trusted_signers)
    assert reference.canonical(manifest.to_json()) == payload


def test_a_shard_is_what_the_second_writer_makes_of_it(monkeypatch, tmp_path):
    schema, rows = make.tables()["all kinds"]
    dek, uuid, nonce = make.drawn("a", 32), make.drawn("b", 16), make.drawn("c", 12)
    drawn = {32: dek, 12: nonce}
    # Only with the random numbers known can the bytes be.
    monkeypatch.setattr(os, "urandom", drawn.__getitem__)
    monkeypatch.setattr(secrets, "token_bytes", {16: uuid, 8: bytes(8)}.__getitem__)
    typed = Schema.from_json(schema)
    entry = seal_shard(
        tmp_path,
        {column.name: as_values(column, rows[column.name]) for column in typed.columns},
        records=6,
        schema=typed,
        dataset_id=make.DATASET,
        number=4,
        segment_bytes=4096,
        partition=PartitionKey(DataKey(make.PARTITION), dataset_id=make.DATASET, partition="p"),
    )
    data, expected = reference.seal_shard(
        dek,
        [reference.encode_segment(schema, rows)],
        [6],
        dataset=make.DATASET,
        uuid=uuid,
        number=4,
        schema=schema,
    )
    context = {"dataset": make.DATASET.hex(), "partition": "p"}
    context |= {"purpose": "shard", "shard": uuid.hex()}
    wrapped = reference.wrap(make.PARTITION, dek, context, nonce=nonce)
    file = f"{tmp_path.name}/shard-00004-{uuid.hex()[:8]}.lsec"
    assert entry.to_json() == {**expected, "file": file, "wrapped_key": reference.b64(wrapped)}
    assert (tmp_path.parent / file).read_bytes() == data


def test_streams_are_as_known():
    known = vectors("streams.json")
    key, context = bytes.fromhex(known["key"]), bytes.fromhex(known["context"])
    for stream in known["streams"]:
        plain, salt = make.drawn("stream", stream["length"]), bytes.fromhex(stream["salt"])
        sealed = reference_files.seal_stream(key, context, plain, salt=salt)
        assert hashlib.sha256(sealed).hexdigest() == stream["sealed_sha256"]
        assert sealed[:72].hex() == stream["head"]
        assert sealed[-17:].hex() == stream["tail"]
        reader = StreamReader(io.BytesIO(sealed), key=DataKey(key), context=context)
        assert reader.read() == plain
        written = io.BytesIO()
        writer = StreamWriter(written, key=DataKey(key), context=context)
        writer.write(plain)
        writer.finish()
        assert reference_files.open_stream(key, context, written.getvalue()) == plain


def test_the_checkpoint_and_the_log_of_the_second_writer_are_read(vector_keys, tmp_path):
    with opened(VECTORS / "stream.ckpt", keys=vector_keys) as stream:
        assert stream.read() == make.drawn("stream", 16385)
    log = AuditLog(shutil.copy(VECTORS / "audit.jsonl", tmp_path))
    assert log.verify().records == 3
