from __future__ import annotations

import io
import struct

import pytest

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.file_header import CHECKPOINT, FILE
from lightning_secure.errors import ConfigError, IntegrityError

HEADER = {"file": "0" * 32, "name": "a.png", "key": [{}]}


def test_a_head_is_what_the_format_says_and_is_read_back():
    head = FILE.write(HEADER)
    data = canonical_json(HEADER)
    assert head == b"LSECFILE" + struct.pack("<HI", 1, len(data)) + data
    raw = io.BytesIO(head + b"stream")
    assert FILE.read(raw) == (head, HEADER)
    assert raw.read() == b"stream"


def test_a_header_that_no_reader_would_take_is_not_written():
    with pytest.raises(ConfigError, match="the file's key was wrapped for more recipients"):
        FILE.write({**HEADER, "key": [{"blob": "x" * 1000}] * 66})
    longest = 65536 - len(canonical_json({**HEADER, "name": ""}))
    assert FILE.read(io.BytesIO(FILE.write({**HEADER, "name": "n" * longest})))
    with pytest.raises(ConfigError):
        FILE.write({**HEADER, "name": "n" * (longest + 1)})


def test_every_other_head_is_refused():
    head, data = FILE.write(HEADER), canonical_json(HEADER)
    others = [
        b"", head[:13], head[:-1], b"LSECCKPT" + head[8:], head[:8] + b"\2" + head[9:],
        head[:10] + struct.pack("<I", 65537) + data,
        head[:10] + struct.pack("<I", 2**32 - 1) + data,
        head[:10] + struct.pack("<I", len(data) + 1) + data + b" ",
        *(FILE.write({**HEADER, **wrong}) for wrong in (
            {"name": 1}, {"file": None}, {"key": {}}, {"key": "x"}, {"more": 1}
        )),
        FILE.write({"file": "0", "name": "a"}),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(IntegrityError):
            FILE.read(io.BytesIO(other))
    step = {"checkpoint": "0", "run_id": "r", "step": True, "key": {}}
    with pytest.raises(IntegrityError, match="altered"):
        CHECKPOINT.read(io.BytesIO(CHECKPOINT.write(step)))
    with pytest.raises(IntegrityError, match=r"encrypted checkpoint, and plaintext ones"):
        CHECKPOINT.read(io.BytesIO(head))
