"""Pictures without what a camera or a program wrote beside them, and otherwise bit for bit.

Only what is needed to decode the picture stays, by a list of what may: where a picture was taken,
by which device, when, by whom and with which thumbnail all lie in parts that are not on it.
"""

from __future__ import annotations

import struct
from typing import Final

from lightning_secure.errors import DataError

__all__ = ["strip_metadata"]

_PNG: Final = b"\x89PNG\r\n\x1a\n"
#: What decides how pixels come out. Colour profiles (iCCP) are not: they hold text of their own.
_PNG_CHUNKS: Final = {
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"gAMA",
    b"cHRM",
    b"sRGB",
    b"sBIT",
}
_STANDALONE: Final = {0x01, *range(0xD0, 0xD8)}
#: Tables and frames; JFIF (APP0) and Adobe's colour transform (APP14) are handled on their own.
_JPEG_PARTS: Final = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, *(n for n in range(0xC0, 0xD0))}


def strip_metadata(data: bytes, *, orientation: int = 1) -> bytes:
    """Return the picture without EXIF, XMP, IPTC, comments, profiles, thumbnails and appendages.

    Args:
        data: A JPEG or PNG file.
        orientation: EXIF's number of how the picture is to be turned, 1 to 8. If it is not 1, a
            JPEG gets a fresh EXIF part with this number and nothing else, so that it is still
            shown the right way up.

    Raises:
        DataError: It is neither, or damaged.

    Source:
        ITU-T T.81, annex B; PNG, third edition, section 5.
    """
    try:
        if data[:8] == _PNG:
            return _png(data)
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data, orientation)
    except (IndexError, struct.error):
        pass
    raise _unknown()


def _unknown() -> DataError:
    return DataError("it is no JPEG or PNG that could be taken apart")


def _png(data: bytes) -> bytes:
    out = bytearray(_PNG)
    position = 8
    while True:
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise _unknown()
        if kind in _PNG_CHUNKS:
            out += data[position:end]
        if kind == b"IEND":
            return bytes(out)
        position = end


def _jpeg(data: bytes, orientation: int) -> bytes:
    out = bytearray(b"\xff\xd8")
    position, first = 2, True
    while True:
        if data[position] != 0xFF:
            raise _unknown()
        while data[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = data[position + 1]
        position += 2
        if marker == 0xD9:
            return bytes(out + b"\xff\xd9")
        if marker in _STANDALONE:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        body = data[position + 2 : position + length]
        position += length
        if length < 2 or position > len(data):
            raise _unknown()
        if first and marker != 0xE0:
            out += _oriented(orientation)
        if marker == 0xE0 and body[:5] == b"JFIF\0":
            # Its thumbnail goes: the last two numbers are its size.
            out += _part(0xE0, body[:12] + b"\0\0")
            out += _oriented(orientation) if first else b""
        elif (marker == 0xEE and body[:5] == b"Adobe") or marker in _JPEG_PARTS:
            out += _part(marker, body[:12] if marker == 0xEE else body)
        elif marker == 0xDA:
            end = _scan_end(data, position)
            out += _part(marker, body) + data[position:end]
            position = end
        first = False


def _scan_end(data: bytes, position: int) -> int:
    """Return where the coded data ends: before a marker that is no restart and no stuffed byte."""
    while True:
        position = data.find(b"\xff", position)
        if position < 0:
            raise _unknown()
        following = data[position + 1]
        if following == 0 or following in _STANDALONE:
            position += 2
        elif following == 0xFF:
            position += 1
        else:
            return position


def _part(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _oriented(orientation: int) -> bytes:
    """Return an EXIF part with one entry, tag 0x0112, or nothing for pictures the right way up."""
    if orientation == 1:
        return b""
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    return _part(0xE1, b"Exif\0\0" + tiff)
