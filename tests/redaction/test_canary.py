from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import re
import unicodedata
import urllib.parse
import zipfile
import zlib

import numpy as np
import pytest

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.leak_search.search import UNSEARCHED, CanarySearch, WriteWatch

NAME, ROW = "Zoë Whitcombe-Ünal", np.arange(5.0).tobytes()
SEARCH = CanarySearch({"name": NAME, "row": ROW, "password": "hunter2+/?"})

FORMS = {
    "plain": NAME.encode(),
    "upper": NAME.upper().encode(),
    "utf-16": NAME.encode("utf-16"),
    "utf-16-be": NAME.encode("utf-16-be"),
    "hex": NAME.encode().hex().encode(),
    "HEX": NAME.encode().hex().upper().encode(),
    "base64": base64.b64encode(NAME.encode()),
    "base64 shifted": base64.b64encode(b"x" + NAME.encode() + b"yz"),
    "base64 shifted twice": base64.b64encode(b"xy" + NAME.encode()),
    "base64 for urls": base64.urlsafe_b64encode(b"hunter2+/?hunter2+/?"),
    "percent": urllib.parse.quote(NAME).encode(),
    "percent, plus": urllib.parse.quote_plus("hunter2+/?").encode(),
    "json": json.dumps(NAME).encode(),
    "percent, whole": "".join(f"%{byte:02X}" for byte in NAME.encode()).encode(),
    "json, escaped twice": json.dumps(json.dumps("hunter2+/?")).encode(),
    "json, slashes": rb'"hunter2+\/?"',
    "json, capital escapes": NAME.replace("ë", r"\u00EB").replace("Ü", r"\u00DC").encode(),
    "json of javascript": json.dumps(NAME, ensure_ascii=False).encode(),
    "python": ascii(NAME).encode(),
    "python bytes": repr(NAME.encode()).encode(),
    "html": NAME.encode("ascii", "xmlcharrefreplace"),
    "utf-32": NAME.encode("utf-32"),
    "utf-16, upper": NAME.upper().encode("utf-16"),
    "latin-1": NAME.encode("latin-1"),
    "decomposed": unicodedata.normalize("NFD", NAME).encode(),
    "base64 in lines": base64.encodebytes(b"x" * 50 + NAME.encode() * 3),
    "base64 of utf-16": base64.b64encode(b"x" + NAME.encode("utf-16-le")),
    "hex in lines": NAME.encode().hex("\n", 8).encode(),
    "raw": ROW,
    "raw in base64": base64.b64encode(ROW),
    "raw in hex": ROW.hex().encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_canary_is_found_in_every_form(tmp_path, form):
    path = tmp_path / "a" / "b.bin"
    path.parent.mkdir()
    path.write_bytes(b"\0\1before " + FORMS[form] + b" after")
    hits = SEARCH.search([tmp_path])
    assert {hit.label for hit in hits} & {"name", "row", "password"}
    assert all(hit.path == str(path) for hit in hits)
    assert NAME not in str(hits)


def zipped(*members, method=zipfile.ZIP_DEFLATED, streamed=False):
    file = io.BytesIO()
    # What cannot be sought gets its sizes written after each member.
    with zipfile.ZipFile(Unseekable(file) if streamed else file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


class Unseekable(io.RawIOBase):
    def __init__(self, file):
        self._file = file

    def writable(self):
        return True

    def write(self, data):
        return self._file.write(data)


SECRET = b"nothing of the kind, " * 20 + b"to " + NAME.encode()
CLEAN = b"nothing of the kind, " * 20
HALVES = SECRET[:-9], SECRET[-9:]
TWICE = zipped(("same", SECRET), ("also", CLEAN)).replace(b"also", b"same")

PACKED = {
    "gzip": gzip.compress(SECRET),
    "gzip, second member": gzip.compress(CLEAN) + gzip.compress(SECRET),
    "gzip, cut between members": gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]),
    "gzip, padded": gzip.compress(CLEAN) + bytes(700) + gzip.compress(SECRET),
    "gzip, bytes before and after": b"cache" + gzip.compress(SECRET) + b"trailing",
    "gzip in gzip": gzip.compress(gzip.compress(gzip.compress(SECRET))),
    "bzip2": bz2.compress(CLEAN) + bz2.compress(SECRET),
    "xz": lzma.compress(CLEAN) + lzma.compress(SECRET),
    "lzma": lzma.compress(SECRET, format=lzma.FORMAT_ALONE),
    "zlib in a database": b"SQLite format 3\0" + bytes(900) + zlib.compress(SECRET) + bytes(90),
    "zip": zipped(("a", CLEAN), ("b", SECRET)),
    "zip, stored": zipped(("a", SECRET), method=zipfile.ZIP_STORED),
    "zip, bzip2": zipped(("a", SECRET), method=zipfile.ZIP_BZIP2),
    "zip, lzma": zipped(("a", SECRET), method=zipfile.ZIP_LZMA),
    "zip, sizes after the members": zipped(("a", CLEAN), ("b", SECRET), streamed=True),
    "zip, a name twice": TWICE,
    "zip after a program": b"#!/bin/sh\n" + zipped(("a", SECRET)),
    "zip in gzip": gzip.compress(zipped(("a", SECRET))),
    "gzip in zip in zip": zipped(("a", zipped(("b", gzip.compress(SECRET))))),
}


