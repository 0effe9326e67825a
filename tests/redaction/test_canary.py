from __future__ import annotations

import base64
import gzip
import json
import os
import urllib.parse
import zipfile

import numpy as np
import pytest

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.canary import CanarySearch, WriteWatch

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


def test_archives_are_unpacked(tmp_path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(NAME.encode() * 3))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", NAME * 3)
    (tmp_path / "not.gz").write_bytes(b"\x1f\x8bnot gzip")
    (tmp_path / "not.zip").write_bytes(b"PK not zip")
    paths = {os.path.basename(hit.path) for hit in SEARCH.search([tmp_path])}
    assert paths == {"x.gz!gzip", "x.zip!member"}


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


@pytest.mark.parametrize("canaries", [{}, {"short": "abc"}, {"bytes": b"abc"}])
def test_a_search_that_proves_nothing_is_refused(canaries):
    with pytest.raises(ConfigError):
        CanarySearch(canaries)


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
