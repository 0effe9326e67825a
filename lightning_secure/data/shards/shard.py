"""A shard file: sealing it whole, and reading any segment of it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.merkle import merkle_root
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.segments import (
    SUITE_AES256GCM_SHA256,
    TAG_BYTES,
    SegmentCipher,
    SegmentKeys,
)
from lightning_secure.data.format.columns import ColumnData, Schema, decode_segment, encode_segment
from lightning_secure.data.format.header import HEADER_BYTES, Header
from lightning_secure.data.format.segment_plan import plan_segments
from lightning_secure.data.shards.scratch import Scratch
from lightning_secure.data.shards.verify import read_tags, tags_root
from lightning_secure.data.storage import Storage
from lightning_secure.errors import IntegrityError, ShardCorruptedError
from lightning_secure.util.files import atomic_writer

_T = TypeVar("_T")


def seal_shard(
    folder: Path,
    columns: Mapping[str, ColumnData],
    *,
    records: int,
    schema: Schema,
    dataset_id: bytes,
    number: int,
    segment_bytes: int,
    partition: PartitionKey,
    records_per_segment: int | None = None,
    uuid: bytes | None = None,
) -> ShardEntry:
    """Encrypt rows into a new file below ``folder`` and return its manifest entry.

    Args:
        folder: The split's folder; its name becomes part of the entry's path.
        columns: The rows, see :func:`~lightning_secure.data.format.columns.encode_segment`.
        records: Number of rows, at least 1.
        schema: The columns.
        dataset_id: 16 bytes.
        number: Position of the shard in its split.
        segment_bytes: Plaintext length that segments should not exceed. A single row that is
            longer gets a longer segment.
        partition: Protects the shard's fresh data key.
        records_per_segment: Rows in a segment, where ``segment_bytes`` does not decide it.
        uuid: 16 random bytes that nothing else is named by; drawn by default.

    Raises:
        DataError: if a row needs 64 MiB or more, or the rows need more than 2**20 segments.

    The file appears whole or not at all, and is worthless until a signed manifest names it.
    """
    segments, per_segment, length = plan_segments(
        columns, records, schema, segment_bytes, per_segment=records_per_segment
    )

    def plaintexts() -> Iterator[bytearray]:
        for index in range(segments):
            start = index * per_segment
            stop = min(start + per_segment, records)
            plaintext = encode_segment(schema, _rows(columns, start, stop))
            if index < segments - 1:
                plaintext += bytes(length - len(plaintext))
            yield plaintext

    key, uuid = DataKey.generate(), uuid or fresh_uuid(folder, number)
    keys = _derived(key, uuid, dataset_id)
    header = Header(
        dataset_id=dataset_id,
        shard_uuid=uuid,
        shard_number=number,
        segments=segments,
        records=records,
        records_per_segment=per_segment,
        segment_bytes=length,
        schema_digest=schema.digest,
        commitment=keys.commitment,
    )
    return _write(folder, header, keys, plaintexts(), partition.seal(key, shard_uuid=uuid))


def reseal_shard(
    folder: Path, reader: ShardReader, *, shard_uuid: bytes, partition: PartitionKey
) -> ShardEntry:
    """Encrypt an open shard's rows anew, under a fresh key and into a new file; return its entry.

    Args:
        folder: The split's folder.
        reader: The shard.
        shard_uuid: 16 fresh random bytes that name the new file.
        partition: Protects the new data key.

    Raises:
        ShardCorruptedError: if a segment of the old shard was altered.

    One segment at a time is in memory.
    """
    key = DataKey.generate()
    keys = _derived(key, shard_uuid, reader.header.dataset_id)
    header = dataclasses.replace(reader.header, shard_uuid=shard_uuid, commitment=keys.commitment)
    scratch = Scratch()
    plaintexts = (reader.decrypt(index, scratch) for index in range(header.segments))
    wrapped = partition.seal(key, shard_uuid=shard_uuid)
    return _write(folder, header, keys, plaintexts, wrapped)


def fresh_uuid(folder: Path, number: int) -> bytes:
    """Return 16 random bytes that name a shard whose file does not exist yet."""
    while True:
        uuid = secrets.token_bytes(16)
        if not (folder / shard_name(number, uuid)).exists():
            return uuid


def shard_name(number: int, shard_uuid: bytes) -> str:
    """Return the name of a shard's file in its folder."""
    return f"shard-{number:05d}-{shard_uuid.hex()[:8]}.lsec"


