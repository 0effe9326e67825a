"""A second reader and writer of the format, made from ``docs/format.md`` alone.

It imports nothing of the package; ``tests/docs/test_format.py`` sees to that. It is slow, strict
and short. Every check that the document asks for has a name, and ``skip`` leaves some of them out:
what then reads an attacked dataset is the naive reader that the attack would have worked on.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Collection
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

HEADER = struct.Struct("<8sHHI16s16sIIQII32s32s")
PAYLOAD_TYPE = "application/vnd.lightning-secure.manifest.v1+json"
WIDTHS = {
    **{"bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8},
    **{"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8},
}


class RefusedError(Exception):
    """What was read is not what the document allows."""


def require(condition, check, skip=()):
    if not condition and check not in skip:
        raise RefusedError(check)


# ---------------------------------------------------------------- encodings


def canonical(value) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def unb64(text, length=None) -> bytes:
    require(isinstance(text, str), "base64")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise RefusedError("base64") from None
    require(b64(data) == text and length in (None, len(data)), "base64")
    return data


def unhex(text, length) -> bytes:
    require(isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{2 * length}}}", text), "hex")
    return bytes.fromhex(text)


def parse(data: bytes) -> dict:
    def unique(pairs):
        require(len(dict(pairs)) == len(pairs), "json")
        return dict(pairs)

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise RefusedError("json") from None
    require(isinstance(value, dict), "json")
    return value


# ---------------------------------------------------------------- keys


def hkdf(key, info, salt=None, length=32) -> bytes:
    return HKDF(SHA256(), length, salt, info).derive(key)


def key_id(key) -> str:
    return hkdf(key, b"lsec/v1/key-id", length=16).hex()


def unauthenticated(key, nonce, sealed) -> bytes:
    """Decrypt AES-GCM without looking at the tag: what a naive reader does."""
    stream = Cipher(algorithms.AES(key), modes.CTR(nonce + b"\0\0\0\2")).decryptor()
    return stream.update(sealed[:-16]) + stream.finalize()


def open_gcm(key, nonce, sealed, aad, check, skip=()) -> bytes:
    try:
        return AESGCM(key).decrypt(nonce, sealed, aad)
    except (InvalidTag, ValueError):
        require(False, check, skip)
        return unauthenticated(key, nonce, sealed)


def wrapping(key, context) -> tuple[bytes, bytes]:
    return hkdf(key, b"lsec/v1/key-wrap"), b"lsec/v1/wrap\0" + canonical(context)


def wrap(key, secret, context, *, nonce) -> bytes:
    wrapping_key, aad = wrapping(key, context)
    return nonce + AESGCM(wrapping_key).encrypt(nonce, secret, aad)


def unwrap(key, blob, context, skip=()) -> bytes:
    require(len(blob) == 60, "wrap")
    wrapping_key, aad = wrapping(key, context)
    return open_gcm(wrapping_key, blob[:12], blob[12:], aad, "wrap", skip)


def segment_keys(dek, uuid, dataset, suite=1) -> tuple[bytes, bytes]:
    both = hkdf(dek, b"lsec/v1" + struct.pack("<H", suite) + dataset, salt=uuid, length=64)
    return both[:32], both[32:]


def nonce_of(index) -> bytes:
    return b"\1\0\0\0" + struct.pack("<Q", index)


def aad_of(header, index, records) -> bytes:
    return hashlib.sha256(header).digest() + struct.pack("<QQB", index, records, 1)


def tree_hash(leaves) -> bytes:
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    half = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = tree_hash(leaves[:half]), tree_hash(leaves[half:])
    return hashlib.sha256(b"\1" + left + right).digest()


# ---------------------------------------------------------------- segments


def up(position):
    return -(-position // 8) * 8


def item_bytes(column):
    return math.prod(column["shape"]) * WIDTHS[column["dtype"]]


def check_schema(schema):
    require(isinstance(schema, list) and 1 <= len(schema) <= 4096, "schema")
    for column in schema:
        require(isinstance(column, dict), "schema")
        require(column.keys() == {"name", "kind", "dtype", "shape"}, "schema")
        name, kind, dtype, shape = (column[key] for key in ("name", "kind", "dtype", "shape"))
        require(
            isinstance(name, str) and re.fullmatch(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,128}", name),
            "schema",
        )
        require(isinstance(shape, list) and len(shape) <= 60, "schema")
        require(all(type(size) is int and 0 < size < 2**31 for size in shape), "schema")
        if kind in ("bytes", "string"):
            require((dtype, shape) == ("uint8", []), "schema")
        else:
            require(kind in ("tensor", "ragged") and dtype in WIDTHS, "schema")
        require(item_bytes(column) < 2**26, "schema")
    require(len({column["name"] for column in schema}) == len(schema), "schema")


def encode_segment(schema, columns) -> bytes:
    """``columns``: for each name the rows, each the bytes of one value."""
    out = b""
    for column in schema:
        rows = columns[column["name"]]
        out += bytes(up(len(out)) - len(out))
        if column["kind"] != "tensor":
            ends = itertools.accumulate(len(row) // item_bytes(column) for row in rows)
            out += struct.pack(f"<{len(rows) + 1}I", 0, *ends)
            out += bytes(up(len(out)) - len(out))
        out += b"".join(rows)
    return out


def decode_segment(schema, plain, n, skip=()) -> dict[str, list[bytes]]:
    columns, position = {}, 0
    for column in schema:
        position = zeros(plain, position, up(position), skip)
        size = item_bytes(column)
        offsets = range(n + 1)
        if column["kind"] != "tensor":
            require(position + 4 * (n + 1) <= len(plain), "content")
            offsets = struct.unpack_from(f"<{n + 1}I", plain, position)
            require(offsets[0] == 0 and all(map(int.__le__, offsets, offsets[1:])), "content", skip)
            position = zeros(plain, position + 4 * (n + 1), up(position + 4 * (n + 1)), skip)
        values = plain[position : position + offsets[-1] * size]
        require(len(values) == offsets[-1] * size, "content")
        require(column["dtype"] != "bool" or max(values, default=0) <= 1, "content", skip)
        pairs = itertools.pairwise(offsets)
        rows = [values[low * size : high * size] for low, high in pairs]
        if column["kind"] == "string":
            for row in rows:
                try:
                    row.decode()
                except UnicodeDecodeError:
                    require(False, "content", skip)
        columns[column["name"]] = rows
        position += len(values)
    variable = any(column["kind"] != "tensor" for column in schema)
    require(position == len(plain) or variable, "content", skip)
    zeros(plain, position, len(plain), skip)
    return columns


def zeros(plain, start, stop, skip):
    require(stop <= len(plain) and not any(plain[start:stop]), "content", skip)
    return stop


def as_arrays(schema, columns) -> dict[str, list]:
    """Turn the bytes of rows into arrays (bfloat16 as its bits), text and bytes."""
    result = {}
    for column in schema:
        rows = columns[column["name"]]
        if column["kind"] == "string":
            result[column["name"]] = [row.decode() for row in rows]
        elif column["kind"] == "bytes":
            result[column["name"]] = rows
        else:
            dtype = np.dtype("u2" if column["dtype"] == "bfloat16" else column["dtype"])
            first = [-1] if column["kind"] == "ragged" else []
            result[column["name"]] = [
                np.frombuffer(row, dtype.newbyteorder("<")).reshape((*first, *column["shape"]))
                for row in rows
            ]
    return result


# ---------------------------------------------------------------- shards


def pack_header(**fields) -> bytes:
    """``fields`` in the order of the document, from the dataset's id on."""
    return HEADER.pack(b"LSECSHRD", 1, 1, 0, *fields.values()).ljust(4096, b"\0")


