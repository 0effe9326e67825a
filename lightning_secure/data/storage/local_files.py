"""A dataset in a folder of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from typing_extensions import Buffer

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.manifest import MAX_MANIFEST_BYTES
from lightning_secure.util.files import open_regular, read_regular


class LocalStorage:
    """A folder of this machine.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def open(self, entry: ShardEntry) -> LocalFile:
        """Open a shard; raises OSError if it cannot be opened."""
        return LocalFile(self._root / entry.file)

    def read(self, name: str) -> bytes:
        """Return a whole file; raises OSError if it cannot be read."""
        return read_regular(self._root / name, limit=MAX_MANIFEST_BYTES)


class LocalFile:
    """An open file of this machine. Reads carry their offset, so threads do not disturb each other.

    Args:
        path: The file.

    Raises:
        OSError: if the file cannot be opened, or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self._fd = open_regular(path)
        self._size = os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        """Length in bytes when it was opened."""
        return self._size

    def read_into(self, offset: int, out: Buffer) -> int:
        """Fill ``out`` from ``offset`` and return how many bytes there were; fewer at the end."""
        done = os.preadv(self._fd, (out,), offset)
        whole = memoryview(out)
        if done == whole.nbytes:
            return done
        with whole.cast("B") as view:
            while 0 < done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done

    def distrust(self) -> bool:
        """Return False: there is no copy of it."""
        return False

    def close(self) -> None:
        """Release it."""
        os.close(self._fd)
