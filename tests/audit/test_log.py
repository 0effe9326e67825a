from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import stat
import threading
import tracemalloc

import pytest

from lightning_secure.audit.log import AuditLog
from lightning_secure.errors import AuditChainError, AuditWriteError


@pytest.fixture
def log(tmp_path):
    return AuditLog(tmp_path / "audit" / "audit.jsonl")


def filled(log, count=6):
    return [log.append("key.unwrap", {"n": i}) for i in range(count)]


def lines(log):
    return log.path.read_bytes().splitlines(keepends=True)


def test_records_are_chained(log):
    heads = filled(log)
    summary = log.verify()
    assert (summary.records, summary.head) == (6, heads[-1])
    records = list(log.records())
    assert [record["seq"] for record in records] == list(range(6))
    assert records[0]["prev"] == "0" * 64
    assert [record["prev"] for record in records[1:]] == heads[:-1]
    assert records[3]["details"] == {"n": 3}


def test_the_log_is_its_owners_alone(log):
    filled(log, 1)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.path.parent.stat().st_mode) == 0o700


def test_another_object_goes_on_where_the_first_stopped(log):
    filled(log, 3)
    other = AuditLog(log.path)
    filled(other, 2)
    filled(log, 2)
    assert log.verify().records == 7


def test_a_log_longer_than_one_block_is_continued(log):
    log.append("long", {"text": "x" * 70_000})
    log.append("long", {"text": "y" * 200_000})
    AuditLog(log.path).append("after")
    assert log.verify().records == 3


def test_a_log_that_nothing_was_written_to_is_sound_if_that_is_expected(log):
    for _ in range(2):
        assert log.verify(allow_empty=True).records == 0
        assert log.verify(allow_empty=True, expected_head="0" * 64).head == "0" * 64
        assert list(log.records(allow_empty=True)) == []
        with pytest.raises(AuditChainError, match="expected head"):
            log.verify(allow_empty=True, expected_head="ab" * 32)
        log.path.parent.mkdir(exist_ok=True)
        log.path.touch()  # as after a disk that was full from the first record on
    log.append("key.unwrap")
    assert log.verify().records == 1


def test_threads_do_not_break_the_chain(log):
    threads = [threading.Thread(target=filled, args=(log, 20)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.verify().records == 80


def test_processes_do_not_break_the_chain(log):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=filled, args=(AuditLog(log.path), 15)) for _ in range(2)]
    for process in processes:
        process.start()
    filled(log, 15)
    for process in processes:
        process.join()
    assert log.verify().records == 45