def _derived(key: DataKey, shard_uuid: bytes, dataset_id: bytes) -> SegmentKeys:
    return SegmentKeys.derive(
        key, shard_uuid=shard_uuid, dataset_id=dataset_id, suite=SUITE_AES256GCM_SHA256
    )


def _write(
    folder: Path,
    header: Header,
    keys: SegmentKeys,
    plaintexts: Iterable[bytearray | memoryview],
    wrapped_key: bytes,
) -> ShardEntry:
    packed = header.pack()
    digest = hashlib.sha256(packed).digest()
    cipher = SegmentCipher(keys, header_digest=digest)
    path = folder / shard_name(header.shard_number, header.shard_uuid)
    sealed = bytearray(header.segment_bytes + TAG_BYTES)
    tags = []
    with atomic_writer(path) as file:
        file.write(packed)
        for index, plaintext in enumerate(plaintexts):
            with memoryview(sealed)[: len(plaintext) + TAG_BYTES] as out:
                cipher.seal_into(index, plaintext, records=header.records_in(index), out=out)
                file.write(out)
                tags.append(bytes(out[-TAG_BYTES:]))
        size = file.tell()
    return ShardEntry(
        file=f"{folder.name}/{path.name}",
        uuid=header.shard_uuid,
        number=header.shard_number,
        records=header.records,
        segments=header.segments,
        size=size,
        header_sha256=digest,
        merkle_root=merkle_root(tags),
        commitment=keys.commitment,
        wrapped_key=wrapped_key,
    )


