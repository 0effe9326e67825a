"""Pictures without what a camera or a program wrote beside them, and otherwise bit for bit.

Only what is needed to decode the picture stays, by a list of what may: where a picture was taken,
by which device, when, by whom and with which thumbnail all lie in parts that are not on it.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from lightning_secure.errors import DataError

_PNG: Final = b"\x89PNG\r\n\x1a\n"
#: Chunks that decide how pixels come out, with the bytes that each may have. Colour profiles
#: (iCCP) are not on the list: they hold text of their own.
_PNG_CHUNKS: Final = {
    b"IHDR": range(13, 14),
    b"PLTE": range(3, 769),
    b"tRNS": range(1, 257),
    b"gAMA": range(4, 5),
    b"cHRM": range(32, 33),
    b"sRGB": range(1, 2),
    b"sBIT": range(1, 5),
    b"IEND": range(1),
}
#: Samples of a pixel by the colour type in the header.
_PNG_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: First column and row of each pass of an interlaced picture, and their distances.
_PNG_PASSES: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip
_PIECE: Final = 2**20
_STANDALONE: Final = {0x01, *range(0xD0, 0xD8)}
#: Tables and frames; JFIF (APP0) and Adobe's colour transform (APP14) are handled on their own.
_JPEG_PARTS: Final = {0xC4, 0xCC, 0xDB, 0xDD, *(n for n in range(0xC0, 0xD0))}


def strip_metadata(data: bytes, *, orientation: int = 1) -> bytes:
    """Return the picture without EXIF, XMP, IPTC, comments, profiles, thumbnails and appendages.

    Args:
        data: A JPEG or PNG file.
        orientation: EXIF's number of how the picture is to be turned, 1 to 8. If it is not 1, a
            JPEG gets a fresh EXIF part with this number and nothing else, so that it is still
            shown the right way up.

    Data hidden in the coded pixels themselves stays: in their lowest bits, in tables and palette
    entries that no pixel needs, behind the last block of a JPEG's scan.

    Raises:
        DataError: if the picture is of neither format, or damaged.

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
    before, pixels, after = bytearray(_PNG), bytearray(), bytearray()
    header, seen = b"", set()
    position = 8
    while True:
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise _unknown()
        body = data[position + 8 : end - 4]
        if kind == b"IDAT":
            pixels += body
        elif kind in _PNG_CHUNKS:
            if length not in _PNG_CHUNKS[kind] or kind in seen:
                raise _unknown()
            seen.add(kind)
            header = body if kind == b"IHDR" else header
            # A palette of a picture without one is for old displays only.
            if kind not in (b"PLTE", b"tRNS") or _wanted(kind, body, header):
                (after if pixels else before).extend(data[position:end])
        if kind == b"IEND":
            return bytes(before + _chunk(b"IDAT", _stream(bytes(pixels), header)) + after)
        position = end


def _wanted(kind: bytes, body: bytes, header: bytes) -> bool:
    colour = header[9]
    if kind == b"PLTE":
        return colour == 3
    if colour in (0, 2) and len(body) != 2 * _PNG_SAMPLES[colour]:
        raise _unknown()
    return colour in (0, 2, 3)


def _stream(pixels: bytes, header: bytes) -> bytes:
    """Return the compressed pixels without what lies behind them; there must be no more of them."""
    inflate = zlib.decompressobj()
    found, rest = 0, pixels
    try:
        while not inflate.eof and found <= _png_size(header):
            piece = inflate.decompress(rest, _PIECE)
            found, rest = found + len(piece), inflate.unconsumed_tail
            if not piece and not rest:
                break
    except zlib.error:
        found = -1
    if not inflate.eof or found != _png_size(header):
        raise _unknown()
    return pixels[: len(pixels) - len(inflate.unused_data)]


def _png_size(header: bytes) -> int:
    """Return the bytes of all rows, each with its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _PNG_SAMPLES.get(colour, 0)
    total = 0
    for x, y, across, down in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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
