"""Opening what a file packs, and saying so where that cannot be done.

For :mod:`lightning_secure.redaction.leak_search.search`: what was packed and not opened was not
searched.
"""

from __future__ import annotations

import bz2
import contextlib
import io
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple
from zipfile import ZipFile, is_zipfile

#: How deep archives may lie in archives.
_MAX_DEPTH: Final = 8
#: The most that one file may unpack to, in bytes.
_MAX_BYTES: Final = 1 << 28
_PIECE: Final = 1 << 16

# Looked for at any place of a file: a database or a pickle may hold packed values. The longer the
# mark, the rarer it turns up by chance where nothing is packed.
_MARKS: Final = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff])"
    rb"|(?P<bzip2>BZh[1-9](?:1AY&SY|\x17\x72\x45\x38\x50\x90))"
    rb"|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<member>PK\x03\x04[\x00-\x3f]\x00.[\x00-\x0f][\x00-\x63]\x00)"
    rb"|(?P<zlib>\x78[\x01\x5e\x9c\xda])",
    re.DOTALL,
)
# At the start of a file, and where a stream ends, less is asked for: a damaged header must not hide
# what follows it.
_STARTS: Final = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]"),
    "xz": re.compile(rb"\xfd7zXZ"),
    "lzma": re.compile(rb"\x5d\x00\x00.{2}(?:\xff{8}|.{5}\x00{3})", re.DOTALL),
}
_ARCHIVE: Final = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
# Formats that the standard library does not open, or in which pages may be packed.
_CLOSED: Final = (
    b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18", b"\xff\x06\x00\x00sNaPpY",
    b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x1f\x9d", b"\x1f\xa0", b"LZIP\1",
    b"MSCF\0\0\0\0", b"PAR1", b"PARE", b"FEA1", b"ARROW1",
)  # fmt: skip
_LOCAL_HEADER: Final = struct.Struct("<4sHHHHHIIIHH")
_STORED, _DEFLATED = 0, 8

_OPENERS: Final[dict[str, Callable[[], Any]]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zlib": lambda: zlib.decompressobj(wbits=15),
    "member": lambda: zlib.decompressobj(wbits=-15),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE),
}


class UnpackedPart(NamedTuple):
    """A part of a file's bytes to search.

    Attributes:
        name: Of the file, and of what was opened in it, divided by ``!``.
        data: The bytes.
        whole: Whether everything packed in them follows as further parts.
    """

    name: str
    data: bytes
    whole: bool


class _Opened(NamedTuple):
    """The content of a stream or archive member, and where it stops; None: not to its end."""

    name: str
    content: bytes
    stop: int | None


def unpacked(name: str, data: bytes) -> Iterator[UnpackedPart]:
    """Yield a file's bytes as they are, and then those of everything packed in it.

    gzip, bzip2, xz, LZMA and zlib streams and members of zip archives are opened wherever they
    begin in the file, in each other too, with several members and with bytes before and after them.

    Guarantees:
        A part is not ``whole`` if something in it begins like one of these, or like another packed
        format (zstd, LZ4, 7z, RAR, Parquet, Arrow, ...), and was not opened to its end: because it
        is damaged, cut off, encrypted, more than 8 deep, or more than 256 MiB in all. Only zlib
        and raw LZMA, whose marks are short, are passed over inside of a file if they do not open.
    """
    yield from _unpacked(name, data, 0, _Allowance())


class _Allowance:
    """The number of bytes that may still be unpacked."""

    def __init__(self) -> None:
        self.left = _MAX_BYTES


def _unpacked(name: str, data: bytes, depth: int, allowance: _Allowance) -> Iterator[UnpackedPart]:
    found, whole = _opened(data, allowance)
    if found and depth == _MAX_DEPTH:
        found, whole = [], False
    yield UnpackedPart(name, data, whole and not data.startswith(_CLOSED))
    for label, content in found:
        yield from _unpacked(f"{name}!{label}", content, depth + 1, allowance)


