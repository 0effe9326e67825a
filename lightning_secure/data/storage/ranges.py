"""An object of a remote storage, read by ranges."""

from __future__ import annotations

from typing import Final, Protocol

from typing_extensions import Buffer

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.util.fork_lock import ForkLock

_FIRST_WINDOW: Final = 64 * 1024


class RangeSource(Protocol):
    """A server of ranges of objects."""

    range_bytes: int

    def fetch(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``; fewer if there are no more."""

    def keep_window(self, file: RemoteFile) -> None:
        """Note that ``file`` holds a range in memory."""

    def forget_window(self, file: RemoteFile) -> None:
        """Note that ``file`` was closed."""


class RemoteFile:
    """An open object. Reads carry their offset and may come from several threads.

    Args:
        source: The storage.
        entry: The shard's entry in the manifest.
        size: The object's length in bytes.

    Who reads on where the last read ended gets ranges that grow up to ``source.range_bytes``, kept
    in memory for the reads to come; who jumps gets exactly what was asked for. Opening a shard
    looks at the tag of each segment, and so reads it from end to end in large ranges; its rows are
    asked for once more, unless all of it fits one range.
    """

    def __init__(self, source: RangeSource, entry: ShardEntry, *, size: int) -> None:
        self._source = source
        self._name = entry.file
        self._size = size
        # As far as a scan may jump: from tag to tag, or over a segment that another thread reads.
        self._near = 4 * (size // entry.segments) + _FIRST_WINDOW
        self._lock = ForkLock()
        self._window = (0, b"")
        self._next = 0
        self._streak = 0

    @property
    def size(self) -> int:
        """Length in bytes when it was opened."""
        return self._size

    def read_into(self, offset: int, out: Buffer) -> int:
        """Fill ``out`` from ``offset`` and return how many bytes there were; fewer at the end.

        Of an object that was removed meanwhile there are none.

        Raises:
            StorageError: if the storage did not answer, or refused.
        """
        with memoryview(out).cast("B") as view:
            length = min(len(view), self._size - offset)
            if length <= 0:
                return 0
            try:
                data = self._scan(offset, length)
                if data is None:
                    data = self._source.fetch(self._name, offset, offset + length)
            except FileNotFoundError:
                return 0
            view[: len(data)] = data
            return len(data)

    def _scan(self, offset: int, length: int) -> bytes | memoryview | None:
        """Return the bytes out of a window, perhaps a new one; None if no scan is under way."""
        with self._lock:
            start, window = self._window
            if not start <= offset <= offset + length <= start + len(window):
                scanning = 0 <= offset - self._next <= self._near
                self._streak = min(self._streak + 1, 20) if scanning else 0
                self._next = offset + length
                if not scanning:
                    return None
                most = self._source.range_bytes
                # One that fits is asked for as a whole: opening it leaves its rows at hand.
                wanted = most if self._size <= most else min(most, _FIRST_WINDOW << self._streak)
                end = min(self._size, offset + max(length, wanted))
                # Within the lock: threads that scan side by side wait for one window.
                start, window = offset, self._source.fetch(self._name, offset, end)
                self._window = (start, window)
                self._source.keep_window(self)
            self._next = max(self._next, offset + length)
            return memoryview(window)[offset - start : offset - start + length]

    def drop_window(self) -> None:
        """Give the memory back."""
        self._window = (0, b"")

    def distrust(self) -> bool:
        """Return False: there is no copy of it."""
        return False

    def close(self) -> None:
        """Release it."""
        self._source.forget_window(self)
        self.drop_window()