def seal_shard(dek, plaintexts, counts, *, dataset, uuid, number, schema) -> tuple[bytes, dict]:
    key, commitment = segment_keys(dek, uuid, dataset)
    header = pack_header(
        dataset=dataset,
        uuid=uuid,
        number=number,
        segments=len(plaintexts),
        records=sum(counts),
        per_segment=counts[0],
        length=len(plaintexts[0]),
        schema=hashlib.sha256(canonical(schema)).digest(),
        commitment=commitment,
    )
    sealed = [
        AESGCM(key).encrypt(nonce_of(i), plain, aad_of(header, i, count))
        for i, (plain, count) in enumerate(zip(plaintexts, counts, strict=True))
    ]
    data = header + b"".join(sealed)
    return data, {
        "uuid": uuid.hex(),
        "number": number,
        "records": sum(counts),
        "segments": len(plaintexts),
        "size": len(data),
        "header_sha256": b64(hashlib.sha256(header).digest()),
        "merkle_root": b64(tree_hash([part[-16:] for part in sealed])),
        "commitment": b64(commitment),
    }


def read_shard(data, shard, schema, dek, dataset, skip=()) -> dict[str, list[bytes]]:
    require(len(data) == shard["size"], "size", skip)
    header = data[:4096]
    digest = hashlib.sha256(header).digest()
    require(digest == unb64(shard["header_sha256"], 32), "header", skip)
    require(len(header) == 4096, "fields")
    magic, version, suite, flags, *rest = HEADER.unpack_from(header)
    require((magic, version, suite, flags) == (b"LSECSHRD", 1, 1, 0), "suite", skip)
    require(not any(header[136:]), "fields", skip)
    owner, uuid, number, segments, records, per_segment, length, schema_digest, commitment = rest
    require(
        (owner, uuid.hex(), number, segments, records, schema_digest, commitment)
        == (
            *(dataset, shard["uuid"], shard["number"], shard["segments"], shard["records"]),
            *(hashlib.sha256(canonical(schema)).digest(), unb64(shard["commitment"], 32)),
        ),
        "fields",
        skip,
    )
    last = len(data) - 4096 - (segments - 1) * (length + 16)
    require(
        1 <= segments <= 2**20
        and 1 <= length < 2**26
        and 0 < records - (segments - 1) * per_segment <= per_segment
        and 16 < last <= length + 16,
        "numbers",
        skip,
    )
    key, derived = segment_keys(dek, uuid, owner)
    require(derived == commitment, "commitment", skip)
    parts = [
        data[4096 + i * (length + 16) : 4096 + (i + 1) * (length + 16)] for i in range(segments)
    ]
    root = tree_hash([part[-16:] for part in parts])
    require(root == unb64(shard["merkle_root"], 32), "merkle", skip)
    columns: dict[str, list[bytes]] = {column["name"]: [] for column in schema}
    for i, part in enumerate(parts):
        if not part:
            require(False, "cut", skip)
            break
        count = min(per_segment, records - i * per_segment)
        plain = open_gcm(key, nonce_of(i), part, aad_of(header, i, count), "tag", skip)
        for name, rows in decode_segment(schema, plain, count, skip).items():
            columns[name] += rows
    return columns


