"""A sealing that was interrupted goes on, and believes nothing that it did not sign itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_secure.anonymize import AnonymizationPlan, Generalize, Keep
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.data.key_rotation.rotate import rotate_partition
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.shards import shard
from lightning_secure.data.writing import split_layout
from lightning_secure.data.writing.progress_log import JOURNAL_NAME, ProgressLog
from lightning_secure.data.writing.seal import seal
from lightning_secure.data.writing.split_rules import SplitByRatio
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    ManifestMismatchError,
    ShardCorruptedError,
)

ROWS = 1000
X = np.random.default_rng(3).normal(size=(ROWS, 4)).astype("float32")
Y = np.arange(ROWS)
SMALL = {"segment_bytes": 512, "shard_bytes": 2048}  # about 11 shards


class UnpluggedError(Exception):
    """Stands for whatever interrupts: Ctrl-C, a full disk, a lost connection."""


def unplug(done, total):
    raise UnpluggedError


def source(*, until: int = ROWS, seen: list[int] | None = None):
    for i in range(ROWS):
        if i == until:
            raise UnpluggedError
        if seen is not None:
            seen.append(i)
        yield {"x": X[i], "y": int(Y[i])}


def run(root, keys, rows=None, **options):
    options = {"source_id": "v1", "threads": 2, **SMALL, **options}
    return seal(source() if rows is None else rows, root, keys=keys, **options)


def interrupted(root, keys, *, until=800, **options):
    with pytest.raises(UnpluggedError):
        # One shard a call, so that shards are done by the time of the interruption.
        run(root, keys, source(until=until), **{"threads": 1, **options})
    assert (root / "train" / JOURNAL_NAME).exists()
    return root


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr("lightning_secure.data.sources.source._MOST_ROWS", 64)


def labels(root, keys, split="train"):
    data = EncryptedShardDataset(root, split=split, keys=keys)
    x, y = data.__getitems__(range(len(data))).batch()
    assert np.array_equal(x.numpy(), X[y.numpy()])
    return y.tolist()


def shards(root) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (root / "train").glob("*.lsec")}


def only_named_files(root, keys):
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    named = {entry.file for split in manifest.splits.values() for entry in split.shards}
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    return there == named | {"manifest.json", ".lock"}


def test_it_goes_on_from_the_last_shard_and_does_none_again(tmp_path, keys, heard):
    interrupted(tmp_path, keys)
    before = shards(tmp_path)
    assert len(before) > 6
    with pytest.raises(ConfigError, match="no split 'train'"):
        labels(tmp_path, keys)
    done = run(tmp_path, keys, resume=True)
    assert done.rows == {"train": ROWS}
    assert 600 < done.resumed["train"] <= 800
    assert labels(tmp_path, keys) == Y.tolist()
    assert before.items() <= shards(tmp_path).items()
    assert only_named_files(tmp_path, keys)
    (event,) = [event for event in heard if event.action == "data.resume"]
    assert event.details["records"] == done.resumed["train"]


@contextlib.contextmanager
def full(size):
    """A disk on which a file can have so many bytes; CPython ignores SIGXFSZ, so writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [8000, 9000, 10000])
def test_a_journal_that_could_not_be_written_loses_nothing_of_before(tmp_path, keys, size):
    # Where there is room again: the shards of other threads are written down after half a line.
    options = {"split": "train", "keys": keys, "source_id": "v1", **SMALL}
    writer = EncryptedShardWriter(tmp_path, threads=4, **options)
    with full(size), pytest.raises(OSError, match="too large"):  # noqa: PT012
        # More than fits in any order: one slow shard keeps all after it from being written down.
        for i in [*range(0, ROWS, 50)] * 5:
            writer.write_batch({"x": X[i : i + 50], "y": Y[i : i + 50]})
    known = len(writer._queue.entries)
    writer.suspend()
    with EncryptedShardWriter(tmp_path, resume=True, **options) as writer:
        assert len(writer._queue.entries) >= known
        done = writer.records
        writer.write_batch({"x": X[done:], "y": Y[done:]})
    assert labels(tmp_path, keys) == Y.tolist()
    assert only_named_files(tmp_path, keys)


