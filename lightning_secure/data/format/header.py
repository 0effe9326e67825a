"""The first 4096 bytes of a shard: which one it is, and where its segments lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from lightning_secure.crypto.segments import (
    MAX_SEGMENT_BYTES,
    MAX_SEGMENTS,
    SUITE_AES256GCM_SHA256,
    TAG_BYTES,
)
from lightning_secure.errors import ShardCorruptedError

MAGIC: Final = b"LSECSHRD"
VERSION: Final = 1
HEADER_BYTES: Final = 4096
_HEADER: Final = struct.Struct("<8sHHI16s16sIIQII32s32s")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first 4096 bytes of a shard.

    Layout, at offset: magic ``LSECSHRD`` (0, 8 bytes), format version (8, 2), suite (10, 2),
    flags (12, 4), dataset id (16, 16), shard uuid (32, 16), shard number (48, 4), segment count
    (52, 4), record count (56, 8), records per segment (64, 4), segment plaintext length (68, 4),
    schema digest (72, 32), key commitment (104, 32), zeros (136 to 4096).
    """

    dataset_id: bytes
    shard_uuid: bytes
    shard_number: int
    segments: int
    records: int
    records_per_segment: int
    segment_bytes: int
    schema_digest: bytes
    commitment: bytes

    def pack(self) -> bytes:
        """Return the 4096 bytes."""
        return _HEADER.pack(
            MAGIC,
            VERSION,
            SUITE_AES256GCM_SHA256,
            0,
            self.dataset_id,
            self.shard_uuid,
            self.shard_number,
            self.segments,
            self.records,
            self.records_per_segment,
            self.segment_bytes,
            self.schema_digest,
            self.commitment,
        ).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, *, size: int) -> Self:
        """Parse and check the header of a file of ``size`` bytes.

        Raises:
            ShardCorruptedError: if the file is not a shard of this version, or its numbers
                contradict each other or the file's size.
        """
        if len(data) != HEADER_BYTES or data[:8] != MAGIC:
            raise ShardCorruptedError("it is not a shard of lightning_secure")
        _, version, suite, flags, *rest = _HEADER.unpack_from(data)
        if (version, suite, flags) != (VERSION, SUITE_AES256GCM_SHA256, 0):
            raise ShardCorruptedError(
                f"format version {version}, suite {suite} and flags {flags} are unknown"
            )
        header = cls(**dict(zip(cls.__annotations__, rest, strict=True)))
        if any(data[_HEADER.size :]) or not header._consistent(size):
            raise ShardCorruptedError("its header contradicts itself or the size of the file")
        return header

    def _consistent(self, size: int) -> bool:
        sealed = size - HEADER_BYTES - (self.segments - 1) * (self.segment_bytes + TAG_BYTES)
        return (
            0 < self.segments <= MAX_SEGMENTS
            and 0 < self.segment_bytes <= MAX_SEGMENT_BYTES
            and self.records_per_segment > 0
            and 0
            < self.records - (self.segments - 1) * self.records_per_segment
            <= self.records_per_segment
            and TAG_BYTES < sealed <= self.segment_bytes + TAG_BYTES
        )

    def segment_offset(self, index: int) -> int:
        """Return where segment ``index`` begins in the file, in bytes."""
        return HEADER_BYTES + index * (self.segment_bytes + TAG_BYTES)

    def records_in(self, index: int) -> int:
        """Return how many records segment ``index`` holds."""
        return min(self.records_per_segment, self.records - index * self.records_per_segment)