def test_a_record_names_rank_host_and_job(log, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    log.append("run.start")
    (record,) = log.records()
    assert (record["rank"], record["job"]) == (3, "4711")
    assert record["host"] == socket.gethostname()


def test_a_log_of_an_older_version_is_read_and_gone_on_with(log):
    prev = "0" * 64
    log.path.parent.mkdir()
    for seq in range(2):
        old = {"version": 1, "seq": seq, "time": "2025-01-01T00:00:00.000+00:00", "action": "a",
               "outcome": "success", "pid": 1, "details": {}, "prev": prev}  # fmt: skip
        line = json.dumps(old, sort_keys=True, separators=(",", ":")).encode()
        prev = hashlib.sha256(line).hexdigest()
        with log.path.open("ab") as file:
            file.write(line + b"\n")
    log.append("b")
    assert log.verify(expected_head=prev).records == 3
    assert [record["version"] for record in log.records()] == [1, 1, 2]


@pytest.mark.parametrize(
    "edit",
    [
        lambda record: record.update(version=1),
        lambda record: record.update(version=3),
        lambda record: record.update(version=True),
        lambda record: record.pop("host"),
    ],
)
def test_a_record_has_the_fields_of_its_version(log, edit):
    filled(log)
    change(log, 0, edit)
    with pytest.raises(AuditChainError, match="record 0: it is not a record"):
        log.verify()


# ---------------------------------------------------------------- tampering


def change(log, number, edit):
    kept = lines(log)
    record = json.loads(kept[number])
    edit(record)
    kept[number] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    log.path.write_bytes(b"".join(kept))


@pytest.mark.parametrize("number", range(5))
def test_a_changed_record_is_found(log, number):
    filled(log)
    change(log, number, lambda record: record["details"].update(n=99))
    with pytest.raises(AuditChainError, match=f"record {number + 1}"):
        log.verify()


def test_a_changed_last_record_is_found_with_its_head(log):
    heads = filled(log)
    change(log, 5, lambda record: record["details"].update(n=99))
    assert log.verify().records == 6  # nothing comes after it
    with pytest.raises(AuditChainError, match="expected head"):
        log.verify(expected_head=heads[-1])


@pytest.mark.parametrize("number", range(5))
def test_a_removed_record_is_found(log, number):
    filled(log)
    kept = lines(log)
    del kept[number]
    log.path.write_bytes(b"".join(kept))
    with pytest.raises(AuditChainError, match=f"record {number}"):
        log.verify()


def test_an_inserted_or_moved_record_is_found(log):
    filled(log)
    kept = lines(log)
    for edited in ([*kept[:3], kept[2], *kept[3:]], [kept[1], kept[0], *kept[2:]]):
        log.path.write_bytes(b"".join(edited))
        with pytest.raises(AuditChainError):
            log.verify()


def test_records_cut_off_the_end_are_found_with_a_head_only(log):
    heads = filled(log)
    log.path.write_bytes(b"".join(lines(log)[:4]))
    assert log.verify().records == 4
    assert log.verify(expected_head=heads[3]).records == 4
    for head in (heads[4], heads[5], "ab" * 32):
        with pytest.raises(AuditChainError, match="cut off"):
            log.verify(expected_head=head)


@pytest.mark.parametrize("attack", ["removed", "emptied"])
def test_a_log_that_was_removed_or_emptied_is_found(log, attack):
    heads = filled(log)
    if attack == "removed":
        log.path.unlink()
    else:
        log.path.write_bytes(b"")
    for options in ({}, {"expected_head": heads[0]}, {"expected_head": "0" * 64}):
        with pytest.raises(AuditChainError, match="missing or empty"):
            log.verify(**options)
    with pytest.raises(AuditChainError, match="missing or empty"):
        list(log.records())
    with pytest.raises(AuditChainError, match="cut off"):
        log.verify(allow_empty=True, expected_head=heads[0])


@pytest.mark.parametrize("attack", ["removed", "emptied", "cut", "exchanged", "grown"])
def test_a_log_is_not_begun_anew_under_a_process_that_writes_it(log, attack, tmp_path):
    """Otherwise the next record would make a sound chain of what is left."""
    filled(log)
    other = AuditLog(tmp_path / "other.jsonl")
    filled(other, 8 if attack == "grown" else 6)
    if attack == "removed":
        log.path.unlink()
    else:
        kept = {"emptied": [], "cut": lines(log)[:4]}.get(attack, lines(other))
        log.path.write_bytes(b"".join(kept))
    before = log.path.read_bytes() if log.path.exists() else b""
    with pytest.raises(AuditWriteError, match="no longer holds"):
        log.append("key.unwrap")
    assert log.path.read_bytes() == before


def test_a_log_that_was_copied_over_itself_goes_on(log):
    filled(log)
    data = log.path.read_bytes()
    log.path.unlink()
    log.path.write_bytes(data)
    log.append("key.unwrap")
    assert log.verify().records == 7


def test_a_record_with_half_a_character_is_found(log):
    filled(log, 2)
    kept = lines(log)
    for half in (b'"\\ud800"', b'"\xed\xa0\x80"'):
        edited = kept[1].replace(b'"success"', half)
        assert edited != kept[1]
        log.path.write_bytes(kept[0] + edited)
        with pytest.raises(AuditChainError, match="record 1") as caught:
            log.verify()
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"garbage\n",
        b"[]\n",
        b'{"seq": 2}\n',
        b"half a record",
    ],
)
def test_what_is_no_record_is_found(log, line):
    filled(log, 2)
    with log.path.open("ab") as file:
        file.write(line)
    with pytest.raises(AuditChainError, match="record 2"):
        log.verify()
    with pytest.raises(AuditWriteError):
        AuditLog(log.path).append("next")
    assert log.path.read_bytes().endswith(line)  # evidence is not touched


def test_another_spelling_of_a_record_is_found(log):
    filled(log, 2)
    kept = lines(log)
    kept[1] = json.dumps(json.loads(kept[1])).encode() + b"\n"
    log.path.write_bytes(b"".join(kept))
    with pytest.raises(AuditChainError, match="record 1"):
        log.verify()


