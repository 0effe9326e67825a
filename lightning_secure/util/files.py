"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from lightning_secure.errors import ConfigError


def as_path(value: object, *, what: str) -> Path:
    r"""Return ``value`` as a path that the operating system can be asked for.

    Raises:
        ConfigError: if the value is not text or a path, or has a NUL character.

    >>> as_path("a\0b", what="root")
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: root is not a path: it is empty or has a NUL character.
    """
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{what} is not a path but a {type(value).__name__}.")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(f"{what} is not a path: it is empty or has a NUL character.")
    return Path(text)


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, mode: int = 0o666
) -> int:
    """Open a regular file and return its descriptor, which child processes do not inherit.

    Args:
        path: The file.
        flags: Those of ``os.open`` that say how.
        mode: Of a file that ``flags`` let it make.

    Raises:
        OSError: if the file cannot be opened, or is a pipe, a device or a folder: reading such a
            thing could wait for ever or never end.
    """
    # Without O_NONBLOCK, opening a pipe waits until another process opens its other end.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, mode)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        OSError: if the file cannot be opened, is not a regular file, or is longer.

    >>> _ = (folder / "notes.txt").write_bytes(b"left ear")
    >>> read_regular(folder / "notes.txt", limit=100)
    b'left ear'
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"longer than {limit} bytes")
        return file.read(size)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private_directories(path: Path) -> None:
    """Make ``path`` and its missing parents, each with mode 0700.

    ``Path.mkdir(parents=True, mode=0o700)`` gives only the last one that mode, and leaves the
    others open to users who may rename what lies in them. Directories that exist are left as they
    are.

    Raises:
        OSError: if the file system refused, or a part of ``path`` is not a directory.
    """
    if path.is_dir():
        return
    make_private_directories(path.parent)
    # Another process may have made it meanwhile.
    path.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def atomic_writer(path: Path, *, mode: int = 0o666, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes ``path`` when the block ends without an error.

    Args:
        path: The final name. The temporary file lies beside it, hidden, so that the rename stays on
            one file system.
        mode: Permission bits before the umask.
        replace: Whether an existing ``path`` may be replaced.

    Yields:
        A binary file open for writing.

    Raises:
        FileExistsError: if ``path`` exists and ``replace`` is false. The file is unchanged.
        OSError: if the file system refused. ``path`` is as it was.

    Guarantees:
        A reader of ``path`` sees the old bytes or all of the new ones, also after a crash: the data
        is flushed before the rename and the directory after it. On any error the temporary file is
        removed.

    >>> with atomic_writer(folder / "notes.txt") as file:
    ...     _ = file.write(b"left ear")
    ...     (folder / "notes.txt").exists()
    False
    >>> (folder / "notes.txt").read_bytes()
    b'left ear'
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    owner = os.getpid()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        _unfinished.add(fd)
        with os.fdopen(fd, "wb") as file:
            yield file
            if os.getpid() != owner:
                raise OSError(errno.EPERM, "a forked process does not finish its parent's file")
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
            os.unlink(temporary)
    except BaseException:
        if os.getpid() == owner:  # a forked child that leaves the block leaves the file
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    finally:
        _unfinished.discard(fd)
    sync_directory(path.parent)


#: Files that are being written, by their descriptors.
_unfinished: Final[set[int]] = set()


def _let_go() -> None:
    """Keep a forked child from flushing its copy of what its parent has buffered."""
    if _unfinished:
        nothing = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for fd in _unfinished:
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on ``path``, created if absent, against other processes and threads.

    Raises:
        OSError: if the file cannot be opened, or is a link, a pipe, a device or a folder: through a
            link, a file would be made wherever the link's author wants one.

    >>> with exclusive_lock(folder / "lock"):
    ...     (folder / "lock").exists()
    True
    """
    owner = os.getpid()
    fd = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        release_lock(fd, owner=owner)


def release_lock(fd: int, *, owner: int) -> None:
    """Close a file that an advisory lock is held on, and let go of the lock.

    Args:
        fd: The file.
        owner: Id of the process that took the lock; in one that it forked, the lock stays.

    Closing alone does not let go: a process that was forked meanwhile has inherited the file, and
    with it the lock, for as long as it runs.
    """
    try:
        if os.getpid() == owner:
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)
