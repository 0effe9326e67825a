"""Verification of a shard file against a manifest, as far as that goes without its key."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.merkle import merkle_root
from lightning_secure.crypto.segments import TAG_BYTES
from lightning_secure.data.format.header import HEADER_BYTES, Header
from lightning_secure.errors import ShardCorruptedError

if TYPE_CHECKING:
    from lightning_secure.data.storage.storage import Storage, StoredFile


def verify_shard(storage: Storage, entry: ShardEntry) -> None:
    """Compare size, header and every segment's tag of a shard with its entry in a manifest.

    Raises:
        FileNotFoundError: if the shard's file is missing.
        OSError: if the shard's file cannot be opened.
        ShardCorruptedError: if the shard is another one, or was altered, cut or extended.
        StorageError: if the storage did not answer, or refused.

    Ciphertext that does not belong to its tag is not seen: only a key shows that.

    >>> from lightning_secure import EncryptedShardDataset, seal
    >>> from lightning_secure.data.storage.opening import open_storage
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> entry = EncryptedShardDataset(folder / "data", split="train", keys=keys).entry.shards[0]
    >>> verify_shard(open_storage(folder / "data"), entry)
    """
    with contextlib.closing(storage.open(entry)) as file:
        if file.size != entry.size:
            raise _refused(entry, f"it has {file.size} bytes where the manifest has {entry.size}")
        packed = bytearray(HEADER_BYTES)
        del packed[file.read_into(0, packed) :]
        if hashlib.sha256(packed).digest() != entry.header_sha256:
            raise _refused(entry, "its header was altered, or another shard stands in its place")
        header = Header.unpack(bytes(packed), size=entry.size)
        if tags_root(read_tags(file, header, entry.size)) != entry.merkle_root:
            raise _refused(entry, "its segments are not the ones that the manifest was signed for")


def read_tags(file: StoredFile, header: Header, size: int) -> bytes:
    """Return the tags of all segments of an open shard, one after another."""
    stride = header.segment_bytes + TAG_BYTES
    tags = bytearray(header.segments * TAG_BYTES)
    with memoryview(tags) as view:
        offset = HEADER_BYTES + header.segment_bytes
        for start in range(0, len(tags) - TAG_BYTES, TAG_BYTES):
            file.read_into(offset, view[start : start + TAG_BYTES])
            offset += stride
        file.read_into(size - TAG_BYTES, view[-TAG_BYTES:])
    return bytes(tags)


def tags_root(tags: bytes) -> bytes:
    """Return the Merkle root over tags that lie one after another."""
    return merkle_root(_chunks(tags))


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + TAG_BYTES] for start in range(0, len(data), TAG_BYTES))


def _refused(entry: ShardEntry, reason: str) -> ShardCorruptedError:
    return ShardCorruptedError(f"shard {entry.file!r} rejected: {reason}.")
