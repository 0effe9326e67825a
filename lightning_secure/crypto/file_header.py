"""The header of files that are one encrypted stream: checkpoints and tracked artifacts.

A head is::

    magic (8) | version (2) | header length (4) | header (JSON)

with little-endian integers. The stream after it is bound to all of these bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.errors import ConfigError, IntegrityError

_PREFIX: Final = struct.Struct("<8sHI")
_VERSION: Final = 1
_MAX_HEADER: Final = 65536


@dataclass(frozen=True, kw_only=True)
class Head:
    """The header of one kind of file.

    Attributes:
        what: The kind's name.
        magic: The first eight bytes.
        fields: The header's fields and their types.
        otherwise: Further text of the error for a file of another kind.
    """

    what: str
    magic: bytes
    fields: Mapping[str, tuple[type, ...]]
    otherwise: str = ""

    def write(self, header: Mapping[str, Any]) -> bytes:
        """Return the bytes before a stream.

        Raises:
            ConfigError: if the key has more recipients than the header can hold.
        """
        data = canonical_json(header)
        if len(data) > _MAX_HEADER:
            raise ConfigError(
                f"the {self.what}'s key was wrapped for more recipients than its header of "
                f"{_MAX_HEADER} bytes can hold. Nothing was written."
            )
        return _PREFIX.pack(self.magic, _VERSION, len(data)) + data

    def read(self, raw: BinaryIO) -> tuple[bytes, dict[str, Any]]:
        """Return the bytes before a stream, to which it is bound, and the header in them.

        Raises:
            IntegrityError: if the file is of another kind, or its head was altered.
        """
        start = raw.read(_PREFIX.size)
        if len(start) < _PREFIX.size or not start.startswith(self.magic):
            raise IntegrityError(f"it is not an encrypted {self.what}{self.otherwise}")
        _, version, length = _PREFIX.unpack(start)
        if version != _VERSION or length > _MAX_HEADER:
            raise IntegrityError(
                f"its format version {version} is unknown, or its header was altered"
            )
        data = raw.read(length)
        header = parse_json_object(data, what="its header", canonical=True)
        if header.keys() != self.fields.keys() or not all(
            type(header[name]) in kinds for name, kinds in self.fields.items()
        ):
            raise IntegrityError("its header was altered")
        return start + data, header


CHECKPOINT: Final = Head(
    what="checkpoint",
    magic=b"LSECCKPT",
    fields={"checkpoint": (str,), "run_id": (str,), "step": (int,), "key": (dict, list)},
    otherwise=", and plaintext ones are refused. To start from public weights, load them into the "
    "module with torch.load(..., weights_only=True)",
)
FILE: Final = Head(
    what="file", magic=b"LSECFILE", fields={"file": (str,), "name": (str,), "key": (list,)}
)
