from __future__ import annotations

import copy
import fcntl
import gc
import os
import pickle
import resource
import threading
import time

import pytest

from lightning_secure.errors import IntegrityError
from lightning_secure.util.append_log import AppendLog, read_lines, whole_lines


@pytest.fixture
def log(tmp_path):
    opened = AppendLog(tmp_path / "log", os.O_CREAT)
    yield opened
    opened.close()


@pytest.fixture
def full():
    """A disk on which a file can have 12 bytes; CPython ignores SIGXFSZ, so writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(log):
    return os.pread(log.fd, 1000, 0)


def free(path):
    """Whether the log's lock can be taken."""
    try:
        AppendLog(path).close()
    except BlockingIOError:
        return False
    return True


def test_lines_that_do_not_fit_are_not_there_in_part(log, full):
    log.append(b"first\n")
    with pytest.raises(OSError, match="too large"):
        log.append(b"second\n")
    assert (content(log), log.end) == (b"first\n", 6)
    log.append(b"third\n")
    assert content(log) == b"first\nthird\n"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_lines_that_did_not_reach_the_disk_are_not_there(log, monkeypatch, error):
    def failing(fd):
        raise error

    log.append(b"first\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)  # no disk fails when a test asks for it
        with pytest.raises(error):
            log.append(b"second\n")
    assert (content(log), log.end) == (b"first\n", 6)


def test_nothing_is_written_behind_a_rest_that_could_not_be_cut_off(log, full, monkeypatch):
    def failing(fd, end):
        raise OSError("unplugged")

    log.append(b"first\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", failing)  # no disk fails when a test asks for it
        for error in ("too large", "unplugged"):
            with pytest.raises(OSError, match=error):
                log.append(b"second\n")
    assert content(log) == b"first\nsecond"
    log.append(b"3rd\n")
    assert content(log) == b"first\n3rd\n"


def test_lines_whose_writer_was_interrupted_right_after_are_cut_off(log):
    """They are longer than the next ones, which do not lie over all of them."""
    log.append(b"first\n")
    os.pwrite(log.fd, b"second, whole\n", log.end)
    log.append(b"3rd\n")
    assert content(log) == b"first\n3rd\n"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_open_log_is_not_copied(log, copied):
    with pytest.raises(TypeError, match="neither copied"):
        copied(log)
    gc.collect()
    log.append(b"first\n")


def test_a_log_that_grows_only_is_written_at_its_end(tmp_path):
    for line in (b"first\n", b"second\n"):
        log = AppendLog(tmp_path / "log", os.O_CREAT | os.O_APPEND, wait=True)
        log.append(line)
        log.close()
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\n"


def test_a_lock_is_that_of_the_file_with_the_logs_name(log, tmp_path):
    """The first writer removes its log, as a sealing that is over, while the second one waits."""
    got = []
    thread = threading.Thread(
        target=lambda: got.append(AppendLog(tmp_path / "log", os.O_CREAT, wait=True))
    )
    thread.start()
    while not got and not _waits_for(log):
        time.sleep(0.01)
    (tmp_path / "log").unlink()
    log.close()
    thread.join(10)
    got[0].append(b"second\n")
    assert (tmp_path / "log").read_bytes() == b"second\n"
    assert not free(tmp_path / "log")
    got[0].close()


def _waits_for(log):
    inode = f":{os.fstat(log.fd).st_ino} "
    with open("/proc/locks") as locks:
        return any("-> FLOCK" in line and inode in line for line in locks)


@pytest.mark.parametrize("let_go", ["close", "drop"])
def test_a_log_that_is_let_go_of_is_free(tmp_path, let_go):
    log = AppendLog(tmp_path / "log", os.O_CREAT)
    assert not free(tmp_path / "log")
    if let_go == "close":
        log.close()
        log.close()
        assert log.fd == -1
    del log
    assert free(tmp_path / "log")


def test_a_forked_child_does_not_let_go_of_its_parents_lock(log, tmp_path, in_fork):
    def child():
        log.close()
        return b"free" if free(tmp_path / "log") else b"held"

    assert in_fork(child) == b"held"
    assert not free(tmp_path / "log")


def test_an_interruption_right_after_the_lock_keeps_none(tmp_path, monkeypatch):
    def interrupted(fd, kind):
        fcntl_flock(fd, kind)
        raise KeyboardInterrupt

    fcntl_flock = fcntl.flock
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", interrupted)  # a signal cannot be timed so
        with pytest.raises(KeyboardInterrupt) as held:  # and its traceback holds the log
            AppendLog(tmp_path / "log", os.O_CREAT)
    assert free(tmp_path / "log")
    del held


def test_a_link_is_followed_only_where_that_is_meant(tmp_path):
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        AppendLog(tmp_path / "log", os.O_CREAT | os.O_NOFOLLOW)
    assert not (tmp_path / "elsewhere").exists()
    AppendLog(tmp_path / "log", os.O_CREAT).close()
    assert (tmp_path / "elsewhere").exists()


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="not a regular file"):
        AppendLog(tmp_path / "log", wait=True)


def test_what_has_no_end_is_torn_or_too_long(log):
    log.append(b"first\nsec")
    assert list(read_lines(os.dup(log.fd), limit=6)) == [b"first\n", b"sec"]
    assert list(whole_lines(os.dup(log.fd), limit=6, too_long="")) == [b"first\n"]
    log.append(b"ond, and more\n")
    with pytest.raises(IntegrityError, match="so long"):
        list(whole_lines(os.dup(log.fd), limit=6, too_long="none is so long"))