class ShardReader:
    """An open shard that was found to be the one its manifest names.

    Args:
        storage: Where the dataset lies.
        entry: The shard's entry in a verified manifest.
        key: The shard's data key.
        schema: The split's columns.
        dataset_id: From the manifest.

    Raises:
        ShardCorruptedError: if the file is missing, another one stands in its place, or any part of
            it is not what the manifest's signer saw.
        StorageError: if the storage did not answer, or refused.

    Opening reads the header and the tag of every segment and compares their Merkle root with the
    manifest. Decryption then checks each segment against its tag, and that tag against those.
    It may be used from several threads. The file is closed when the reader is collected.
    """

    def __init__(
        self,
        storage: Storage,
        entry: ShardEntry,
        *,
        key: DataKey,
        schema: Schema,
        dataset_id: bytes,
    ) -> None:
        self._name = entry.file
        self._schema = schema
        try:
            self._file = storage.open(entry)
        except OSError as error:
            raise self.corrupted(
                f"it cannot be opened ({error.strerror}). If the dataset was rotated, erased from "
                "or replaced since it was opened, open it again"
            ) from None
        # Not before the last thread that reads has let go of it: numbers of files are used again.
        self._closing = weakref.finalize(self, self._file.close)
        self._closing.atexit = False
        try:
            self._retrying(self._authenticate, entry, key, dataset_id)
        except BaseException:
            self.close()
            raise

    def _retrying(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do it once more, with the bytes where they lie, if a copy of them is no good."""
        try:
            return work(*arguments)
        except ShardCorruptedError:
            if not self._file.distrust():
                raise
        return work(*arguments)

    def _authenticate(self, entry: ShardEntry, key: DataKey, dataset_id: bytes) -> None:
        self.header = self._verify(entry, dataset_id)
        keys = _derived(key, entry.uuid, dataset_id)
        if not hmac.compare_digest(keys.commitment, self.header.commitment):
            raise self.corrupted("its key commitment does not match the manifest's key")
        self._cipher = SegmentCipher(keys, header_digest=entry.header_sha256)
        self._size = entry.size
        self._tags = read_tags(self._file, self.header, entry.size)
        if tags_root(self._tags) != entry.merkle_root:
            raise self.corrupted("its segments are not the ones that the manifest was signed for")

    def _verify(self, entry: ShardEntry, dataset_id: bytes) -> Header:
        size = self._file.size
        if size != entry.size:
            raise self.corrupted(f"it has {size} bytes where the manifest has {entry.size}")
        packed = self._read(0, HEADER_BYTES)
        if hashlib.sha256(packed).digest() != entry.header_sha256:
            raise self.corrupted("its header was altered, or another shard stands in its place")
        try:
            header = Header.unpack(bytes(packed), size=size)
        except ShardCorruptedError as error:
            raise self.corrupted(str(error)) from None
        expected = (
            dataset_id,
            entry.uuid,
            entry.number,
            entry.segments,
            entry.records,
            self._schema.digest,
            entry.commitment,
        )
        if expected != (
            header.dataset_id,
            header.shard_uuid,
            header.shard_number,
            header.segments,
            header.records,
            header.schema_digest,
            header.commitment,
        ):
            raise self.corrupted("its header and the manifest contradict each other")
        return header

    def decrypt(self, index: int, scratch: Scratch, out: memoryview | None = None) -> memoryview:
        """Return the plaintext of one segment.

        Args:
            index: Number of the segment.
            scratch: Memory to use.
            out: Where the plaintext goes, if it is as long. What is there after an error must not
                be used. By default, or if the plaintext has another length, it goes to scratch
                memory and is valid until that is used again.

        Raises:
            ShardCorruptedError: if the segment was altered since the shard was opened.
            StorageError: if the storage did not answer, or refused.
        """
        return self._retrying(self._decrypt, (index,), scratch, out)

    def decrypt_several(self, indices: Sequence[int], scratch: Scratch) -> memoryview:
        """Return the plaintext of segments that are equally long, one after another.

        It is valid until the scratch memory is used again. Raises what :meth:`decrypt` does.
        """
        return self._retrying(self._decrypt, indices, scratch, None)

    def _decrypt(
        self, indices: Sequence[int], scratch: Scratch, out: memoryview | None
    ) -> memoryview:
        header, tags = self.header, self._tags
        begin, stride = header.segment_offset(0), header.segment_bytes + TAG_BYTES
        length = min(stride, self._size - begin - indices[0] * stride)
        sealed, opened = scratch.sealed(length), length - TAG_BYTES
        if out is None or len(out) != opened * len(indices):
            out = scratch.plaintext(opened * len(indices))
        found, start = sealed[opened:], 0
        for index in indices:
            complete = self._file.read_into(begin + index * stride, sealed) == length
            tag = tags[index * TAG_BYTES : (index + 1) * TAG_BYTES]
            if not (complete and hmac.compare_digest(found, tag)):
                raise self.corrupted(f"tag mismatch in segment {index}")
            records, part = header.records_in(index), out[start : start + opened]
            try:
                self._cipher.open_into(index, sealed, records=records, out=part)
            except IntegrityError as error:
                raise self.corrupted(str(error)) from None
            start += opened
        return out

    def read_segment(self, index: int) -> dict[str, ColumnData]:
        """Return the columns of one segment's rows.

        Raises:
            ShardCorruptedError: if the segment was altered since the shard was opened, or does not
                hold what its schema says.
            StorageError: if the storage did not answer, or refused.
        """
        # Memory of its own: the columns are views of it.
        plaintext = bytearray(self.decrypt(index, Scratch()))
        try:
            return decode_segment(self._schema, plaintext, records=self.header.records_in(index))
        except IntegrityError as error:
            raise self.corrupted(f"{error}, in segment {index}") from None

    def _read(self, offset: int, length: int) -> bytearray:
        data = bytearray(length)
        del data[self._file.read_into(offset, data) :]
        return data

    def corrupted(self, reason: str) -> ShardCorruptedError:
        """Return the error that says why nothing of this shard can be used."""
        return ShardCorruptedError(
            f"shard {self._name!r} rejected: {reason}; nothing from it was returned."
        )

    def close(self) -> None:
        """Release the file; the reader is of no use afterwards."""
        self._closing()


def _rows(columns: Mapping[str, ColumnData], start: int, stop: int) -> dict[str, ColumnData]:
    return {name: values[start:stop] for name, values in columns.items()}
