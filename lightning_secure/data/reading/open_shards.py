"""The open shards of a split, and in which of them a row lies."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from lightning_secure.data.reading.column_groups import OpenGroups, OpenShard
from lightning_secure.data.storage import Storage
from lightning_secure.util.fork_lock import ForkLock

_OPEN_SHARDS: Final = 64
#: Each open shard keeps the tags of its segments, 16 bytes each.
_OPEN_SEGMENTS: Final = 2**20

Ints = npt.NDArray[np.int64]


class ShardSet:
    """Opens shards when a row of theirs is asked for, and keeps the latest ones open.

    Args:
        storage: Where the dataset lies.
        groups: The groups of columns that are read. Their shards are opened and closed together.

    It may be used from several threads.
    """

    def __init__(self, storage: Storage, groups: OpenGroups) -> None:
        self._storage = storage
        self._groups = groups
        self.entries = entries = groups.entries
        self._ends = np.cumsum([entry.records for entry in entries])
        self._starts = self._ends - [entry.records for entry in entries]
        self._per_segment = np.zeros(len(entries), dtype=np.int64)  # 0: not opened yet
        self._readers: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = ForkLock()

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return int(self._ends[-1])

    def stretches(self, rows: Ints) -> list[tuple[int, int]]:
        """Return which parts of ``rows``, which are in order, to read one after another.

        Shards that were never opened are read one at a time: what had to be fetched to open a
        shard is then at hand when its rows are read.
        """
        shard = np.searchsorted(self._ends, rows, side="right")
        if self._per_segment[shard].all():
            return [(0, len(rows))]
        bounds = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(rows)]
        return list(pairwise(bounds))

    def locate(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Return each row's shard, its segment there, and its number in the segment.

        Raises:
            ShardCorruptedError: if a shard that one of them lies in is not the one that was sealed.
        """
        shard = np.searchsorted(self._ends, rows, side="right")
        if not self._per_segment[shard].all():
            for number in np.unique(shard).tolist():
                self.reader(number)
        within = rows - self._starts[shard]
        segment, row = np.divmod(within, self._per_segment[shard])
        return shard, segment, row

    def shape(self, shard: int, reader: OpenShard) -> tuple[int, int, int, int]:
        """Return an open shard's segments, rows, rows per segment, and bytes per segment."""
        header = reader.header
        length = self._groups.segment_bytes(shard, reader)
        return header.segments, header.records, header.records_per_segment, length

    def reader(self, shard: int) -> OpenShard:
        """Return an open shard.

        Raises:
            ShardCorruptedError: if the shard is not the one that was sealed.
        """
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self._groups.reader(self._storage, shard)
        self._per_segment[shard] = reader.header.records_per_segment
        with self._lock:
            # Another thread may have opened it meanwhile; then that one goes.
            self._readers[shard] = reader
            while len(self._readers) > 1 and (
                len(self._readers) > _OPEN_SHARDS
                or sum(r.header.segments for r in self._readers.values())
                * len(self._groups.schemas)
                > _OPEN_SEGMENTS
            ):
                # The reader closes when the last thread that reads has let go of it.
                self._readers.popitem(last=False)
        return reader

    def close(self) -> None:
        """Let go of all shards. They are opened again when a row is asked for."""
        with self._lock:
            self._readers.clear()
