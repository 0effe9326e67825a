from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from lightning_secure.util.files import (
    atomic_writer,
    exclusive_lock,
    make_private_directories,
    open_regular,
    read_regular,
)


def names(folder):
    return sorted(item.name for item in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_writer(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(tmp_path) == ["file"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_half_way():
        with atomic_writer(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_existing_file_is_kept_when_it_must_be(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError), atomic_writer(path, replace=False) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import sys, time, pathlib\n"
        "from lightning_secure.util.files import atomic_writer\n"
        "with atomic_writer(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'new'); file.flush(); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"


def test_a_lock_keeps_others_out(tmp_path):
    order = []

    def second():
        with exclusive_lock(tmp_path / ".lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive_lock(tmp_path / ".lock"):
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.fixture
def forked():
    """Fork processes that wait; they end with the test."""
    ends = []

    def forked():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        os.close(read)
        ends.append((write, child))

    yield forked
    for write, child in ends:
        os.close(write)
        os.waitpid(child, 0)


def taken(path):
    """Whether somebody holds the lock."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path, forked):
    with exclusive_lock(tmp_path / ".lock"):
        forked()
        assert taken(tmp_path / ".lock")
    assert not taken(tmp_path / ".lock")


def test_a_forked_process_does_not_open_its_parents_lock(tmp_path):
    with exclusive_lock(tmp_path / ".lock"):
        parent, child = os.getpid(), os.fork()
        if child:
            os.waitpid(child, 0)
            assert taken(tmp_path / ".lock")
    if os.getpid() != parent:
        os._exit(0)


def test_the_mode_is_that_asked_for(tmp_path):
    old = os.umask(0)
    try:
        with atomic_writer(tmp_path / "file", mode=0o640):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_every_private_directory_that_is_made_is_private(tmp_path):
    """Path.mkdir(parents=True, mode=0o700) leaves all but the last one open to others."""
    outside = tmp_path / "there"
    outside.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        make_private_directories(outside / "a" / "b" / "c")
        make_private_directories(outside / "a" / "b" / "d")
        make_private_directories(outside)
    finally:
        os.umask(before)
    for name in ("a", "a/b", "a/b/c", "a/b/d"):
        assert stat.S_IMODE((outside / name).stat().st_mode) == 0o700, name
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755


def test_a_regular_file_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, limit=5) == b"12345"
    with pytest.raises(OSError, match="longer than 4 bytes"):
        read_regular(path, limit=4)
    os.close(open_regular(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    before = len(os.listdir("/proc/self/fd"))
    make(tmp_path / "thing")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "thing")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_forked_child_leaves_its_parents_unfinished_file(tmp_path):
    """It ends in order, within the block: it neither removes nor finishes nor writes anything."""
    path = tmp_path / "file"
    with atomic_writer(path) as file:
        file.write(b"half")  # in memory only
        pid = os.fork()
        if pid == 0:
            try:
                sys.exit(0)
            finally:
                with contextlib.suppress(BaseException):
                    file.write(b"child")
                    file.flush()
                    file.close()
                os._exit(0)
        os.waitpid(pid, 0)
        file.write(b"whole")
    assert path.read_bytes() == b"halfwhole"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_forked_child_does_not_leave_the_block_for_its_parent(tmp_path, error):
    path = tmp_path / "file"
    code = 1
    try:
        with atomic_writer(path) as file:
            pid = os.fork()
            if pid == 0:
                if error is not None:
                    raise error
            else:
                os.waitpid(pid, 0)
                file.write(b"whole")
    except (OSError, ValueError):
        code = 0
    if pid == 0:
        os._exit(code)
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["file"]