def test_a_record_whose_number_is_no_number_is_found(log):
    filled(log, 2)
    change(log, 1, lambda record: record.update(seq="1"))
    with pytest.raises(AuditChainError, match="record 1"):
        log.verify()


# ---------------------------------------------------------------- failing


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AuditWriteError, match=r"'key.unwrap' was refused"):
        AuditLog(tmp_path / "file" / "audit.jsonl").append("key.unwrap")


@pytest.mark.parametrize("value", ["Mary \ud800 Quant", float("nan"), object()])
def test_what_has_no_form_in_the_log_is_refused_and_not_shown(log, value):
    with pytest.raises(AuditWriteError, match=r"'key.unwrap' was refused") as caught:
        log.append("key.unwrap", {"path": value})
    assert "Mary" not in str(caught.value)
    assert caught.value.__context__ is caught.value.__cause__ is None
    log.append("after")
    assert log.verify().records == 1


@contextlib.contextmanager
def full(size):
    """A disk on which a file can have so many bytes; CPython ignores SIGXFSZ, so writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_no_half_record(log):
    filled(log, 2)
    size = log.path.stat().st_size
    with full(size + 10), pytest.raises(AuditWriteError, match="too large"):
        log.append("key.unwrap")
    assert log.path.stat().st_size == size
    log.append("after")
    assert log.verify().records == 3


def test_a_log_that_cannot_be_read_is_not_sound(tmp_path):
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(AuditChainError, match="cannot be read"):
        AuditLog(tmp_path / "audit.jsonl").verify()


def _append_in_child(log, results):
    results.put(log.append("key.unwrap", {"n": 1}))


def test_a_fork_while_a_record_is_written_stops_neither_process(log, monkeypatch):
    """As a thread may be at it when a loader's workers are forked, with its lock and its file."""
    context = multiprocessing.get_context("fork")
    results, fsync = context.Queue(), os.fsync
    child = context.Process(target=_append_in_child, args=(log, results))

    def forking(fd):  # it does what it did
        monkeypatch.undo()
        child.start()
        fsync(fd)

    log.append("key.wrap")
    monkeypatch.setattr(os, "fsync", forking)
    log.append("key.unwrap", {"n": 0})
    heads = [results.get(timeout=10), log.append("key.unwrap", {"n": 2})]
    child.join(10)
    assert (child.exitcode, log.verify().records) == (0, 4)
    assert log.verify(expected_head=heads[0]).head == heads[1]


def test_a_record_that_failed_behind_anothers_does_not_end_the_log(log):
    other = AuditLog(log.path)
    log.append("key.wrap")
    other.append("key.wrap")
    with full(log.path.stat().st_size + 9), pytest.raises(AuditWriteError, match="too large"):
        log.append("key.unwrap")
    log.append("key.unwrap")  # there is room again
    assert log.verify().records == 3


# ---------------------------------------------------------------- what is no log


class HungError(BaseException):
    """No OSError, which would be taken for one of the file's."""


def _lay(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as place:
            place.bind(str(path))
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(log, kind, deadline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    log = AuditLog("a/l")
    _lay(log.path, kind)
    with pytest.raises(AuditChainError, match="cannot be read"):
        log.verify()
    with pytest.raises(AuditChainError, match="cannot be read"):
        next(iter(log.records(allow_empty=True)))
    with pytest.raises(AuditWriteError, match="cannot be written"):
        log.append("key.unwrap")


@pytest.fixture
def deadline():
    """Ten seconds, of which a refusal takes none."""

    def over(*_):
        raise HungError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("after", [0, 3])
def test_a_line_without_an_end_takes_no_memory(log, after, deadline):
    filled(log, 3)
    if not after:
        log.path.write_bytes(b"")
    with log.path.open("ab") as file:
        file.truncate(log.path.stat().st_size + 2**28)  # of zeros, without a newline
    tracemalloc.start()
    try:
        with pytest.raises(AuditChainError, match=rf"record {after}: it is too long"):
            log.verify()
        with pytest.raises(AuditWriteError, match="nothing was written"):
            AuditLog(log.path).append("key.unwrap")
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_a_record_is_no_longer_than_what_is_read(log):
    with pytest.raises(AuditWriteError, match="longer"):
        log.append("key.unwrap", {"note": "x" * 2**20})
    log.append("key.unwrap", {"note": "x" * 2**19})
    assert log.verify().records == 1
