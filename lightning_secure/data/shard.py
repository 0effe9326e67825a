"""One shard file: sealing it whole, and reading any segment of it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.manifest import PartitionKey, ShardEntry
from lightning_secure.crypto.merkle import merkle_root
from lightning_secure.crypto.segments import (
    MAX_SEGMENT_BYTES,
    MAX_SEGMENTS,
    SUITE_AES256GCM_SHA256,
    TAG_BYTES,
    SegmentCipher,
    SegmentKeys,
)
from lightning_secure.data.format import (
    HEADER_BYTES,
    ColumnData,
    Header,
    Schema,
    decode_segment,
    encode_segment,
    segment_lengths,
)
from lightning_secure.data.storage import Storage
from lightning_secure.errors import DataError, IntegrityError, ShardCorruptedError
from lightning_secure.files import atomic_writer

__all__ = ["Scratch", "ShardReader", "seal_shard", "shard_name"]


def shard_name(number: int, uuid: bytes) -> str:
    """Return the file name of a shard, without its folder."""
    return f"shard-{number:05d}-{uuid.hex()[:8]}.lsec"


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
    uuid: bytes | None = None,
) -> ShardEntry:
    """Encrypt rows into a new file below ``folder`` and return its manifest entry.

    Args:
        folder: The split's folder; its name becomes part of the entry's path.
        columns: The rows, see :func:`~lightning_secure.data.format.encode_segment`.
        records: Number of rows, at least 1.
        schema: The columns.
        dataset_id: 16 bytes.
        number: Position of the shard in its split.
        segment_bytes: Plaintext length that segments should not exceed. A single row that is
            longer gets a longer segment.
        partition: Protects the shard's fresh data key.
        uuid: 16 random bytes that nothing else is named by; drawn by default.

    Raises:
        DataError: A row needs 64 MiB or more, or the rows need more than 2**20 segments.

    The file appears whole or not at all, and is worthless until a signed manifest names it.
    """
    segments, per_segment, length = _plan(columns, records, schema, segment_bytes)
    key, uuid = DataKey.generate(), uuid or secrets.token_bytes(16)
    keys = SegmentKeys.derive(
        key, shard_uuid=uuid, dataset_id=dataset_id, suite=SUITE_AES256GCM_SHA256
    )
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
    packed = header.pack()
    digest = hashlib.sha256(packed).digest()
    cipher = SegmentCipher(keys, header_digest=digest)
    path = folder / shard_name(number, uuid)
    sealed = bytearray(length + TAG_BYTES)
    tags = []
    with atomic_writer(path) as file:
        file.write(packed)
        for index in range(segments):
            start = index * per_segment
            count = header.records_in(index)
            plaintext = encode_segment(schema, _rows(columns, start, start + count))
            if index < segments - 1:
                plaintext += bytes(length - len(plaintext))
            with memoryview(sealed)[: len(plaintext) + TAG_BYTES] as out:
                cipher.seal_into(index, plaintext, records=count, out=out)
                file.write(out)
                tags.append(bytes(out[-TAG_BYTES:]))
        size = file.tell()
    return ShardEntry(
        file=f"{folder.name}/{path.name}",
        uuid=uuid,
        number=number,
        records=records,
        segments=segments,
        size=size,
        header_sha256=digest,
        merkle_root=merkle_root(tags),
        commitment=keys.commitment,
        wrapped_key=partition.seal(key, shard_uuid=uuid),
    )


class Scratch:
    """Memory for one segment at a time, used again from segment to segment by one thread."""

    def __init__(self) -> None:
        self._sealed = memoryview(bytearray())
        self._plaintext = memoryview(bytearray())

    def views(self, length: int) -> tuple[memoryview, memoryview]:
        """Return room for ``length`` sealed bytes, and for what is in them."""
        if length > len(self._sealed):
            self._sealed = memoryview(bytearray(length))
            self._plaintext = memoryview(bytearray(length))
        return self._sealed[:length], self._plaintext[: max(0, length - TAG_BYTES)]


class ShardReader:
    """An open shard that was found to be the one its manifest names.

    Args:
        storage: Where the dataset lies.
        entry: The shard's entry in a verified manifest.
        key: The shard's data key.
        schema: The split's columns.
        dataset_id: From the manifest.

    Raises:
        ShardCorruptedError: The file is missing, another one stands in its place, or any part of
            it is not what the manifest's signer saw.
        StorageError: The storage did not answer, or refused.

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
            raise self.corrupted(f"it cannot be opened ({error.strerror})") from None
        # Not before the last thread that reads has let go of it: numbers of files are used again.
        self._closing = weakref.finalize(self, self._file.close)
        self._closing.atexit = False
        try:
            self._retrying(lambda: self._authenticate(entry, key, dataset_id))
        except BaseException:
            self.close()
            raise

    def _retrying(self, work: Callable[[], _T]) -> _T:
        """Do it once more, with the bytes where they lie, if a copy of them is no good."""
        try:
            return work()
        except ShardCorruptedError:
            if not self._file.distrust():
                raise
        return work()

    def _authenticate(self, entry: ShardEntry, key: DataKey, dataset_id: bytes) -> None:
        self.header = self._verify(entry, dataset_id)
        keys = SegmentKeys.derive(
            key,
            shard_uuid=entry.uuid,
            dataset_id=dataset_id,
            suite=SUITE_AES256GCM_SHA256,
        )
        if not hmac.compare_digest(keys.commitment, self.header.commitment):
            raise self.corrupted("its key commitment does not match the manifest's key")
        self._cipher = SegmentCipher(keys, header_digest=entry.header_sha256)
        self._size = entry.size
        self._tags = self._read_tags(entry.size)
        if merkle_root(_chunks(self._tags)) != entry.merkle_root:
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

    def _read_tags(self, size: int) -> bytes:
        header, read = self.header, self._file.read_into
        stride = header.segment_bytes + TAG_BYTES
        tags = bytearray(header.segments * TAG_BYTES)
        with memoryview(tags) as view:
            offset = HEADER_BYTES + header.segment_bytes
            for start in range(0, len(tags) - TAG_BYTES, TAG_BYTES):
                read(offset, view[start : start + TAG_BYTES])
                offset += stride
            read(size - TAG_BYTES, view[-TAG_BYTES:])
        return bytes(tags)

    def decrypt(self, index: int, scratch: Scratch) -> memoryview:
        """Return the plaintext of one segment.

        Args:
            index: Number of the segment.
            scratch: Memory to use. The result is valid until it is used again.

        Raises:
            ShardCorruptedError: The segment was altered since the shard was opened.
            StorageError: The storage did not answer, or refused.
        """
        return self._retrying(lambda: self._decrypt(index, scratch))

    def _decrypt(self, index: int, scratch: Scratch) -> memoryview:
        header = self.header
        offset = header.segment_offset(index)
        length = min(header.segment_bytes + TAG_BYTES, self._size - offset)
        sealed, plaintext = scratch.views(length)
        complete = self._file.read_into(offset, sealed) == length
        tag = self._tags[index * TAG_BYTES : (index + 1) * TAG_BYTES]
        if not (complete and hmac.compare_digest(sealed[-TAG_BYTES:], tag)):
            raise self.corrupted(f"tag mismatch in segment {index}")
        try:
            self._cipher.open_into(index, sealed, records=header.records_in(index), out=plaintext)
        except IntegrityError as error:
            raise self.corrupted(str(error)) from None
        return plaintext

    def read_segment(self, index: int) -> dict[str, ColumnData]:
        """Return the columns of one segment's rows.

        Raises:
            ShardCorruptedError: The segment was altered since the shard was opened, or does not
                hold what its schema says.
            StorageError: The storage did not answer, or refused.
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


def _plan(
    columns: Mapping[str, ColumnData], records: int, schema: Schema, segment_bytes: int
) -> tuple[int, int, int]:
    """Return how many segments there are, how many rows each holds, and its plaintext length."""
    length_of = segment_lengths(schema, columns)
    per_segment = records
    while True:
        starts = range(0, records, per_segment)
        # Rows of one size need one look, at the first segment.
        length = max(
            length_of(start, min(start + per_segment, records))
            for start in (starts[:1] if schema.fixed else starts)
        )
        if length <= segment_bytes or per_segment == 1:
            break
        per_segment = max(1, min(per_segment - 1, per_segment * segment_bytes // length))
    if length > MAX_SEGMENT_BYTES or len(starts) > MAX_SEGMENTS:
        raise DataError(
            f"the rows need {len(starts)} segments of {length} bytes, and a shard can have "
            f"{MAX_SEGMENTS} of {MAX_SEGMENT_BYTES}. Nothing of them was written. Choose larger "
            "segments or smaller shards, or split the rows."
        )
    return len(starts), per_segment, length


def _rows(columns: Mapping[str, ColumnData], start: int, stop: int) -> dict[str, ColumnData]:
    return {name: values[start:stop] for name, values in columns.items()}


def _chunks(data: bytes) -> Iterator[bytes]:
    return (data[start : start + TAG_BYTES] for start in range(0, len(data), TAG_BYTES))
