"""Where the bytes of a dataset lie, and how they are read: at an offset, into a buffer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from typing_extensions import Buffer

__all__ = ["LocalFile", "LocalStorage", "Storage", "StoredFile"]


class StoredFile(Protocol):
    """One file, open for reading from several threads at once."""

    @property
    def size(self) -> int:
        """Length in bytes when it was opened."""

    def read_into(self, offset: int, out: Buffer) -> int:
        """Fill ``out`` from ``offset`` and return how many bytes there were; fewer at the end."""

    def close(self) -> None:
        """Release it."""


class Storage(Protocol):
    """A folder of files that are never changed once they are written."""

    def open(self, name: str) -> StoredFile:
        """Open a file by its path below the root.

        Raises:
            OSError: It cannot be opened.
        """


class LocalStorage:
    """A folder of this machine.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str) -> LocalFile:
        """Open a file by its path below the root; raises OSError if it cannot be opened."""
        return LocalFile(self._root / name)


class LocalFile:
    """An open file of this machine. Reads carry their offset, so threads do not disturb each other.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        """Length in bytes when it was opened."""
        return self._size

    def read_into(self, offset: int, out: Buffer) -> int:
        """Fill ``out`` from ``offset`` and return how many bytes there were; fewer at the end."""
        with memoryview(out).cast("B") as view:
            done = 0
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done

    def close(self) -> None:
        """Release it."""
        os.close(self._fd)
