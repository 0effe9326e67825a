"""Searching every byte of a folder for what must not be in it.

The check that a run leaked nothing: plant values that occur nowhere else, let it run, and look for
them in whatever it wrote, in all the forms in which a tool may have written them.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from zipfile import BadZipFile, ZipFile

import ahocorasick

from lightning_secure.errors import ConfigError

__all__ = ["CanaryHit", "CanarySearch", "WriteWatch"]

_SHORTEST: Final = 4
_GZIP: Final = b"\x1f\x8b"


class CanaryHit(NamedTuple):
    """A canary that was found.

    Attributes:
        label: Which one; its value is not repeated.
        path: In which file, with the member's name if it is inside an archive.
        form: In which form, for example ``utf-8`` or ``base64``.
    """

    label: str
    path: str
    form: str


class CanarySearch:
    """Looks for planted values.

    Args:
        canaries: What to look for, by a label that may be shown: text, or raw bytes.

    Raises:
        ConfigError: There is none, or one is so short that it would be found by chance.

    Text is looked for in any case, as UTF-8, UTF-16, hexadecimal, base64, percent-encoded and as
    JSON escapes it; bytes as they are, in hexadecimal and in base64. gzip files and members of zip
    archives are searched unpacked as well.

    Attributes:
        bytes_searched: In files, so far.

    >>> search = CanarySearch({"patient 7": "Mary Whitcombe"})
    >>> search.search_bytes(b"to: TWFyeSBXaGl0Y29tYmU=", name="mail")
    [CanaryHit(label='patient 7', path='mail', form='base64')]
    """

    def __init__(self, canaries: Mapping[str, str | bytes]) -> None:
        if not canaries:
            raise ConfigError(
                "there is nothing to look for, so finding nothing would prove nothing."
            )
        if short := [label for label, value in canaries.items() if len(value) < _SHORTEST]:
            raise ConfigError(
                f"canaries {sorted(short)} are shorter than {_SHORTEST} characters and would be "
                "found by chance."
            )
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
        """Return what is found in files and, recursively, folders.

        Raises:
            OSError: A file cannot be read: what was not searched was not found clean.
        """
        hits: set[CanaryHit] = set()
        for path in paths:
            for file in _files(Path(path)):
                for name, data in _unpacked(str(file), file.read_bytes()):
                    self.bytes_searched += len(data)
                    hits.update(self.search_bytes(data, name=name))
        return sorted(hits)

    def search_bytes(self, data: bytes, *, name: str) -> list[CanaryHit]:
        """Return what is found in ``data``, as if it were a file of that name."""
        text = data.lower().decode("latin-1")
        found = (pair for _, pairs in self._automaton.iter(text) for pair in pairs)
        return sorted({CanaryHit(label, name, form) for label, form in found})


class WriteWatch:
    """Notes every file that Python code of this process opens for writing, for good.

    A search of one folder proves nothing about the others. Files that native code opens by itself
    are not seen.
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
    data = value.encode() if isinstance(value, str) else value
    yield ("utf-8" if isinstance(value, str) else "raw"), data
    yield "hex", data.hex().encode()
    # Depending on what stands before it, base64 cuts the bytes in one of three ways; the outer
    # characters depend on the neighbours and are left off.
    for shift in range(3):
        body = base64.b64encode(bytes(shift) + data)
        inner = body[-(-8 * shift // 6) : (8 * (shift + len(data))) // 6]
        yield "base64", inner
        yield "base64", inner.translate(bytes.maketrans(b"+/", b"-_"))
    if isinstance(value, str):
        # The search folds the case of ASCII letters; for the others it is spelt out.
        yield from (("utf-8", text.encode()) for text in (value.lower(), value.upper()))
        yield "utf-16", value.encode("utf-16-le")
        yield "utf-16", value.encode("utf-16-be")
        yield "percent-encoded", urllib.parse.quote(value, safe="").encode()
        yield "percent-encoded", urllib.parse.quote_plus(value).encode()
        yield "json", json.dumps(value)[1:-1].encode()


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        for folder, _, names in os.walk(path, onerror=_raise):
            yield from (Path(folder, name) for name in names)
    else:
        yield path


def _raise(error: OSError) -> None:
    raise error


def _unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, data
    if data.startswith(_GZIP):
        try:
            yield f"{name}!gzip", zlib.decompress(data, wbits=31)
        except zlib.error:
            return
    elif data.startswith(b"PK"):
        yield from _members(name)


def _members(name: str) -> Iterator[tuple[str, bytes]]:
    try:
        archive = ZipFile(name)
    except (BadZipFile, OSError):
        return
    with archive:
        for member in archive.namelist():
            yield f"{name}!{member}", archive.read(member)
