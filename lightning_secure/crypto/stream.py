"""Streaming authenticated encryption for files of unknown length: Cobblestone-256.

Writing uses the implementation in ``cryptography``. Reading adds the random access that the same
specification describes and that implementation does not offer yet: each 16 KiB chunk is opened
where it lies.

Source:
    C2SP chunked-encryption, https://c2sp.org/chunked-encryption (Cobblestone-256: SHA-512 and
    AES-256-GCM).
"""

from __future__ import annotations

import hmac
import io
from typing import BinaryIO, Final

from cryptography.cobblestone import Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from typing_extensions import Buffer

from lightning_secure.crypto.keys import DataKey
from lightning_secure.errors import IntegrityError

_CHUNK: Final = 16 * 1024
_TAG: Final = 16
_SEALED: Final = _CHUNK + _TAG
_SALT: Final = 24
_COMMITMENT: Final = 32
_PREFIX: Final = _SALT + _COMMITMENT
_MAX_CHUNKS: Final = 2**38
_BATCH: Final = 64  # chunks read and opened in one go
_PIECE: Final = 1024 * 1024
# The encryptor may return this much more than it is given in one call.
_HEADROOM: Final = _PIECE // 1024 + 16456


class StreamWriter(io.RawIOBase):
    """A file object that encrypts what is written to it.

    Args:
        raw: Receives the ciphertext. It is not closed.
        key: Used for this stream alone.
        context: Bound to the stream; reading needs the same bytes.

    Memory stays near two megabytes however much is written at once. The stream is complete only
    after :meth:`finish`: without it every reader refuses the file as truncated.

    >>> file = io.BytesIO()
    >>> writer = StreamWriter(file, key=DataKey(bytes(32)), context=b"note")
    >>> writer.write(b"left ear")
    8
    >>> writer.finish()
    >>> b"left" in file.getvalue()
    False
    """

    def __init__(self, raw: BinaryIO, *, key: DataKey, context: bytes) -> None:
        super().__init__()
        self._raw = raw
        self._encryptor = Cobblestone256Encryptor(_message_key(key), context)
        self._buffer = bytearray(_PIECE + _HEADROOM)

    def writable(self) -> bool:
        """Return true."""
        return True

    def write(self, data: Buffer, /) -> int:
        """Encrypt ``data`` and pass it on; returns its length in bytes."""
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view), _PIECE):
                count = self._encryptor.update_into(view[start : start + _PIECE], self._buffer)
                self._raw.write(memoryview(self._buffer)[:count])
            return len(view)

    def finish(self) -> None:
        """Write the last chunk, whose shortness marks the end."""
        self._raw.write(self._encryptor.finalize())


