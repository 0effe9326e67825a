"""Random-access authenticated encryption: a file as a row of AES-256-GCM segments.

Every shard has a data key of its own, used for that shard alone, so the segment number can be the
nonce. The associated data binds a segment to its number, to the shard's header and through it to
the dataset; bit flips, reordering, truncation, extension and exchange between shards all fail.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.utils import Buffer

from lightning_secure.crypto.keys import DataKey
from lightning_secure.errors import IntegrityError

SUITE_AES256GCM_SHA256: Final = 1
TAG_BYTES: Final = 16
MAX_SEGMENTS: Final = 2**20
MAX_SEGMENT_BYTES: Final = 2**26 - 1
_TYPE_DATA: Final = 1
_NONCE: Final = struct.Struct("<B3xQ")
_AAD: Final = struct.Struct("<32sQQB")


@dataclass(frozen=True, repr=False)
class SegmentKeys:
    """The keys that are derived from a shard's data key.

    Attributes:
        encryption: AES-256 key of the segments.
        commitment: 32 public bytes that no other data key produces. AES-GCM alone is not
            key-committing: one ciphertext can be made to open under two keys.
    """

    encryption: bytes
    commitment: bytes

    @classmethod
    def derive(cls, key: DataKey, *, shard_uuid: bytes, dataset_id: bytes, suite: int) -> Self:
        """Expand a data key: ``HKDF-SHA256(DEK, salt=uuid, info="lsec/v1" || suite || dataset)``.

        Args:
            key: The shard's data key.
            shard_uuid: 16 bytes, unique to the shard.
            dataset_id: 16 bytes.
            suite: Number of the cipher suite, bound into the keys.
        """
        expanded = key.derive(
            salt=shard_uuid, info=b"lsec/v1" + struct.pack("<H", suite) + dataset_id, length=64
        )
        return cls(encryption=expanded[:32], commitment=expanded[32:])


class SegmentCipher:
    """Seals and opens the segments of one shard.

    Args:
        keys: From :meth:`SegmentKeys.derive`.
        header_digest: SHA-256 of the shard's whole header, 32 bytes.

    Nonce and associated data of segment ``i`` with ``n`` records, all integers little-endian::

        nonce = type (1) || 0 0 0 || i (8)
        aad   = header digest (32) || i (8) || n (8) || type (1)

    Instances hold no mutable state and may be used from several threads; AES-GCM releases the GIL
    from 2 KB on.
    """

    def __init__(self, keys: SegmentKeys, *, header_digest: bytes) -> None:
        self._cipher = AESGCM(keys.encryption)
        self._header_digest = header_digest

    def seal_into(self, index: int, plaintext: Buffer, *, records: int, out: Buffer) -> int:
        """Write ``ciphertext || tag`` of one segment into ``out`` and return its length."""
        return self._cipher.encrypt_into(_nonce(index), plaintext, self._aad(index, records), out)

    def open_into(self, index: int, sealed: Buffer, *, records: int, out: Buffer) -> int:
        """Write the plaintext of one segment into ``out`` and return its length.

        Raises:
            IntegrityError: if the segment is not what was sealed at this place. ``out`` may then
                hold unauthenticated bytes and must be thrown away.
        """
        try:
            return self._cipher.decrypt_into(_nonce(index), sealed, self._aad(index, records), out)
        except (InvalidTag, ValueError):
            # ValueError: shorter than a tag, or not as long as `out`.
            raise IntegrityError(f"tag mismatch in segment {index}") from None

    def _aad(self, index: int, records: int) -> bytes:
        return _AAD.pack(self._header_digest, index, records, _TYPE_DATA)


def _nonce(index: int) -> bytes:
    return _NONCE.pack(_TYPE_DATA, index)
