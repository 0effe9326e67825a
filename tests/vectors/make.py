"""Writes the known answers: ``python tests/vectors/make.py [FOLDER]``. The same bytes each time.

They are made by the second writer in ``reference.py``, with keys, ids and nonces that are written
here, so they say what the format is and not what this package happens to do. Nothing that is in the
folder may ever change: a file of this version has to stay readable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from reference import (
    aad_of,
    b64,
    canonical,
    encode_segment,
    hkdf,
    key_id,
    nonce_of,
    pack_header,
    seal_envelope,
    seal_shard,
    segment_keys,
    tree_hash,
    wrap,
)
from reference_files import seal_checkpoint, seal_stream

NUMERIC = ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
TEXTS = ["", "plain", "Zoë Ångström", "東京\N{CAT FACE}", "a\0b", "e\u0301"]
BLOBS = [b"", b"\0", bytes(range(256)), b"\xff\xfe", b"lsec", b""]


def drawn(label: str, length: int) -> bytes:
    """Bytes that look random and are not."""
    return hashlib.shake_128(label.encode()).digest(length)


HERE = Path(__file__).parent
KEK, SEED = drawn("kek", 32), drawn("signing key", 32)
DATASET, PARTITION = drawn("dataset", 16), drawn("partition key", 32)


def column(name, kind, dtype="uint8", shape=()):
    return {"name": name, "kind": kind, "dtype": dtype, "shape": list(shape)}


def numbers(label, dtype, *shape) -> np.ndarray:
    """Every bit pattern may occur: NaN with a payload, infinities, negative zeros."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(drawn(label, size), np.dtype(dtype).newbyteorder("<")).reshape(shape)


def keys() -> dict:
    dek, uuid, nonce = drawn("dek", 32), drawn("uuid", 16), drawn("nonce", 12)
    context = {
        "purpose": "shard",
        "dataset": DATASET.hex(),
        "partition": "train",
        "shard": uuid.hex(),
    }
    encryption, commitment = segment_keys(dek, uuid, DATASET)
    leaves = [drawn(f"tag {i}", 16) for i in range(7)]
    return {
        "kek": KEK.hex(),
        "key_id": key_id(KEK),
        "subkey": {"purpose": "test", "key": hkdf(KEK, b"lsec/v1/subkey\0test").hex()},
        "wrap": {
            "key": dek.hex(),
            "nonce": nonce.hex(),
            "context": context,
            "blob": wrap(KEK, dek, context, nonce=nonce).hex(),
        },
        "shard": {
            "dek": dek.hex(),
            "uuid": uuid.hex(),
            "dataset": DATASET.hex(),
            "suite": 1,
            "encryption": encryption.hex(),
            "commitment": commitment.hex(),
            "nonces": {str(i): nonce_of(i).hex() for i in (0, 1, 256, 2**20 - 1)},
            "aad": {
                "header": bytes(4096).hex()[:64] + "...",
                "segment": 3,
                "records": 10,
                "bytes": aad_of(bytes(4096), 3, 10).hex(),
            },
        },
        "merkle": {
            "leaves": [leaf.hex() for leaf in leaves],
            "roots": {str(n): tree_hash(leaves[:n]).hex() for n in range(1, 8)},
        },
    }


def header() -> dict:
    fields = {
        "dataset": DATASET,
        "uuid": drawn("uuid", 16),
        "number": 3,
        "segments": 4,
        "records": 37,
        "per_segment": 10,
        "length": 400,
        "schema": drawn("schema", 32),
        "commitment": drawn("commitment", 32),
    }
    packed = pack_header(**fields)
    return {
        "fields": {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in fields.items()
        },
        "size": 4096 + 3 * 416 + 296,
        "bytes": packed[:136].hex(),
        "sha256": hashlib.sha256(packed).hexdigest(),
    }


def tables() -> dict[str, tuple[list[dict], dict[str, list[bytes]]]]:
    """Name of a table, its schema, and its rows as bytes."""
    found = {}
    for dtype in NUMERIC:
        values = numbers(dtype, dtype, 3, 2)
        found[f"tensor of {dtype}"] = (
            [column("x", "tensor", dtype, [2])],
            {"x": [row.tobytes() for row in values]},
        )
    found["tensor of bfloat16"] = (
        [column("x", "tensor", "bfloat16", [2])],
        {"x": [row.tobytes() for row in numbers("bfloat16", "uint16", 3, 2)]},
    )
    found["tensor of bool"] = (
        [column("x", "tensor", "bool", [3]), column("y", "tensor", "float64")],
        {
            "x": [b"\0\1\1", b"\1\0\0", b"\0\0\0"],
            "y": [row.tobytes() for row in numbers("y", "f8", 3)],
        },
    )
    for dtype, shape in (("int16", [2]), ("float32", []), ("bool", [])):
        rows = [numbers("ragged", "uint8", n, *shape) % 2 for n in (2, 0, 3)]
        found[f"ragged of {dtype}"] = (
            [column("r", "ragged", dtype, shape)],
            {"r": [row.astype(dtype).tobytes() for row in rows]},
        )
    found["ragged, every row empty"] = (
        [column("r", "ragged", "int64", [4])],
        {"r": [b"", b"", b""]},
    )
    found["bytes"] = ([column("b", "bytes")], {"b": BLOBS})
    found["string"] = ([column("s", "string")], {"s": [text.encode() for text in TEXTS]})
    found["all kinds"] = (
        [
            column("flag", "tensor", "bool"),
            column("name", "string"),
            column("x", "tensor", "float32", [2, 2]),
            column("größe \N{CAT FACE}", "ragged", "bfloat16", [1]),
            column("blob", "bytes"),
        ],
        {
            "flag": [b"\1", b"\0", b"\1", b"\1", b"\0", b"\1"],
            "name": [text.encode() for text in TEXTS],
            "x": [row.tobytes() for row in numbers("all", "f4", 6, 2, 2)],
            "größe \N{CAT FACE}": [drawn("g", 2 * n) for n in (1, 0, 2, 0, 0, 5)],
            "blob": BLOBS,
        },
    )
    return found