def test_no_line_of_a_journal_follows_one_that_was_not_written_whole(tmp_path, keys):
    options = {"split": "train", "keys": keys, "source_id": "v1", **SMALL}
    writer = EncryptedShardWriter(tmp_path, threads=1, **options)
    journal = writer._state._journal
    writer.write_batch({"x": X[:200], "y": Y[:200]})
    size = os.fstat(journal._log.fd).st_size
    with full(size + 99), pytest.raises(OSError, match="too large"):
        journal.start(8, bytes(16))
    with pytest.raises(OSError, match="an earlier line"):  # there is room again
        journal.start(9, bytes(16))
    assert os.fstat(journal._log.fd).st_size == size
    writer.suspend()


def test_a_process_that_a_source_forked_does_not_keep_the_sealing_from_going_on(tmp_path, keys):
    options = {"split": "train", "keys": keys, "source_id": "v1", **SMALL}
    writer = EncryptedShardWriter(tmp_path, **options)
    writer.write_batch({"x": X, "y": Y})
    read, write = os.pipe()
    if (child := os.fork()) == 0:  # as a loader's worker, which outlives the sealing
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        writer.suspend()
        with EncryptedShardWriter(tmp_path, resume=True, **options) as again:
            assert again.records > 0
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_killed_at_random_points_again_and_again_it_ends_with_every_row_once(tmp_path, keys):
    # One process that forks, because a start takes longer than many kills.
    code = (
        "import os, random, signal, sys, time, numpy as np\n"
        "from lightning_secure import LocalKeyProvider\n"
        "from lightning_secure.data.writing.seal import seal\n"
        "from lightning_secure.data.sources import memory\n"
        "memory.BATCH_BYTES = 1024\n"
        "x = np.random.default_rng(3).normal(size=(20000, 4)).astype('float32')\n"
        "random.seed(11)\n"
        "kills = going_on = 0\n"
        "while True:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        done = seal({'x': x, 'y': np.arange(20000)}, sys.argv[1], threads=3,\n"
        "                    resume=True, keys=LocalKeyProvider(sys.argv[2]),\n"
        "                    segment_bytes=512, shard_bytes=2048)\n"
        "        os._exit(3 if done.resumed['train'] else 4)\n"
        "    if kills < 12:\n"
        "        time.sleep(random.uniform(0, 0.15))\n"
        "        os.kill(child, signal.SIGKILL)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    if os.WIFEXITED(status):\n"
        "        sys.exit(print(kills, os.WEXITSTATUS(status)))\n"
        "    kills += 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(keys._path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    kills, status = map(int, done.stdout.split())
    assert kills >= 4
    assert status == 3, "it went on from where a killed one had got to"
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    x, y = data.__getitems__(range(len(data))).batch()
    assert y.tolist() == list(range(20000))
    expected = np.random.default_rng(3).normal(size=(20000, 4)).astype("float32")
    assert np.array_equal(x.numpy(), expected)
    assert only_named_files(tmp_path, keys)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interruption_while_shards_are_out_of_order_loses_none(
    tmp_path, keys, monkeypatch, threads
):
    def slow(*args, **options):
        if options["number"] % 3 == 0:
            time.sleep(0.01)
        if options["number"] == 7:
            raise UnpluggedError
        return shard.seal_shard(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(
            split_layout, "seal_shard", slow
        )  # a disk that fails at shard 7 cannot be had
        with pytest.raises(UnpluggedError):
            run(tmp_path, keys, threads=threads)
    run(tmp_path, keys, resume=True)
    assert labels(tmp_path, keys) == Y.tolist()
    assert only_named_files(tmp_path, keys)


def test_several_splits_go_on_each_from_its_own_place(tmp_path, keys):
    rule = SplitByRatio(ratios={"train": 0.6, "val": 0.4}, seed=1)
    run(tmp_path / "whole", keys, split=rule)
    with pytest.raises(UnpluggedError):
        run(tmp_path / "parts", keys, source(until=700), split=rule)
    done = run(tmp_path / "parts", keys, split=rule, resume=True)
    assert done.resumed["train"] > 200 < done.rows["val"]
    for split in ("train", "val"):
        assert labels(tmp_path / "parts", keys, split) == labels(tmp_path / "whole", keys, split)


def test_a_split_that_was_finished_is_not_sealed_again(tmp_path, keys):
    run(tmp_path, keys)
    before = shards(tmp_path)
    seen: list[int] = []
    done = run(tmp_path, keys, source(seen=seen), resume=True)
    assert done.rows == done.resumed == {"train": ROWS}
    assert (seen, shards(tmp_path)) == ([], before)
    with pytest.raises(ConfigError, match="exists"):
        run(tmp_path, keys, resume=True, source_id="v2")
    with pytest.raises(ConfigError, match="exists"):
        run(tmp_path, keys)
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_split_that_was_finished_survives_giving_up(tmp_path, keys):
    run(tmp_path, keys)
    before = shards(tmp_path)
    for end in ("abort", "suspend"):
        again = EncryptedShardWriter(
            tmp_path, split="train", keys=keys, resume=True, source_id='["v1","train"]', **SMALL
        )
        assert again.complete
        getattr(again, end)()
        assert shards(tmp_path) == before
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_split_whose_key_was_exchanged_is_left_as_it_is(tmp_path, keys):
    """Its mark can no longer be compared: it is not sealed again, and not taken for the same."""
    run(tmp_path, keys)
    rotate_partition(tmp_path, "train", keys=keys)
    before = shards(tmp_path)
    with pytest.raises(ConfigError, match="exists, with 1000"):
        run(tmp_path, keys, resume=True)
    assert shards(tmp_path) == before
    assert labels(tmp_path, keys) == Y.tolist()
    assert not (tmp_path / "train" / JOURNAL_NAME).exists()


def test_a_kill_between_manifest_and_end_is_seen_as_done(tmp_path, keys, monkeypatch):
    close = ProgressLog.close

    def stop(self, *, remove):
        close(self, remove=False)
        raise UnpluggedError

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLog, "close", stop)
        with pytest.raises(UnpluggedError):
            run(tmp_path, keys)
    assert (tmp_path / "train" / JOURNAL_NAME).exists()
    # Whoever seals anew in its place must not take the shards away before the new ones are there.
    with pytest.raises(UnpluggedError):
        run(tmp_path, keys, source(until=100), replace=True)
    assert labels(tmp_path, keys) == Y.tolist()
    assert run(tmp_path, keys, resume=True).resumed == {"train": ROWS}
    assert labels(tmp_path, keys) == Y.tolist()


def test_without_resume_it_begins_anew_and_takes_the_remains_away(tmp_path, keys):
    interrupted(tmp_path, keys)
    before = shards(tmp_path)
    assert run(tmp_path, keys).resumed == {"train": 0}
    assert labels(tmp_path, keys) == Y.tolist()
    assert not set(shards(tmp_path)) & set(before)
    assert only_named_files(tmp_path, keys)


def test_resuming_where_nothing_was_begun_is_beginning(tmp_path, keys):
    assert run(tmp_path, keys, resume=True).resumed == {"train": 0}
    assert labels(tmp_path, keys) == Y.tolist()


def test_rows_that_are_refused_leave_nothing_to_resume(tmp_path, keys):
    def bad():
        yield from ({"x": X[i], "y": i} for i in range(900))
        yield {"x": X[0] * np.nan, "y": 1}

    with pytest.raises(DataError, match="NaN"):
        run(tmp_path, keys, bad())
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"manifest.json", ".lock"}