def _opened(data: bytes, allowance: _Allowance) -> tuple[list[tuple[str, bytes]], bool]:
    """Return what is packed in ``data``, and whether all of it was opened."""
    found: list[tuple[str, bytes]] = []
    known: set[int] = set()
    whole = True
    if data.startswith(_ARCHIVE) or is_zipfile(io.BytesIO(data)):
        members = _members(data, allowance)
        whole = bool(members) or not data.startswith(_ARCHIVE)
        for offset, member in members.items():
            known.add(offset)
            found.append((member.name, member.content))
            whole = whole and member.stop is not None
    position = 0
    kind = next((kind for kind, start in _STARTS.items() if start.match(data)), None)
    while True:
        if kind is None:
            mark = _MARKS.search(data, position)
            if mark is None:
                return found, whole
            kind, position = str(mark.lastgroup), mark.start()
        if kind == "member":
            stream = None if position in known else _member(data, position, allowance)
        else:
            stream = _stream(kind, data, position, allowance)
        if stream is not None:
            if stream.content:
                found.append((stream.name, stream.content))
            whole = whole and (stream.stop is not None or kind == "zlib")
        position = (stream and stream.stop) or position + 1
        kind = None


def _stream(kind: str, data: bytes, start: int, allowance: _Allowance) -> _Opened:
    """Open a stream and those of its kind that follow at once; they are one text, cut in pieces."""
    contents, stop = [], start
    while True:
        content, end = _inflated(kind, data, stop, allowance)
        contents.append(content)
        if end is None:
            return _Opened(kind, b"".join(contents), None)
        stop = end
        while data[end : end + 1] == b"\0":  # padding
            end += 1
        if kind not in _STARTS or not _STARTS[kind].match(data, end):
            return _Opened(kind, b"".join(contents), stop)
        stop = end


def _inflated(
    kind: str, data: bytes, start: int, allowance: _Allowance
) -> tuple[bytes, int | None]:
    """Return what one stream holds, and where it ends, or None if it could not be followed."""
    stream, out, position = _OPENERS[kind](), bytearray(), start
    try:
        while not stream.eof:
            pending = getattr(stream, "unconsumed_tail", b"")
            if not pending and getattr(stream, "needs_input", True):
                pending = data[position : position + _PIECE]
                position += len(pending)
                if not pending:
                    return bytes(out), None  # cut off
            piece = stream.decompress(pending, _PIECE)
            out += piece
            allowance.left -= len(piece)
            if allowance.left < 0:
                return bytes(out), None
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
        return bytes(out), None
    return bytes(out), position - len(stream.unused_data)


def _members(data: bytes, allowance: _Allowance) -> dict[int, _Opened]:
    """Return the members that an archive's directory names, by their offset; none if it has none.

    All of them: a name may stand there several times.
    """
    found: dict[int, _Opened] = {}
    try:
        with ZipFile(io.BytesIO(data)) as archive:
            for info in archive.infolist():
                content, whole = bytearray(), False
                # Whatever a foreign archive makes go wrong: it was not read to its end.
                with contextlib.suppress(Exception), archive.open(info) as member:
                    while piece := member.read(_PIECE):
                        content += piece
                        allowance.left -= len(piece)
                        if allowance.left < 0:
                            break
                    whole = allowance.left >= 0
                found[info.header_offset] = _Opened(
                    info.filename, bytes(content), info.header_offset if whole else None
                )
    except Exception:  # noqa: BLE001 # as above
        return {}
    return found


def _member(data: bytes, start: int, allowance: _Allowance) -> _Opened | None:
    """Open a member that no directory names: the archive was cut off, or lies within the file."""
    if len(data) < start + _LOCAL_HEADER.size:
        return _Opened("member", b"", None)
    header = _LOCAL_HEADER.unpack_from(data, start)
    flags, method, name, extra = header[2], header[3], header[-2], header[-1]
    body = start + _LOCAL_HEADER.size + name + extra
    if flags & 1 or method not in (_STORED, _DEFLATED):
        return _Opened("member", b"", None)
    if method == _STORED:
        # The content lies there as it is. A missing end is seen if the header tells its place.
        return None if body + header[7] <= len(data) else _Opened("member", b"", None)
    content, stop = _inflated("member", data, body, allowance)
    return _Opened("member", content, stop)
