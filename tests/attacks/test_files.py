"""Files that are no files, that are huge, that change under the reader, or that confuse a parser.

Nothing here may hang, use much memory or raise anything but an IntegrityError.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_secure import (
    AuditLog,
    EncryptedCheckpointIO,
    EncryptedShardDataset,
    EncryptedShardWriter,
)
from lightning_secure.crypto import manifest as manifests
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.data.key_rotation.rotate import rotate_data
from lightning_secure.data.manifests.garbage import RemovalList
from lightning_secure.errors import (
    AuditChainError,
    CheckpointCorruptedError,
    ConfigError,
    DataError,
    IntegrityError,
)

ROWS = np.arange(400, dtype="int64").reshape(200, 2)


@contextlib.contextmanager
def bounded(seconds=10, megabytes=64):
    """Fail if the block hangs or takes much memory."""

    def hung(*_):
        raise AssertionError(f"still not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def sealed(tmp_path, keys):
    root = tmp_path / "dataset"
    with EncryptedShardWriter(
        root, split="train", keys=keys, segment_bytes=160, shard_bytes=800
    ) as writer:
        writer.write_batch({"x": ROWS})
    return root


def first(root) -> Path:
    return sorted((root / "train").glob("*.lsec"))[0]


def read(root, keys):
    data = EncryptedShardDataset(root, split="train", keys=keys)
    (x,) = data.__getitems__(range(len(data))).batch()
    return x.numpy()


# ---------------------------------------------------------------- not a regular file


def pipe(path):
    os.mkfifo(path)


def folder(path):
    path.mkdir()


def endless(path):
    path.symlink_to("/dev/zero")


def terminal(path):
    path.symlink_to("/dev/tty")


def socketed(path):
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def loop(path):
    path.symlink_to(path)


THINGS = [pipe, folder, endless, terminal, socketed, loop]


def test_a_naive_reader_waits_for_ever_on_a_pipe(tmp_path):
    pipe(tmp_path / "pipe")
    reader = threading.Thread(target=(tmp_path / "pipe").read_bytes, daemon=True)
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    (tmp_path / "pipe").write_bytes(b"")  # lets it go
    reader.join(10)
    assert not reader.is_alive()


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("victim", ["shard", "manifest"])
def test_something_that_is_no_file(sealed, keys, thing, victim):
    path = first(sealed) if victim == "shard" else sealed / "manifest.json"
    path.unlink()
    thing(path)
    with bounded(), pytest.raises(IntegrityError):
        read(sealed, keys)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_a_list_of_leftovers_that_is_no_file(sealed, keys, thing):
    before = (sealed / "manifest.json").read_bytes()
    thing(sealed / ".leftovers")
    with bounded(), pytest.raises(DataError, match="remove it"):
        rotate_data(sealed, "train", keys=keys)
    assert (sealed / "manifest.json").read_bytes() == before
    assert np.array_equal(read(sealed, keys), ROWS)


def astray(path):
    path.symlink_to("../astray")


@pytest.mark.parametrize("name", [".lock", ".rotate.lock"])
@pytest.mark.parametrize("thing", [*THINGS, astray], ids=lambda thing: thing.__name__)
def test_a_lock_that_is_no_file(sealed, keys, thing, name):
    (sealed / name).unlink(missing_ok=True)
    thing(sealed / name)
    with bounded(), pytest.raises(ConfigError, match="lock"):
        rotate_data(sealed, "train", keys=keys)
    assert not (sealed.parent / "astray").exists(), "nothing is made where a link points to"
    assert len(read(sealed, keys)) == len(ROWS)


@pytest.mark.parametrize("listens", [False, True])
def test_a_list_that_becomes_a_pipe_after_it_was_looked_at(sealed, keys, listens):
    pipe(sealed / ".leftovers")
    end = os.open(sealed / ".leftovers", os.O_RDONLY | os.O_NONBLOCK) if listens else None
    with bounded(), pytest.raises(DataError, match="remove it"):
        RemovalList(sealed).note(["train/shard-00000-00000000.lsec"])
    if end is not None:
        assert os.read(end, 100) == b""
        os.close(end)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_a_journal_of_a_sealing_that_is_no_file(sealed, keys, thing):
    (sealed / "val").mkdir()
    thing(sealed / "val" / ".sealing")
    with bounded(), pytest.raises(ConfigError, match="cannot be opened"):
        EncryptedShardWriter(sealed, split="val", keys=keys, source_id="v1")


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_a_checkpoint_that_is_no_file(tmp_path, keys, thing):
    path = tmp_path / "x.ckpt"
    thing(path)
    expected = FileNotFoundError if thing is loop else CheckpointCorruptedError
    with bounded(), pytest.raises(expected):
        EncryptedCheckpointIO(keys).load_checkpoint(path)


def test_a_link_to_the_same_bytes_is_read(sealed, keys, tmp_path):
    """Where the bytes come from does not matter: datasets are kept as links by some stores."""
    path = first(sealed)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(read(sealed, keys), ROWS)


# ---------------------------------------------------------------- changed under the reader


def test_a_shard_replaced_while_it_is_open(sealed, keys, tmp_path):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    data[0]
    path = first(sealed)
    os.replace(shutil.copy(sorted((sealed / "train").glob("*.lsec"))[1], tmp_path), path)
    assert data[30][0].tolist() == ROWS[30].tolist()  # of the file that was verified
    data.close()
    with pytest.raises(IntegrityError):
        data[30]


@pytest.mark.parametrize("length", [0, 4096, 4096 + 176, 4096 + 2 * 176 - 1])
def test_a_shard_cut_while_it_is_open(sealed, keys, length):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    data[0]
    os.truncate(first(sealed), length)
    with pytest.raises(IntegrityError):
        data[15]


def test_a_shard_that_grows_while_it_is_open(sealed, keys):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    data[0]
    with first(sealed).open("ab") as file:
        file.write(bytes(500))
    rows = [data[i][0].tolist() for i in range(40)]
    assert rows == ROWS[:40].tolist()


# ---------------------------------------------------------------- for a parser to choke on


def envelope(**changes):
    value = {
        "payloadType": manifests.PAYLOAD_TYPE,
        "payload": "AAAA",
        "signatures": [{"keyid": "a", "sig": "AAAA"}],
    }
    return json.dumps({**value, **changes}).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
DOCUMENTS = {
    "nothing": b"",
    "not text": b"\xff\xfe\0\1" * 100,
    "a number": b"1",
    "deep": DEEP,
    "deep, and an object": b'{"payload":' + DEEP + b"}",
    "deep, but not too deep to parse": b'{"a":' * 400 + b"1" + b"}" * 400,
    "a long number": b'{"payload":' + b"9" * 100_000 + b"}",
    "not a number": b'{"payload": NaN, "signatures": [Infinity]}',
    "half a character": envelope(payload="\ud800"),
    "a key that is half a character": envelope(signatures=[{"keyid": "\ud800", "sig": "AAAA"}]),
    "a list as a key": envelope(signatures=[{"keyid": [[[]]], "sig": "AAAA"}]),
    "many parts": b'{"payload":[' + b"[]," * 2_000_000 + b"[]]}",
    "many signatures": envelope(signatures=[{}] * 100_000),
    "another encoding": envelope().decode().encode("utf-16"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_manifest_to_choke_on(sealed, keys, name):
    (sealed / "manifest.json").write_bytes(DOCUMENTS[name])
    with bounded(), pytest.raises(IntegrityError):
        read(sealed, keys)


def test_a_field_that_occurs_twice(sealed, keys):
    """A parser that takes the last one reads another document than one that takes the first."""
    path = sealed / "manifest.json"
    data = path.read_bytes()
    for name in ("payload", "payloadType", "signatures"):
        value = json.loads(data)[name]
        path.write_bytes(b'{"%s":"",' % name.encode() + data[1:])
        assert json.loads(path.read_bytes())[name] == value  # nothing to see for a naive parser
        with pytest.raises(IntegrityError):
            read(sealed, keys)


def test_a_manifest_that_is_longer_than_any(sealed, keys):
    os.truncate(sealed / "manifest.json", manifests.MAX_MANIFEST_BYTES + 1)  # takes no room
    with bounded(), pytest.raises(IntegrityError, match="longer than"):
        read(sealed, keys)


def test_a_manifest_that_nobody_would_read_is_not_written(sealed, keys, monkeypatch):
    before = (sealed / "manifest.json").read_bytes()
    # The real bound would take half a gigabyte.
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", len(before) + 100)
    with (
        pytest.raises(DataError, match="Choose larger shards"),
        EncryptedShardWriter(sealed, split="val", keys=keys) as writer,
    ):
        writer.write_batch({"x": ROWS})
    assert (sealed / "manifest.json").read_bytes() == before
    assert np.array_equal(read(sealed, keys), ROWS)


# ---------------------------------------------------------------- checkpoints and audit logs


@pytest.fixture
def checkpoint(tmp_path, keys):
    path = tmp_path / "x.ckpt"
    EncryptedCheckpointIO(keys).save_checkpoint({"w": torch.arange(9), "global_step": 3}, path)
    return path


@pytest.mark.parametrize("name", ["checkpoint", "run_id", "step"])
@pytest.mark.parametrize("value", ["NaN", '"\\ud800"', "null", "[1]", "{}", '"x"', "true"])
def test_a_checkpoints_header_to_choke_on(checkpoint, keys, name, value):
    """The header is read before anything can be authenticated: it says under which key."""
    data = checkpoint.read_bytes()
    length = int.from_bytes(data[10:14], "little")
    header = json.loads(data[14 : 14 + length])
    marked = canonical_json({**header, name: "HERE"}).replace(b'"HERE"', value.encode())
    start = data[:10] + len(marked).to_bytes(4, "little") + marked
    checkpoint.write_bytes(start + data[14 + length :])
    with bounded(), pytest.raises(CheckpointCorruptedError):
        EncryptedCheckpointIO(keys).load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [b"NaN", b'"\\ud800"', DEEP])
def test_an_audit_record_to_choke_on(tmp_path, value):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("first", {"n": 1})
    log.path.write_bytes(log.path.read_bytes().replace(b'{"n":1}', b'{"n":' + value + b"}"))
    with bounded(), pytest.raises(AuditChainError):
        log.verify()
