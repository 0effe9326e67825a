"""Searching every byte of a folder for what must not be in it.

The check that a run leaked nothing: plant values that occur nowhere else, let it run, and look for
them in whatever it wrote, in all the forms in which a tool may have written them.
"""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
import re
import sys
import unicodedata
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import ahocorasick

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.leak_search.unpack import unpacked

#: Label of a hit that is none: it stands for what could not be searched.
UNSEARCHED: Final = "UNSEARCHED"
_SHORTEST: Final = 4
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


class CanaryHit(NamedTuple):
    """A canary that was found, or something that could not be searched for any.

    Attributes:
        label: Which one; its value is not repeated. ``UNSEARCHED`` for what could not be searched.
        path: In which file, with the names of what it was packed in, divided by ``!``.
        form: In which form, for example ``utf-8`` or ``base64``.

    >>> hit = CanaryHit(label="patient 7", path="run/metrics", form="base64")
    >>> hit.label, hit.form
    ('patient 7', 'base64')
    """

    label: str
    path: str
    form: str


class CanarySearch:
    """Looks for planted values.

    Args:
        canaries: Texts or raw bytes to look for, by a label that may be shown.

    Raises:
        ConfigError: if there is no canary, one is so short that it would be found by chance, or one
            has no UTF-8 form.

    Text is looked for in any case, as UTF-8, UTF-16, UTF-32 and Latin-1, composed and decomposed,
    in hexadecimal, in base64 (at each of its three alignments, in both alphabets, broken into lines
    or not, of UTF-8 and UTF-16), percent-encoded, as JSON, Python and HTML escape it; bytes as they
    are, in hexadecimal and in base64. Names of files and folders are searched as well, and gzip,
    bzip2, xz, LZMA and zlib streams and zip archives are unpacked, wherever in a file and however
    deep they are.

    A stream that could not be unpacked to its end was not searched, and is a hit whose label is
    ``UNSEARCHED``: damaged, cut off and encrypted archives, formats that are not opened here (zstd,
    LZ4, 7z, RAR, Parquet, Arrow, ...), and what is no file at all (a pipe, a socket).

    Not found are values that are encrypted, that were cut in pieces (over two files, two pages of a
    database, two columns), that were encoded twice or in a way not named above (base32, base85,
    quoted-printable, UTF-7, EBCDIC), numbers that were printed or rounded differently, and pixels
    that show text.

    Attributes:
        bytes_searched: In files and in what they packed, so far.

    >>> search = CanarySearch({"patient 7": "Mary Whitcombe"})
    >>> search.search_bytes(b"to: TWFyeSBXaGl0Y29tYmU=", name="mail")
    [CanaryHit(label='patient 7', path='mail', form='base64')]
    """

    def __init__(self, canaries: Mapping[str, str | bytes]) -> None:
        if not canaries:
            raise ConfigError("`canaries` is empty: a search without canaries proves nothing.")
        if short := [label for label, value in canaries.items() if len(value) < _SHORTEST]:
            raise ConfigError(
                f"canaries {sorted(short)} are shorter than {_SHORTEST} characters and would be "
                "found by chance."
            )
        for label, value in canaries.items():
            if isinstance(value, str) and _SURROGATE.search(value):
                raise ConfigError(f"canary {label!r} has a lone surrogate and no UTF-8 form.")
        self._automaton = ahocorasick.Automaton()
        for label, value in canaries.items():
            keys: dict[str, str] = {}
            for form, data in _forms(value):
                keys.setdefault(data.lower().decode("latin-1"), form)  # many forms are alike
            for key, form in keys.items():
                known = self._automaton.get(key, [])
                self._automaton.add_word(key, [*known, (label, form)])
        self._automaton.make_automaton()
        self.bytes_searched = 0

    def search(self, paths: Iterable[str | os.PathLike[str]]) -> list[CanaryHit]:
        """Return what is found in files and, recursively, folders, links to folders included.

        An empty list means that everything was searched and nothing was found.

        Raises:
            OSError: if a file cannot be read: what was not searched was not found clean.

        >>> _ = (folder / "notes.txt").write_text("for Mary Whitcombe")
        >>> [hit.label for hit in CanarySearch({"patient 7": "Mary Whitcombe"}).search([folder])]
        ['patient 7']
        """
        hits: set[CanaryHit] = set()
        for root in map(Path, paths):
            for file in _files(root):
                name = str(file)
                inside = file.relative_to(root) if file != root else Path(file.name)
                hits.update(self.search_bytes(os.fsencode(inside), name=name))
                if not file.is_file() and file.exists():
                    hits.add(CanaryHit(UNSEARCHED, name, "no file"))
                    continue
                hits.update(self._search_file(name, file.read_bytes()))
        return sorted(hits)

    def _search_file(self, name: str, data: bytes) -> Iterator[CanaryHit]:
        for part in unpacked(name, data):
            self.bytes_searched += len(part.data)
            yield from self.search_bytes(part.data, name=part.name)
            if not part.whole:
                yield CanaryHit(UNSEARCHED, part.name, "packed")

    def search_bytes(self, data: bytes, *, name: str) -> list[CanaryHit]:
        """Return what is found in ``data``, as if it were a file of that name, not unpacked."""
        found = set(self._found(data))
        if len(unbroken := data.translate(None, b"\r\n")) < len(data):
            found.update(self._found(unbroken))  # base64 comes in lines
        return sorted({CanaryHit(label, name, form) for label, form in found})

    def _found(self, data: bytes) -> Iterator[tuple[str, str]]:
        text = data.lower().decode("latin-1")
        for _, pairs in self._automaton.iter(text):
            yield from pairs


