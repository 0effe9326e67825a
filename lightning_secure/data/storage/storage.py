"""The interface of a dataset's storage."""

from __future__ import annotations

from typing import Protocol

from typing_extensions import Buffer

from lightning_secure.crypto.entries import ShardEntry


class StoredFile(Protocol):
    """A file that is open for reading from several threads at once."""

    @property
    def size(self) -> int:
        """Length in bytes when it was opened."""

    def read_into(self, offset: int, out: Buffer) -> int:
        """Fill ``out`` from ``offset`` and return how many bytes there were; fewer at the end.

        Raises:
            StorageError: if the place did not answer.
        """

    def distrust(self) -> bool:
        """Take the bytes from their origin from now on, and forget the copy they came from.

        Returns:
            False if there is no copy: reading again would bring the same bytes.
        """

    def close(self) -> None:
        """Release it."""


class Storage(Protocol):
    """A folder of files that are never changed once they are written, but for the manifest.

    It is shown in errors by its ``str``, which holds no credentials.
    """

    def open(self, entry: ShardEntry) -> StoredFile:
        """Open a shard that a verified manifest names.

        Raises:
            OSError: if the shard is missing or cannot be opened.
            StorageError: if the place did not answer.
        """

    def read(self, name: str) -> bytes:
        """Return a whole small file by its path below the root, never from a copy.

        Raises:
            OSError: if the file is missing or cannot be read.
            StorageError: if the place did not answer.
        """