def columns() -> list[dict]:
    return [
        {
            "table": name,
            "schema": schema,
            "records": len(next(iter(rows.values()))),
            "rows": {key: [value.hex() for value in values] for key, values in rows.items()},
            "plaintext": encode_segment(schema, rows).hex(),
        }
        for name, (schema, rows) in tables().items()
    ]


def dataset(folder: Path) -> None:
    """Two shards: segments of two rows, padded; the last segment of the second has one."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    schema, rows = tables()["all kinds"]
    context = {"dataset": DATASET.hex(), "partition": "train"}
    shards = []
    for number, bounds in enumerate([[0, 2, 4], [4, 5, 6]]):
        uuid, dek = drawn(f"uuid {number}", 16), drawn(f"dek {number}", 32)
        counts = [stop - start for start, stop in itertools.pairwise(bounds)]
        plain = [
            encode_segment(schema, {name: part[start:stop] for name, part in rows.items()})
            for start, stop in itertools.pairwise(bounds)
        ]
        length = max(map(len, plain))
        plain = [part.ljust(length, b"\0") for part in plain[:-1]] + plain[-1:]
        data, entry = seal_shard(
            dek, plain, counts, dataset=DATASET, uuid=uuid, number=number, schema=schema
        )
        file = f"train/shard-{number:05d}-{uuid.hex()[:8]}.lsec"
        (folder / file).write_bytes(data)
        wrapped = wrap(
            PARTITION,
            dek,
            {**context, "purpose": "shard", "shard": uuid.hex()},
            nonce=drawn(f"nonce {number}", 12),
        )
        shards.append({**entry, "file": file, "wrapped_key": b64(wrapped)})
    partition = wrap(
        KEK, PARTITION, {**context, "purpose": "partition"}, nonce=drawn("partition nonce", 12)
    )
    manifest = {
        "version": 1,
        "dataset_id": DATASET.hex(),
        "generation": 2,
        "previous": drawn("previous", 32).hex(),
        "created": "2026-01-02T03:04:05+00:00",
        "splits": {
            "train": {
                "partition": "train",
                "schema": schema,
                "shards": shards,
                "attributes": {"anonymize.name": "kept"},
            }
        },
        "partitions": {
            "train": [{"provider": "local", "key_id": key_id(KEK), "blob": b64(partition)}]
        },
    }
    (folder / "manifest.json").write_bytes(seal_envelope(canonical(manifest), SEED))


def key_file(path: Path) -> None:
    record = {
        "type": "lightning-secure/local-key",
        "version": 1,
        "kek": b64(KEK),
        "signing_key": b64(SEED),
    }
    path.write_bytes(canonical(record) + b"\n")
    path.chmod(0o600)


def streams(folder: Path) -> None:
    """A stream for each kind of end, and a checkpoint with a whole chunk and a rest."""
    key, context = drawn("stream key", 32), b"context"
    found = []
    for length in (0, 1, 16384, 16385):
        salt, plain = drawn(f"salt {length}", 24), drawn("stream", length)
        sealed = seal_stream(key, context, plain, salt=salt)
        found.append(
            {
                "length": length,
                "salt": salt.hex(),
                "plaintext_sha256": hashlib.sha256(plain).hexdigest(),
                "head": sealed[:72].hex(),
                "tail": sealed[-17:].hex(),
                "sealed_sha256": hashlib.sha256(sealed).hexdigest(),
            }
        )
    record = {"key": key.hex(), "context": context.hex(), "streams": found}
    write_json(folder / "streams.json", record)
    ckpt = seal_checkpoint(
        KEK,
        {"checkpoint": drawn("checkpoint", 16).hex(), "run_id": drawn("run", 16).hex(), "step": 7},
        key,
        drawn("stream", 16385),
        nonce=drawn("checkpoint nonce", 12),
        salt=drawn("checkpoint salt", 24),
    )
    (folder / "stream.ckpt").write_bytes(ckpt)


def audit(path: Path) -> None:
    previous, lines = "0" * 64, []
    for seq in range(3):
        record = {
            "version": 1,
            "seq": seq,
            "time": f"2026-01-02T03:04:0{seq}.000+00:00",
            "action": "test",
            "outcome": "success",
            "pid": 1,
            "details": {"number": seq, "text": TEXTS[seq]},
            "prev": previous,
        }
        lines.append(canonical(record))
        previous = hashlib.sha256(lines[-1]).hexdigest()
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "keys.json", keys())
    write_json(folder / "header.json", header())
    write_json(folder / "columns.json", columns())
    key_file(folder / "project.kek")
    dataset(folder / "dataset")
    streams(folder)
    audit(folder / "audit.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "v1")