class WriteWatch:
    """Notes every file that Python code of this process opens for writing, for good.

    A search of one folder proves nothing about the others. Files that native code opens by itself
    are not seen.

    >>> watch = WriteWatch()
    >>> _ = (folder / "notes.txt").write_text("left ear")
    >>> [path.name for path in watch.outside(folder / "run")]
    ['notes.txt']
    """

    def __init__(self) -> None:
        self._paths: set[Path] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(args[0], str | bytes | os.PathLike):
            return
        mode, flags = args[1], args[2]
        if any(letter in mode for letter in "wax+") if mode else flags & os.O_ACCMODE:
            self._paths.add(Path(os.fsdecode(args[0])).absolute())

    def outside(self, folder: Path) -> list[Path]:
        """Return the files that were written outside of ``folder`` and still exist."""
        inside = folder.resolve()
        found = {path.resolve() for path in self._paths if path.is_file()}
        return sorted(path for path in found if inside not in path.parents)


def _forms(value: str | bytes) -> Iterator[tuple[str, bytes]]:
    if isinstance(value, bytes):
        yield "raw", value
        yield "hex", value.hex().encode()
        yield from _base64(value)
        return
    # The search folds the case of ASCII letters; for the others it is spelt out.
    spellings = {
        unicodedata.normalize(composition, text)
        for text in (value, value.lower(), value.upper())
        for composition in ("NFC", "NFD")
    }
    for text in sorted({value, *spellings}):
        yield "utf-8", text.encode()
        yield "hex", text.encode().hex().encode()
        yield from _base64(text.encode())
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            yield encoding[:6], text.encode(encoding)
        yield from _base64(text.encode("utf-16-le"))
        with contextlib.suppress(UnicodeEncodeError):
            yield "latin-1", text.encode("latin-1")
        for quoted in (
            urllib.parse.quote(text),
            urllib.parse.quote(text, safe=""),
            urllib.parse.quote_plus(text),
            "".join(f"%{byte:02x}" for byte in text.encode()),
        ):
            yield "percent-encoded", quoted.encode()
        for ascii_only in (True, False):
            escaped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
            yield "json", escaped.encode()
            yield "json", escaped.replace("/", "\\/").encode()
        yield "python", ascii(text)[1:-1].encode()
        yield "python", repr(text.encode())[2:-1].encode()
        yield "html", html.escape(text).encode()
        yield "html", html.escape(text, quote=False).encode("ascii", "xmlcharrefreplace")


def _base64(data: bytes) -> Iterator[tuple[str, bytes]]:
    # Depending on what stands before it, base64 cuts the bytes in one of three ways; the outer
    # characters depend on the neighbours and are left off.
    for shift in range(3):
        body = base64.b64encode(bytes(shift) + data)
        inner = body[-(-8 * shift // 6) : (8 * (shift + len(data))) // 6]
        yield "base64", inner
        yield "base64", inner.translate(bytes.maketrans(b"+/", b"-_"))


def _files(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    seen: set[Path] = set()
    for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        here = Path(folder)
        # A link to a folder above it would never end.
        folders[:] = [name for name in folders if (here / name).resolve() not in seen]
        seen.update((here / name).resolve() for name in folders)
        yield from (here / name for name in names)


def _raise(error: OSError) -> None:
    raise error
