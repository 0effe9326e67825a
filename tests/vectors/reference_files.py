"""The second reader, for checkpoints and audit logs; see ``reference.py``."""

from __future__ import annotations

import hashlib
import hmac
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from reference import (
    RefusedError,
    b64,
    canonical,
    hkdf,
    key_id,
    open_partition,
    parse,
    read_key_file,
    read_manifest,
    require,
    unb64,
    unwrap,
    wrap,
)

CHUNK = 16384


def stream_parts(key, salt, context) -> tuple[AESGCM, int, bytes]:
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    message_key = hkdf(key, b"lsec/v1/stream")
    expanded = HKDFExpand(SHA512(), 32 + 12 + 32, info).derive(message_key)
    return AESGCM(expanded[:32]), int.from_bytes(expanded[32:44], "big"), expanded[44:]


def seal_stream(key, context, plain, *, salt) -> bytes:
    cipher, base, commitment = stream_parts(key, salt, context)
    out = salt + commitment
    for i in range(len(plain) // CHUNK + 1):
        nonce = (base ^ i).to_bytes(12, "big")
        out += cipher.encrypt(nonce, plain[i * CHUNK : (i + 1) * CHUNK], None)
    return out


def open_stream(key, context, data) -> bytes:
    require(len(data) >= 56 + 16, "stream")
    cipher, base, commitment = stream_parts(key, data[:24], context)
    require(commitment == data[24:56], "commitment")
    out, body = b"", data[56:]
    for i in range(len(body) // (CHUNK + 16) + 1):
        chunk = body[i * (CHUNK + 16) : (i + 1) * (CHUNK + 16)]
        try:
            out += cipher.decrypt((base ^ i).to_bytes(12, "big"), chunk, None)
        except (InvalidTag, ValueError):
            raise RefusedError("tag") from None
    return out


def seal_checkpoint(kek, header, key, plain, *, nonce, salt) -> bytes:
    context = {"checkpoint": header["checkpoint"], "purpose": "checkpoint"}
    wrapped = {
        "provider": "local",
        "key_id": key_id(kek),
        "blob": b64(wrap(kek, key, context, nonce=nonce)),
    }
    packed = canonical({**header, "key": wrapped})
    start = struct.pack("<8sHI", b"LSECCKPT", 1, len(packed)) + packed
    return start + seal_stream(key, start, plain, salt=salt)


def open_checkpoint(kek, data) -> tuple[dict, bytes]:
    require(len(data) >= 14, "header")
    magic, version, length = struct.unpack_from("<8sHI", data)
    require((magic, version) == (b"LSECCKPT", 1) and length <= 65536, "header")
    start = data[: 14 + length]
    header = parse(start[14:])
    require(canonical(header) == start[14:], "header")
    require(header.keys() == {"checkpoint", "key", "run_id", "step"}, "header")
    context = {"checkpoint": header["checkpoint"], "purpose": "checkpoint"}
    key = unwrap(kek, unb64(header["key"]["blob"]), context)
    return header, open_stream(key, start, data[len(start) :])


def read_audit_log(data: bytes) -> list[dict]:
    require(data == b"" or data.endswith(b"\n"), "line")
    previous, records = "0" * 64, []
    for number, line in enumerate(data.split(b"\n")[:-1]):
        record = parse(line)
        require(canonical(record) == line and record["seq"] == number, "record")
        require(record["prev"] == previous, "chain")
        previous = hashlib.sha256(line).hexdigest()
        records.append(record)
    return records


def read_attributes(root, split, key_file) -> dict[str, str]:
    """Return a split's attributes, those that are encrypted in the clear."""
    kek, public = read_key_file(key_file)
    manifest = read_manifest(root, public)
    entry = manifest["splits"][split]
    partition, context = open_partition(manifest, entry["partition"], kek)
    subkey = hkdf(partition, b"lsec/v1/subkey\0attributes")
    cipher, result = AESGCM(hkdf(subkey, b"lsec/v1/attribute")), {}
    for name, value in entry["attributes"].items():
        if name.startswith("encrypted."):
            data, bound = unb64(value), {**context, "purpose": "attribute", "attribute": name}
            plain = cipher.decrypt(data[:12], data[12:], b"lsec/v1/wrap\0" + canonical(bound))
            require(len(plain) % 256 == 0 and plain.rstrip(b"\0")[-1:] == b"\x80", "padding")
            name, value = name[len("encrypted.") :], plain.rstrip(b"\0")[:-1].decode()
        result[name] = value
    return result


# ---------------------------------------------------------------- whose rows these are


def read_subjects(root, split, key_file):
    """Return each row's pseudonym in hexadecimal, and what makes a pseudonym of text."""
    kek, public = read_key_file(key_file)
    manifest = read_manifest(root, public)
    entry = manifest["splits"][split]
    partition, context = open_partition(manifest, entry["partition"], kek)
    blob = unb64(entry["subject_key"])
    key = hkdf(unwrap(partition, blob, {**context, "purpose": "subjects"}), b"lsec/v1/subject")
    owners = [shard["subject"] for shard in entry["shards"] for _ in range(shard["records"])]
    return owners, lambda text: hmac.digest(key, b"s" + text.encode(), "sha256")[:16].hex()