# ---------------------------------------------------------------- another source, other arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source_id": "v2"}, "another source"),
        ({"segment_bytes": 256}, "another segment_bytes"),
        ({"allow_nonfinite": True}, "another allow_nonfinite"),
        ({"anonymize": AnonymizationPlan({"y": Generalize(width=10)})}, "another anonymize"),
        ({"anonymize": AnonymizationPlan({"y": Keep()})}, "another anonymize"),
    ],
)
def test_another_source_or_plan_is_refused(tmp_path, keys, options, words):
    interrupted(tmp_path, keys)
    before = shards(tmp_path)
    with pytest.raises(ConfigError, match=words):
        run(tmp_path, keys, resume=True, **options)
    assert shards(tmp_path) == before
    run(tmp_path, keys, resume=True)
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_file_that_was_changed_is_refused(tmp_path, keys):
    pytest.importorskip("pyarrow")
    table = tmp_path / "t.csv"
    table.write_text("x,y\n" + "".join(f"{i}.5,{i}\n" for i in range(500)))
    status = table.stat()
    with pytest.raises(UnpluggedError):
        seal(table, tmp_path / "d", keys=keys, progress=unplug)
    # The same length, and the time of change set back.
    table.write_text(table.read_text().replace("499.5", "999.5"))
    os.utime(table, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert table.stat().st_size == status.st_size
    with pytest.raises(ConfigError, match="another source"):
        seal(table, tmp_path / "d", keys=keys, resume=True)
    seal(table, tmp_path / "d", keys=keys)


@pytest.mark.parametrize("change", ["value", "order", "name", "dtype"])
def test_arrays_that_were_changed_are_refused(tmp_path, keys, change):
    with pytest.raises(UnpluggedError):
        seal({"x": X, "y": Y}, tmp_path, keys=keys, progress=unplug, **SMALL)
    x, y = X.copy(), Y.copy()
    if change == "value":
        x[-1, -1] += 1
    elif change == "order":
        x[[0, 1]] = x[[1, 0]]
    columns = {
        "z" if change == "name" else "x": x,
        "y": y.astype("int32") if change == "dtype" else y,
    }
    with pytest.raises(ConfigError, match="another source"):
        seal(columns, tmp_path, keys=keys, resume=True, **SMALL)
    seal({"x": X.copy(), "y": Y.copy()}, tmp_path, keys=keys, resume=True, **SMALL)
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_source_that_cannot_tell_what_it_is_needs_a_name(tmp_path, keys):
    with pytest.raises(ConfigError, match="source_id="):
        seal(source(), tmp_path, keys=keys, resume=True)
    with pytest.raises(ConfigError, match="source_id="):
        EncryptedShardWriter(tmp_path, split="train", keys=keys, resume=True)
    assert not list(tmp_path.iterdir())


def test_two_at_once_are_refused(tmp_path, keys):
    options = {"split": "train", "keys": keys, "source_id": "v1"}
    with EncryptedShardWriter(tmp_path, **options) as first:
        first.write({"x": 1})
        for resume in (True, False):
            with pytest.raises(ConfigError, match="being sealed by another"):
                EncryptedShardWriter(tmp_path, resume=resume, **options)


def test_the_writer_alone_can_be_resumed(tmp_path, keys):
    options = {"split": "train", "keys": keys, "source_id": "v1", **SMALL}
    first = EncryptedShardWriter(tmp_path, **options)
    first.write_batch({"x": X[:700], "y": Y[:700]})
    first.suspend()
    with EncryptedShardWriter(tmp_path, resume=True, **options) as second:
        assert 500 < second.records <= 700
        second.write_batch({"x": X[second.records :], "y": Y[second.records :]})
    assert labels(tmp_path, keys) == Y.tolist()
    third = EncryptedShardWriter(tmp_path, resume=True, **options)
    assert third.complete
    with pytest.raises(ConfigError, match="closed"):
        third.write({"x": X[0], "y": 1})


# ---------------------------------------------------------------- attacks on the journal


def lines(root: Path) -> list[bytes]:
    return (root / "train" / JOURNAL_NAME).read_bytes().splitlines(keepends=True)


def put(root: Path, content: list[bytes]) -> None:
    (root / "train" / JOURNAL_NAME).write_bytes(b"".join(content))


def flipped(line: bytes) -> bytes:
    envelope = json.loads(line)
    payload = bytearray(envelope["payload"].encode())
    payload[len(payload) // 2] ^= 1
    return json.dumps({**envelope, "payload": payload.decode()}).encode() + b"\n"


@pytest.mark.parametrize(
    "attack",
    [
        lambda old: [flipped(old[0]), *old[1:]],
        lambda old: [*old[:-1], flipped(old[-1])],
        lambda old: old[1:],
        lambda old: [*old[:4], *old[5:]],
        lambda old: [*old[:4], old[5], old[4], *old[6:]],
        lambda old: [*old, old[-1]],
        lambda old: [*old, old[0]],
        lambda old: [*old[:3], b"{}\n", *old[3:]],
        lambda old: [b"\0" * 100 + b"\n", *old],
        lambda old: [*old, b"\n"],
    ],
    ids=["first", "last", "headless", "gap", "swap", "twice", "begin", "alien", "zeros", "empty"],
)
def test_a_journal_that_was_tampered_with_is_refused(tmp_path, keys, attack):
    interrupted(tmp_path, keys)
    before = shards(tmp_path)
    put(tmp_path, attack(lines(tmp_path)))
    with pytest.raises(IntegrityError):
        run(tmp_path, keys, resume=True)
    assert shards(tmp_path) == before
    run(tmp_path, keys)  # anew, it is not needed
    assert labels(tmp_path, keys) == Y.tolist()


@pytest.mark.parametrize("cut", [1, 2, 12])
def test_lines_cut_off_cost_time_and_no_row(tmp_path, keys, cut):
    interrupted(tmp_path, keys)
    content = lines(tmp_path)
    put(tmp_path, [*content[:-cut], content[-cut][:-10]])
    run(tmp_path, keys, resume=True)
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_journal_of_another_signer_is_refused(tmp_path, keys, other_keys):
    """Also of one whose manifests are trusted: only the sealer's own word counts."""
    interrupted(tmp_path / "mine", keys)
    interrupted(tmp_path / "other", other_keys)
    put(tmp_path / "mine", lines(tmp_path / "other"))

    everybody = {**keys.trusted_signers, **other_keys.trusted_signers}

    class Trusting(type(keys)):
        trusted_signers = everybody

    trusting = object.__new__(Trusting)
    trusting.__dict__.update(keys.__dict__)
    with pytest.raises(ManifestMismatchError, match="no valid signature"):
        run(tmp_path / "mine", trusting, resume=True)


def test_a_journal_of_another_dataset_or_split_is_refused(tmp_path, keys):
    interrupted(tmp_path / "a", keys)
    interrupted(tmp_path / "b", keys)
    original = lines(tmp_path / "a")
    put(tmp_path / "a", lines(tmp_path / "b"))
    with pytest.raises(IntegrityError, match="another dataset"):
        run(tmp_path / "a", keys, resume=True)
    (tmp_path / "a" / "val").mkdir()
    (tmp_path / "a" / "val" / JOURNAL_NAME).write_bytes(b"".join(original))
    with pytest.raises(IntegrityError, match="another dataset or split"):
        run(tmp_path / "a", keys, split="val", resume=True)


def test_a_manifest_is_no_line_of_a_journal(tmp_path, keys):
    interrupted(tmp_path, keys)
    put(tmp_path, [(tmp_path / "manifest.json").read_bytes() + b"\n"])
    with pytest.raises(ManifestMismatchError, match="not a document of type"):
        run(tmp_path, keys, resume=True)


@pytest.mark.parametrize("harm", ["remove", "cut", "swap", "tag", "header"])
def test_a_finished_shard_that_was_tampered_with_is_refused(tmp_path, keys, harm):
    interrupted(tmp_path, keys)
    first, second, *_ = sorted((tmp_path / "train").glob("*.lsec"))
    data = bytearray(first.read_bytes())
    if harm == "remove":
        first.unlink()
    elif harm == "swap":
        first.write_bytes(second.read_bytes())
    else:
        place = {"cut": slice(-1, None), "tag": slice(-1, None), "header": slice(40, 41)}[harm]
        data[place] = b"" if harm == "cut" else bytes([data[place][0] ^ 1])
        first.write_bytes(data)
    with pytest.raises(ShardCorruptedError, match="cannot go on"):
        run(tmp_path, keys, resume=True)
    with pytest.raises(ConfigError, match="no split"):
        labels(tmp_path, keys)


def test_the_journal_removes_no_file_of_another_split(tmp_path, keys):
    """Not even one that a forged journal names, when the sealing starts anew."""
    run(tmp_path, keys, split="val")
    val = {p.name for p in (tmp_path / "val").iterdir()}
    interrupted(tmp_path, keys)
    forged = lines(tmp_path)
    put(tmp_path, [line.replace(b"train", b"val") for line in forged] + [b"junk\n"])
    run(tmp_path, keys)
    assert {p.name for p in (tmp_path / "val").iterdir()} == val
    assert labels(tmp_path, keys) == Y.tolist()


def test_a_journal_that_is_a_link_is_not_followed(tmp_path, keys):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / "d" / "train").mkdir(parents=True)
    (tmp_path / "d" / "train" / JOURNAL_NAME).symlink_to(target)
    with pytest.raises(ConfigError, match="cannot be opened"):
        run(tmp_path / "d", keys)
    assert target.read_text() == "precious"


def test_the_journal_says_nothing_of_the_rows(tmp_path, keys):
    import base64
    import hashlib

    interrupted(tmp_path, keys, source_id="ward 7, 2024")
    text = b"".join(base64.b64decode(json.loads(line)["payload"]) for line in lines(tmp_path))
    assert b"ward" not in text
    # Nor a plain digest, against which a guess of the source could be tested.
    for guess in ("ward 7, 2024", '["ward 7, 2024","train"]'):
        assert hashlib.sha256(guess.encode()).hexdigest().encode() not in text


def test_the_mark_of_a_source_needs_the_key(tmp_path, keys):
    run(tmp_path / "a", keys)
    run(tmp_path / "b", keys)
    marks = {
        EncryptedShardDataset(tmp_path / name, split="train", keys=keys).entry.attributes[
            "sealing.source"
        ]
        for name in ("a", "b")
    }
    assert len(marks) == 2
