"""Recognition of files that this package encrypted, as far as that goes without the key."""

from __future__ import annotations

import io
import re
import struct
from typing import Final

from lightning_secure.crypto.file_header import CHECKPOINT, FILE, Head
from lightning_secure.crypto.segments import TAG_BYTES
from lightning_secure.errors import IntegrityError

# docs/format.md says what these are.
_STREAM_START: Final = 24 + 32  # salt and commitment
_CHUNK: Final = 16 * 1024 + TAG_BYTES
_SHARD: Final = struct.Struct("<8sHHI16s16sIIQII32s32s")
_SHARD_HEADER: Final = 4096
# 64 bytes of ciphertext are text once in 10^26 times.
_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e]{64}")


def is_sealed(data: bytes) -> bool:
    """Return whether a file has the form of one that this package encrypts, to its end.

    Args:
        data: The whole file.

    Text can still be passed off as one on purpose, in part; the check finds files that begin like
    one by chance or by mistake.

    >>> from lightning_secure.redaction.artifacts.encrypted import encrypted
    >>> is_sealed(encrypted(b"weights", name="model.bin", keys=keys)), is_sealed(b"weights")
    (True, False)
    """
    if data.startswith(CHECKPOINT.magic):
        body = _stream_body(data, CHECKPOINT)
    elif data.startswith(FILE.magic):
        body = _stream_body(data, FILE)
    elif data.startswith(b"LSECSHRD"):
        body = _shard_body(data)
    else:
        return False
    return body is not None and _TEXT.search(body) is None


def _stream_body(data: bytes, head: Head) -> bytes | None:
    try:
        start, _ = head.read(io.BytesIO(data))
    except IntegrityError:
        return None
    body = data[len(start) :]
    last = (len(body) - _STREAM_START) % _CHUNK
    return body if len(body) > _STREAM_START and last >= TAG_BYTES else None


def _shard_body(data: bytes) -> bytes | None:
    if len(data) < _SHARD_HEADER or any(data[_SHARD.size : _SHARD_HEADER]):
        return None
    _, version, suite, flags, *_, segments, _, _, segment_bytes, _, _ = _SHARD.unpack_from(data)
    body = data[_SHARD_HEADER:]
    last = len(body) - (segments - 1) * (segment_bytes + TAG_BYTES)
    fits = segments > 0 and TAG_BYTES < last <= segment_bytes + TAG_BYTES
    return body if fits and (version, suite, flags) == (1, 1, 0) else None
