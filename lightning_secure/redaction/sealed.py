"""Whether a file is one that this package encrypted, as far as can be seen without its key."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any, Final

from lightning_secure.crypto.encoding import parse_json_object
from lightning_secure.crypto.segments import TAG_BYTES
from lightning_secure.errors import IntegrityError

__all__ = ["is_sealed"]

# docs/format.md says what these are.
_PREFIX: Final = struct.Struct("<8sHI")
_CHECKPOINT_FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "checkpoint": (str,),
    "run_id": (str,),
    "step": (int,),
    "key": (dict, list),
}
_FILE_FIELDS: Final[dict[str, tuple[type, ...]]] = {"file": (str,), "name": (str,), "key": (list,)}
_MAX_HEADER: Final = 65536
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

    Whoever wants to pass text off as one can still do so in part; what is looked for are files
    that begin like one by chance or by mistake.
    """
    if data.startswith(b"LSECCKPT"):
        body = _stream_body(data, _CHECKPOINT_FIELDS)
    elif data.startswith(b"LSECFILE"):
        body = _stream_body(data, _FILE_FIELDS)
    elif data.startswith(b"LSECSHRD"):
        body = _shard_body(data)
    else:
        return False
    return body is not None and _TEXT.search(body) is None


def _stream_body(data: bytes, fields: Mapping[str, tuple[type, ...]]) -> bytes | None:
    if len(data) < _PREFIX.size:
        return None
    _, version, length = _PREFIX.unpack_from(data)
    if version != 1 or length > _MAX_HEADER:
        return None
    header: dict[str, Any] = {}
    try:
        text = data[_PREFIX.size : _PREFIX.size + length]
        header = parse_json_object(text, what="the header", canonical=True)
    except IntegrityError:
        return None
    if header.keys() != fields.keys() or not all(
        isinstance(header[name], kinds) for name, kinds in fields.items()
    ):
        return None
    body = data[_PREFIX.size + length :]
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