# ---------------------------------------------------------------- manifests


def signed_bytes(kind: str, payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def public_id(public) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]


def seal_envelope(payload: bytes, seed: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    signature = private.sign(signed_bytes(kind, payload))
    name = public_id(private.public_key())
    return canonical(
        {
            "payload": b64(payload),
            "payloadType": kind,
            "signatures": [{"keyid": name, "sig": b64(signature)}],
        }
    )


def open_envelope(data: bytes, public, skip=()) -> bytes:
    envelope = parse(data)
    payload, kind = unb64(envelope.get("payload")), envelope.get("payloadType")
    require(kind == PAYLOAD_TYPE, "type", skip)
    signatures = envelope.get("signatures")
    for entry in signatures if isinstance(signatures, list) else []:
        if isinstance(entry, dict) and entry.get("keyid") == public_id(public):
            try:
                public.verify(unb64(entry.get("sig")), signed_bytes(kind, payload))
            except InvalidSignature:
                continue
            return payload
    require(False, "signature", skip)
    return payload


def read_key_file(path: Path):
    record = parse(path.read_bytes())
    seed = unb64(record["signing_key"], 32)
    return unb64(record["kek"], 32), Ed25519PrivateKey.from_private_bytes(seed).public_key()


def read_manifest(root: Path, public, skip=()) -> dict:
    payload = open_envelope((root / "manifest.json").read_bytes(), public, skip)
    manifest = parse(payload)
    require(canonical(manifest) == payload, "canonical", skip)
    require(manifest["version"] == 1, "version")
    return manifest


def open_partition(manifest: dict, name: str, kek: bytes, skip=()) -> tuple[bytes, dict]:
    """Return a partition's key, and what its shards' keys are bound to besides."""
    context = {"dataset": manifest["dataset_id"], "partition": name}
    wrapped = next(key for key in manifest["partitions"][name] if key["key_id"] == key_id(kek))
    blob = unb64(wrapped["blob"])
    return unwrap(kek, blob, {**context, "purpose": "partition"}, skip), context


def read_dataset(
    root: Path, split: str, key_file: Path, *, skip: Collection[str] = ()
) -> dict[str, list[bytes]]:
    """Return for each column the bytes of its rows."""
    kek, public = read_key_file(key_file)
    manifest = read_manifest(root, public, skip)
    entry = manifest["splits"][split]
    groups = [entry, *entry.get("groups", [])]
    columns: dict[str, list[bytes]] = {}
    for group in groups:
        check_schema(group["schema"])
        check_shards(group["shards"], entry["shards"])
        columns |= read_group(root, manifest, group, kek, skip)
    order = entry.get("order", list(columns))
    count = sum(len(group["schema"]) for group in groups)
    require(sorted(order) == sorted(columns) and len(columns) == count, "groups")
    return {name: columns[name] for name in order}


def check_shards(shards, others):
    numbers = [shard["number"] for shard in shards]
    require(numbers and numbers == sorted(set(numbers)), "order")
    for one, other in zip(shards, others, strict=True):
        for field in ("number", "records", "subject"):
            require(one.get(field) == other.get(field), "groups")


def read_group(root, manifest, group, kek, skip) -> dict[str, list[bytes]]:
    dataset = unhex(manifest["dataset_id"], 16)
    partition, context = open_partition(manifest, group["partition"], kek, skip)
    columns: dict[str, list[bytes]] = {column["name"]: [] for column in group["schema"]}
    for shard in group["shards"]:
        require(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", shard["file"]), "file")
        shard_context = {**context, "purpose": "shard", "shard": shard["uuid"]}
        dek = unwrap(partition, unb64(shard["wrapped_key"]), shard_context, skip)
        try:
            data = (root / shard["file"]).read_bytes()
        except OSError:
            require(False, "file", skip)
            continue
        rows = read_shard(data, shard, group["schema"], dek, dataset, skip)
        for name, values in rows.items():
            columns[name] += values
    return columns