class StreamReader(io.RawIOBase):
    """A seekable file object over an encrypted stream; nothing unauthenticated leaves it.

    Args:
        raw: The ciphertext, seekable. It is closed with this object.
        key: The stream's key.
        context: As given to the writer.
        start: Where in ``raw`` the stream begins, in bytes.

    Attributes:
        failure: Why a read failed, for callers that lose the exception on the way; else None.

    Raises:
        IntegrityError: if the key commitment does not match, or the end of the stream is not where
            an authentic last chunk says it is: a truncated or extended file fails here, before any
            of it is parsed. A flipped bit further inside fails when that chunk is read.

    >>> file = io.BytesIO()
    >>> writer = StreamWriter(file, key=DataKey(bytes(32)), context=b"note")
    >>> _ = writer.write(b"left ear"), writer.finish(), file.seek(0)
    >>> StreamReader(file, key=DataKey(bytes(32)), context=b"note").read()
    b'left ear'
    """

    def __init__(self, raw: BinaryIO, *, key: DataKey, context: bytes, start: int = 0) -> None:
        super().__init__()
        self.failure: str | None = None
        self._raw = raw
        self._start = start + _PREFIX
        self._position = 0
        self._cached = -1
        self._chunk = bytearray(_CHUNK)
        self._sealed = bytearray(_BATCH * _SEALED)
        raw.seek(start)
        prefix = bytearray(_PREFIX)
        if _read_fully(raw, memoryview(prefix)) < _PREFIX:
            raise IntegrityError("the encrypted stream ends before its first chunk")
        expanded = HKDFExpand(
            algorithm=SHA512(),
            length=32 + 12 + _COMMITMENT,
            info=b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0"
            + bytes(prefix[:_SALT])
            + context,
        ).derive(_message_key(key))
        if not hmac.compare_digest(expanded[44:], prefix[_SALT:]):
            raise IntegrityError(
                "the encrypted stream does not belong to this key and header: one of them was "
                "altered or exchanged"
            )
        self._cipher = AESGCM(expanded[:32])
        self._base_nonce = int.from_bytes(expanded[32:44], "big")
        self._size = self._authenticate_length(raw.seek(0, io.SEEK_END) - self._start)

    def _authenticate_length(self, sealed: int) -> int:
        full, rest = divmod(sealed, _SEALED)
        if rest < _TAG or full >= _MAX_CHUNKS:
            raise IntegrityError("the encrypted stream is truncated")
        self._load(full, rest - _TAG)
        return full * _CHUNK + rest - _TAG

    def _load(self, index: int, length: int) -> None:
        """Put chunk ``index``, which has ``length`` plaintext bytes, into the cache."""
        if index == self._cached:
            return
        self._cached = -1
        with memoryview(self._chunk)[:length] as out:
            self._open_chunks(index, out)
        self._cached = index

    def _open_chunks(self, first: int, out: memoryview) -> None:
        """Decrypt consecutive chunks, of which only the last may be short, into ``out``."""
        count = max(1, -(-len(out) // _CHUNK))
        self._raw.seek(self._start + first * _SEALED)
        with memoryview(self._sealed)[: len(out) + count * _TAG] as sealed:
            if _read_fully(self._raw, sealed) != len(sealed):
                raise self._failed("the encrypted stream shrank while it was read")
            for i in range(count):
                nonce = (self._base_nonce ^ (first + i)).to_bytes(12, "big")
                try:
                    with (
                        sealed[i * _SEALED : (i + 1) * _SEALED] as chunk,
                        out[i * _CHUNK : (i + 1) * _CHUNK] as plain,
                    ):
                        self._cipher.decrypt_into(nonce, chunk, None, plain)
                except InvalidTag:
                    out[:] = bytes(len(out))  # decryption writes before it knows
                    raise self._failed(
                        f"tag mismatch in chunk {first + i} of the encrypted stream: it was "
                        "altered or truncated"
                    ) from None

    def _failed(self, reason: str) -> IntegrityError:
        self.failure = reason
        return IntegrityError(reason)

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def tell(self) -> int:
        """Return the position in the plaintext, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to a position in the plaintext, in bytes."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill ``buffer`` with authenticated plaintext and return how many bytes there were.

        Raises:
            IntegrityError: if a chunk that the range touches was altered.
        """
        with memoryview(buffer).cast("B") as out:
            wanted = min(len(out), max(0, self._size - self._position))
            done = 0
            while done < wanted:
                index, offset = divmod(self._position, _CHUNK)
                whole = min((wanted - done) // _CHUNK, _BATCH)
                if offset == 0 and whole:
                    count = whole * _CHUNK
                    self._open_chunks(index, out[done : done + count])
                else:
                    length = min(_CHUNK, self._size - index * _CHUNK)
                    self._load(index, length)
                    count = min(length - offset, wanted - done)
                    out[done : done + count] = memoryview(self._chunk)[offset : offset + count]
                done += count
                self._position += count
            return done

    def close(self) -> None:
        """Close this object and the ciphertext under it, and drop the cached plaintext."""
        if not self.closed:
            self._chunk = bytearray()
            self._raw.close()
        super().close()


def _message_key(key: DataKey) -> bytes:
    return key.derive(info=b"lsec/v1/stream")


def _read_fully(raw: BinaryIO, out: memoryview) -> int:
    done = 0
    while done < len(out):
        piece = raw.read(len(out) - done)
        if not piece:
            break
        out[done : done + len(piece)] = piece
        done += len(piece)
    return done
