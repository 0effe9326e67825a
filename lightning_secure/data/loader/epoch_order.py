"""The order of an epoch's rows, and each process's share of it. No I/O in here.

An epoch is a *line*: a permutation of the split's rows that depends on the seed and the epoch, and
not on the number of processes or the batch size. It is drawn in three steps, so that little needs
to be open or in memory at once: the shards are permuted and taken in groups; within a group all
segments are permuted and taken in windows; within a window all rows are permuted.

A process reads one stretch of the line. What is left of an epoch is a list of intervals of it, so a
run can be continued by another number of processes: what is left is dealt out anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

_GROUP_SHARDS: Final = 16
_GROUP_SEGMENTS: Final = 2**20
_SHARDS, _SEGMENTS, _ROWS = 1, 2, 3

Ints = npt.NDArray[np.int64]


class Interval(NamedTuple):
    """Positions ``start <= p < stop`` of a line."""

    start: int
    stop: int


class Group(NamedTuple):
    """Shards that are open together.

    Attributes:
        number: Position in the epoch.
        shards: Their numbers in the split.
        start: Where their rows begin on the line.
        stop: Where they end.
    """

    number: int
    shards: Ints
    start: int
    stop: int


class Window(NamedTuple):
    """Segments whose rows are mixed.

    Attributes:
        shards: For each segment, its shard's position in the group.
        segments: For each segment, its number in the shard.
        start: Where its rows begin on the line.
        starts: For each segment, where its rows begin in ``targets``; one more at the end.
        targets: For each row, its position on the line, counted from ``start``.
    """

    shards: Ints
    segments: Ints
    start: int
    starts: Ints
    targets: Ints


class EpochLine:
    """The order of one epoch.

    Args:
        records: Rows of each shard.
        segments: Segments of each shard.
        seed: From 0 to 2**64 - 1.
        epoch: Likewise.
        shuffle: Whether to permute anything at all.
        window_bytes: Plaintext of a window, in bytes; it has one segment at least.

    Permutations are the order of raw Philox words, which numpy promises never to change; so the
    line of an epoch is the same under each version of it.

    >>> settings = {"epoch": 0, "shuffle": True, "window_bytes": 2**20}
    >>> line = EpochLine([4, 4, 4], [1, 1, 1], seed=7, **settings)
    >>> line.rows, digest(line) == digest(EpochLine([4, 4, 4], [1, 1, 1], seed=7, **settings))
    (12, True)
    """

    def __init__(
        self,
        records: Sequence[int],
        segments: Sequence[int],
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        window_bytes: int,
    ) -> None:
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle
        self._window_bytes = window_bytes
        self._order = self._permutation(len(records), _SHARDS, 0)
        self._ends = np.cumsum(np.asarray(records, dtype=np.int64)[self._order])
        self._segments = np.asarray(segments, dtype=np.int64)[self._order]
        self.rows = int(self._ends[-1])

    def _permutation(self, count: int, purpose: int, number: int) -> Ints:
        if not self._shuffle:
            return np.arange(count)
        # The two upper words of the counter keep the streams of one epoch apart.
        words = np.random.Philox(
            key=np.array([self._seed, self._epoch], dtype=np.uint64),
            counter=np.array([0, 0, number, purpose], dtype=np.uint64),
        ).random_raw(count)
        # Each word's low bits make way for its place: sorting these is faster than an argsort, and
        # which algorithm sorts them makes no difference.
        low = np.uint64((1 << max(1, (count - 1).bit_length())) - 1)
        words = (words & ~low) | np.arange(count, dtype=np.uint64)
        words.sort()
        return (words & low).astype(np.int64)

    def groups(self) -> Iterator[Group]:
        """Return the groups in order."""
        first = 0
        for number in range(len(self._order)):
            if first == len(self._order):
                return
            segments = np.cumsum(self._segments[first : first + _GROUP_SHARDS])
            last = first + max(1, int(np.searchsorted(segments, _GROUP_SEGMENTS, side="right")))
            start = int(self._ends[first - 1]) if first else 0
            yield Group(number, self._order[first:last], start, int(self._ends[last - 1]))
            first = last

    def windows(
        self,
        group: Group,
        shards: Sequence[tuple[int, int, int, int]],
        *,
        wanted: Callable[[int, int], bool],
    ) -> Iterator[Window]:
        """Return the windows of a group in order.

        Args:
            group: From :meth:`groups`.
            shards: For each of its shards: segments, rows, rows per segment, bytes per segment.
            wanted: Whether rows between two positions of the line are needed; windows without any
                are left out.
        """
        counts = [segments for segments, _, _, _ in shards]
        shard = np.repeat(np.arange(len(shards)), counts)
        segment = np.concatenate([np.arange(count) for count in counts])
        _, records, per_segment, length = np.array(shards, dtype=np.int64)[shard].T
        rows = np.minimum(per_segment, records - segment * per_segment)

        order = self._permutation(len(shard), _SEGMENTS, group.number)
        shard, segment, rows, length = shard[order], segment[order], rows[order], length[order]
        window = (np.cumsum(length) - length) // self._window_bytes
        bounds = np.flatnonzero(np.diff(window, prepend=-1, append=-1))
        start = group.start
        for number, (low, high) in enumerate(pairwise(bounds)):
            starts = np.concatenate([[0], np.cumsum(rows[low:high])])
            stop = start + int(starts[-1])
            if wanted(start, stop):
                stream = (group.number << 32) + number
                targets = self._permutation(stop - start, _ROWS, stream)
                yield Window(shard[low:high], segment[low:high], start, starts, targets)
            start = stop


def digest(line: EpochLine) -> str:
    """Return what two lines share only if they are the same permutation of the same shards."""
    parts = line._order, line._ends, line._permutation(64, _ROWS, 0)
    return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Share:
    """A process's share of the rest of an epoch.

    Attributes:
        intervals: Of the line, in order.
        rows: In all of them.
        steps: Batches; the same for every process.
        batch_size: Rows of a batch, at most.
    """

    intervals: tuple[Interval, ...]
    rows: int
    steps: int
    batch_size: int

    def bound(self, step: int) -> int:
        """Return how many of the rows the first ``step`` batches have."""
        # Processes may differ by one row: who has fewer ends on a shorter batch, not on none.
        return min(step * self.batch_size, self.rows - (self.steps - step))


def steps_for(rows: int, *, world_size: int, batch_size: int, drop_last: bool) -> int:
    """Return how many batches each process takes.

    >>> [steps_for(10, world_size=2, batch_size=2, drop_last=drop) for drop in (False, True)]
    [3, 2]
    """
    if drop_last:
        return rows // world_size // batch_size
    return (rows + world_size * batch_size - 1) // (world_size * batch_size)


def deal(
    left: Sequence[Interval], *, rank: int, world_size: int, batch_size: int, drop_last: bool
) -> Share:
    """Deal out what is left of an epoch, evenly.

    Args:
        left: Intervals of the line.
        rank: Which process asks.
        world_size: How many there are.
        batch_size: Rows of a batch, per process.
        drop_last: Whether rows are left over rather than put into a smaller last batch.

    Guarantees:
        All processes take the same number of batches, none of which is empty. No row is dealt
        twice, except without ``drop_last`` where ``batch_size`` is 1 and the rows do not divide by
        ``world_size``, or there are fewer rows than that: then a row that another process has as
        well is better than a process that waits for ever.

    >>> deal([Interval(0, 10)], rank=1, world_size=2, batch_size=2, drop_last=False)
    Share(intervals=(Interval(start=5, stop=10),), rows=5, steps=3, batch_size=2)
    """
    total = sum(stop - start for start, stop in left)
    steps = steps_for(total, world_size=world_size, batch_size=batch_size, drop_last=drop_last)
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    if drop_last:
        high = low + steps * batch_size
    elif high - low < steps:
        low = max(0, high - steps)
        high = low + steps
    return Share(tuple(cut(left, low, high)), high - low, steps, batch_size)


def cut(left: Sequence[Interval], low: int, high: int) -> Iterator[Interval]:
    """Return what lies from the ``low``-th to before the ``high``-th position of ``left``.

    >>> list(cut([Interval(0, 4), Interval(10, 20)], 2, 7))
    [Interval(start=2, stop=4), Interval(start=10, stop=13)]
    """
    before = 0
    for start, stop in left:
        first, last = max(start, start + low - before), min(stop, start + high - before)
        if first < last:
            yield Interval(first, last)
        before += stop - start


def without(left: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Return what is left when ``taken`` is taken away; both in order of the line.

    >>> without([Interval(0, 10)], [Interval(2, 4)])
    [Interval(start=0, stop=2), Interval(start=4, stop=10)]
    """
    result: list[Interval] = []
    index = 0
    for start, stop in left:
        while index < len(taken) and taken[index].start < stop:
            if taken[index].start > start:
                result.append(Interval(start, taken[index].start))
            start = max(start, taken[index].stop)
            if start > stop:
                break
            index += 1
        if start < stop:
            result.append(Interval(start, stop))
    return result


def left_after(
    left: Sequence[Interval],
    step: int,
    *,
    world_size: int,
    batch_size: int,
    drop_last: bool,
) -> list[Interval]:
    """Return what is left once every process has taken ``step`` batches of its share."""
    taken: list[Interval] = []
    for rank in range(world_size):
        share = deal(
            left, rank=rank, world_size=world_size, batch_size=batch_size, drop_last=drop_last
        )
        taken += cut(share.intervals, 0, share.bound(step))
    return without(left, taken)
