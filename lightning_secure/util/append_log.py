"""A log file that grows by whole lines, each on the disk before its writer goes on."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lightning_secure.errors import IntegrityError
from lightning_secure.util.files import open_regular, release_lock


class AppendLog:
    r"""A log file, open and locked for one process.

    Args:
        path: The file.
        flags: Those of ``os.open`` that say whether to make the file, and to follow a link to it.
        mode: Permission bits of a file that is made.
        wait: Whether to wait for another holder of the lock.

    Attributes:
        fd: Descriptor of the file; -1 once the log is closed.
        owner: Id of the process that opened the log. Another was forked from it.
        end: Where the last line ends, in bytes. The next one goes there.

    Raises:
        BlockingIOError: if the lock is held elsewhere, and ``wait`` is false.
        OSError: if the file cannot be opened or made, or is a pipe, a device or a folder.

    >>> log = AppendLog(folder / "log", os.O_CREAT)
    >>> log.append(b"first\nsecond\n")
    >>> list(read_lines(os.dup(log.fd), limit=100))
    [b'first\n', b'second\n']
    >>> log.close()
    """

    fd = -1

    def __init__(
        self, path: Path, flags: int = 0, *, mode: int = 0o666, wait: bool = False
    ) -> None:
        self.owner = os.getpid()
        # The lock's last holder may have removed the file before the lock could be taken.
        while self.fd < 0 or not _names(path, self.fd):
            self.close()
            self.fd = open_regular(path, os.O_RDWR | flags, mode=mode)
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BaseException:
                self.close()
                raise
        self.end = os.fstat(self.fd).st_size

    def append(self, lines: bytes, *, flush: bool = True) -> None:
        """Write whole lines, or nothing.

        Args:
            lines: Each with its newline.
            flush: Whether the lines must be on the disk before this returns.

        Raises:
            OSError: if the lines could not be written. What was written of them is cut off, now or
                before the next ones are written.
        """
        if os.fstat(self.fd).st_size > self.end:
            self.cut(self.end)  # the rest of lines that an error or an interruption left
        written = 0
        try:
            while written < len(lines):
                written += os.pwrite(self.fd, lines[written:], self.end + written)
            if flush:
                os.fsync(self.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self.cut(self.end)
            raise
        self.end += written

    def cut(self, end: int) -> None:
        """Cut off what follows the first ``end`` bytes, such as a line that a crash has torn."""
        os.ftruncate(self.fd, end)
        self.end = end

    def close(self) -> None:
        """Close the file and let go of the lock; in a forked child, the lock stays its parent's."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            release_lock(fd, owner=self.owner)

    __del__ = close

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("an open log is neither copied nor pickled: its file would be closed twice")


def _names(path: Path, fd: int) -> bool:
    """Return whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def read_lines(fd: int, *, limit: int) -> Iterator[bytes]:
    """Yield the lines of a file, each with its newline; the last one may be torn and have none.

    Args:
        fd: Descriptor of the file, which is closed in the end.
        limit: The most bytes that are read as one line: one without an end fills no memory.
    """
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        yield from iter(lambda: file.readline(limit), b"")


def whole_lines(fd: int, *, limit: int, too_long: str) -> Iterator[bytes]:
    """Yield all lines but a torn last one, which is what a crash leaves; see `read_lines`.

    Raises:
        IntegrityError: if a line goes on beyond ``limit``, with ``too_long`` as its message.
    """
    for line in read_lines(fd, limit=limit):
        if line.endswith(b"\n"):
            yield line
        elif len(line) >= limit:
            raise IntegrityError(too_long)
