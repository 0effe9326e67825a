"""Detection of metadata in a picture's file: a place, a name, a comment."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

#: Entries of a TIFF's first directory that describe its origin: descriptions, maker, model,
#: program, date, artist, computer, XMP, copyright, IPTC, Photoshop, EXIF and GPS.
_TIFF_TAGS: Final = frozenset(
    {270, 271, 272, 305, 306, 315, 316, 700, 33432, 33723, 34377, 34665, 34853}
)
_EXTENSION, _COMMENT, _IMAGE = 0x21, 0xFE, 0x2C


def is_picture(data: bytes) -> bool:
    """Return whether ``data`` begins like a file of JPEG, PNG, WebP, GIF, TIFF, HEIF or AVIF."""
    return _form(data) is not None


def has_metadata(data: bytes) -> bool:
    """Return whether a picture has EXIF, XMP, IPTC, texts, comments or something appended.

    Only the usual places are checked: data hidden on purpose is not found.
    """
    form = _form(data)
    try:
        return form is not None and form(data)
    except (IndexError, struct.error):
        return False


def _form(data: bytes) -> Callable[[bytes], bool] | None:
    if data.startswith(b"RIFF"):
        return _webp if data[8:12] == b"WEBP" else None
    if data[4:8] == b"ftyp":
        return _heif if data[8:12] in _BRANDS else None
    return next((form for magic, form in _FORMS.items() if data.startswith(magic)), None)


def _jpeg(data: bytes) -> bool:
    # No marker stands in the coded pixels, so neither does that of a comment.
    marks = (b"Exif\0\0", b"http://ns.adobe.com/xap", b"Photoshop 3.0", b"\xff\xfe")
    end = data.rfind(b"\xff\xd9")
    return any(mark in data for mark in marks) or (end > 0 and bool(data[end + 2 :].strip(b"\0")))


def _png(data: bytes) -> bool:
    end = data.rfind(b"IEND")
    marks = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME")
    return any(mark in data for mark in marks) or (end > 0 and len(data) > end + 8)


def _webp(data: bytes) -> bool:
    (size,) = struct.unpack_from("<I", data, 4)
    return b"EXIF" in data or b"XMP " in data or len(data) > size + 8


def _heif(data: bytes) -> bool:
    return b"Exif" in data or b"application/rdf+xml" in data


def _tiff(data: bytes) -> bool:
    order = "<" if data.startswith(b"II") else ">"
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, first)
    tags = (struct.unpack_from(f"{order}H", data, first + 2 + 12 * i)[0] for i in range(count))
    return any(tag in _TIFF_TAGS for tag in tags)


def _gif(data: bytes) -> bool:
    return b"XMP DataXMP" in data or _COMMENT in _gif_extensions(data)


def _gif_extensions(data: bytes) -> Iterator[int]:
    """Yield what kinds of extensions a GIF has."""
    position = 13 + _colours(data[10])
    while data[position] in (_EXTENSION, _IMAGE):
        if data[position] == _EXTENSION:
            yield data[position + 1]
            position += 2
        else:
            position += 11 + _colours(data[position + 9])
        while length := data[position]:
            position += 1 + length
        position += 1


def _colours(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


_BRANDS: Final = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"})
_FORMS: Final[dict[bytes, Callable[[bytes], bool]]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"GIF8": _gif,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
}