@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_is_searched(tmp_path, kind):
    assert NAME.encode() not in PACKED[kind] or "stored" in kind
    (tmp_path / "x").write_bytes(PACKED[kind])
    assert {hit.label for hit in SEARCH.search([tmp_path])} == {"name"}


@pytest.mark.parametrize("kind", PACKED)
def test_a_sound_archive_with_nothing_in_it_is_clean(tmp_path, kind):
    (tmp_path / "x").write_bytes(PACKED[kind])
    search = CanarySearch({"other": "Grace Farquharson"})
    assert search.search([tmp_path]) == []
    assert search.bytes_searched > len(PACKED[kind])


LONG = np.random.default_rng(0).bytes(50_000) + SECRET  # what is cut off is more than a checksum
CUT_ZIP = zipped(("a", LONG))
DAMAGED = {
    "gzip, cut": gzip.compress(LONG)[:-200],
    "gzip, without its checksum": gzip.compress(LONG)[:-8],
    "gzip, damaged": gzip.compress(LONG)[:300] + b"\xff" * 40 + gzip.compress(LONG)[340:],
    "gzip, wrong checksum": gzip.compress(LONG)[:-8] + bytes(8),
    "gzip, damaged header": b"\x1f\x8b\xff" + gzip.compress(LONG)[3:],
    "gzip, second member damaged": gzip.compress(CLEAN) + b"\x1f\x8b\xff" + bytes(99),
    "gzip inside, cut": b"cache" + gzip.compress(LONG)[:-200],
    "bzip2, cut": bz2.compress(LONG)[:-200],
    "xz, cut": lzma.compress(LONG)[:-200],
    "lzma, cut": lzma.compress(LONG, format=lzma.FORMAT_ALONE)[:-200],
    "zip, without its directory": zipped(("a", LONG), ("b", LONG))[:-300],
    "zip, cut in a member": CUT_ZIP[: len(CUT_ZIP) // 2],
    "zip, cut in a stored member": zipped(("a", LONG), method=zipfile.ZIP_STORED)[:20_000],
    "zip, cut in a header": b"x" + zipped(("a", LONG))[:20],
    "zip, damaged member": CUT_ZIP[:2000] + b"\xff" * 40 + CUT_ZIP[2040:],
    "zip, encrypted": re.sub(
        rb"(PK\x01\x02....|PK\x03\x04..)\x00", b"\\1\x01", zipped(("a", LONG)), flags=re.DOTALL
    ),
    "zip, unknown method": re.sub(
        rb"(PK\x01\x02.{6}|PK\x03\x04.{4})\x08", b"\\1\x09", zipped(("a", LONG)), flags=re.DOTALL
    ),
    "zip inside, cut": b"x" * 99 + CUT_ZIP[: len(CUT_ZIP) // 2],
    "zip inside, encrypted": b"x" + re.sub(
        rb"(PK\x03\x04..)\x00", b"\\1\x01", CUT_ZIP, flags=re.DOTALL
    )[:-100],
    "zip in gzip, cut": gzip.compress(CUT_ZIP[: len(CUT_ZIP) // 2]),
    "zstd": b"\x28\xb5\x2f\xfd" + LONG,
    "7z": b"7z\xbc\xaf\x27\x1c" + LONG,
    "parquet": b"PAR1" + LONG + b"PAR1",
    "zstd in zip": zipped(("a", b"\x28\xb5\x2f\xfd" + LONG)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_opened_to_its_end_was_not_found_clean(tmp_path, kind):
    (tmp_path / "x").write_bytes(DAMAGED[kind])
    search = CanarySearch({"other": "Grace Farquharson"})
    assert {hit.label for hit in search.search([tmp_path])} == {UNSEARCHED}


def test_what_is_packed_too_deep_or_too_large_was_not_found_clean(tmp_path, monkeypatch):
    deep = SECRET
    for _ in range(12):
        deep = gzip.compress(deep)
    (tmp_path / "deep").write_bytes(deep)
    assert {hit.label for hit in SEARCH.search([tmp_path / "deep"])} == {UNSEARCHED}
    # Less than a real bomb would need, so that the test is quick.
    monkeypatch.setattr("lightning_secure.redaction.leak_search.unpack._MAX_BYTES", 1 << 20)
    large = gzip.compress(bytes(2 << 20))
    for number, data in enumerate((large, zipped(("a", bytes(2 << 20))), large + large)):
        (tmp_path / f"large{number}").write_bytes(data)
        assert {hit.label for hit in SEARCH.search([tmp_path / f"large{number}"])} == {UNSEARCHED}


def test_a_leak_is_found_in_what_is_left_of_a_damaged_archive(tmp_path):
    (tmp_path / "x").write_bytes(zipped(("a", SECRET), ("b", LONG))[:-30_000])
    assert {hit.label for hit in SEARCH.search([tmp_path])} == {"name", UNSEARCHED}


def test_names_links_and_pipes(tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / "x").touch()
    elsewhere.mkdir()
    (elsewhere / "y").write_bytes(SECRET)
    (folder / "link").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    hits = {(hit.label, os.path.relpath(hit.path, folder)) for hit in SEARCH.search([folder])}
    assert ("name", f"{NAME}/x") in hits
    assert ("name", "link/y") in hits
    assert (UNSEARCHED, "pipe") in hits


def test_nothing_is_found_where_nothing_is(tmp_path):
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(1_000_000))
    (tmp_path / "near").write_text("Zoe Whitcombe-Unal, hunter3")
    search = CanarySearch({"name": NAME, "password": "hunter2+/?"})
    assert search.search([tmp_path, tmp_path / "near"]) == []
    assert search.bytes_searched > 1_000_000


def test_what_cannot_be_read_was_not_found_clean(tmp_path):
    with pytest.raises(OSError, match="missing"):
        SEARCH.search([tmp_path / "missing"])


def test_two_canaries_of_one_value_are_both_named():
    search = CanarySearch({"a": "the same", "b": "the same"})
    assert {hit.label for hit in search.search_bytes(b"the same", name="x")} == {"a", "b"}


@pytest.mark.parametrize(
    "canaries", [{}, {"short": "abc"}, {"bytes": b"abc"}, {"half": "hunter2 \ud800"}]
)
def test_a_search_that_proves_nothing_is_refused(canaries):
    with pytest.raises(ConfigError):
        CanarySearch(canaries)


def test_half_a_character_is_not_shown():
    with pytest.raises(ConfigError, match="'half'") as caught:
        CanarySearch({"half": "hunter2 \ud800"})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_written_files_are_noticed_wherever_they_are(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    watch = WriteWatch()
    (inside / "a").write_text("x")
    outside.write_text("x")
    fd = os.open(os.fsencode(tmp_path / "low"), os.O_WRONLY | os.O_CREAT)
    os.close(fd)
    (tmp_path / "gone").write_text("x")
    (tmp_path / "gone").unlink()
    assert outside.read_text() == "x"
    (tmp_path / "in" / "a").read_bytes()
    assert watch.outside(inside) == [tmp_path / "low", outside]
