"""Windows decrypted ahead by threads, and batches cut from them."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_secure.data.loader.epoch_order import EpochLine, Group, Share, Window
from lightning_secure.data.reading.batch_buffers import Buffers, Ints, Rows
from lightning_secure.data.reading.column_groups import OpenShard
from lightning_secure.data.reading.decode_rows import Filler
from lightning_secure.data.reading.open_shards import ShardSet
from lightning_secure.data.shards.scratch import Scratch

#: Windows under way besides the one that batches are cut from.
_AHEAD: Final = 1
_TASKS_A_THREAD: Final = 2


@dataclass(frozen=True)
class _Filling:
    """Rows of one window, while threads put them in place."""

    rows: Rows
    count: int
    futures: Sequence[Future[None]]


class Pipeline:
    """Reads one process's share of an epoch.

    Args:
        shards: Where the rows lie.
        filler: Which columns of them are read.
        buffers: Where windows are assembled.
        joined: Where batches are, that reach over the end of a window.
        line: The epoch's order.
        share: The part of it that is read.
        threads: How many decrypt.
    """

    def __init__(
        self,
        shards: ShardSet,
        filler: Filler,
        buffers: Buffers,
        joined: Buffers,
        *,
        line: EpochLine,
        share: Share,
        threads: int,
    ) -> None:
        self._shards = shards
        self._filler = filler
        self._buffers = buffers
        self._joined = joined
        self._line = line
        self._share = share
        self._threads = threads
        self._scratch = Scratch()
        intervals = np.array(share.intervals, dtype=np.int64).reshape(-1, 2)
        self._starts, self._stops = intervals.T
        lengths = self._stops - self._starts
        self._before = np.cumsum(lengths) - lengths

    def batches(self) -> Iterator[dict[str, Any]]:
        """Return the batches, each a dict of columns.

        Raises:
            ShardCorruptedError: if a shard or segment was altered.

        The threads end with the iterator, whether it came to its end, failed or was dropped.
        """
        members: set[int] = set()
        executor = ThreadPoolExecutor(
            self._threads,
            thread_name_prefix="lightning-secure",
            initializer=lambda: members.add(threading.get_ident()),
        )
        try:
            yield from self._cut(self._windows(executor))
        finally:
            # The garbage collector may end a pass from any thread, and none can wait for itself.
            executor.shutdown(wait=threading.get_ident() not in members, cancel_futures=True)

    def _cut(self, windows: Iterator[_Filling]) -> Iterator[dict[str, Any]]:
        ahead = deque(itertools.islice(windows, _AHEAD))
        parts: list[tuple[dict[str, Any], int, int]] = []  # values, first row, rows
        for step in range(self._share.steps):
            need = self._share.bound(step + 1) - self._share.bound(step)
            while sum(rows for _, _, rows in parts) < need:
                filling = ahead.popleft()
                ahead.extend(itertools.islice(windows, 1))
                for future in filling.futures:
                    future.result()
                parts.append((filling.rows.values, 0, filling.count))
                del filling
            batch, parts = self._take(parts, need)
            yield batch
            # A batch that the user lets go of is free for the next window.
            del batch

    def _take(
        self, parts: list[tuple[dict[str, Any], int, int]], need: int
    ) -> tuple[dict[str, Any], list[tuple[dict[str, Any], int, int]]]:
        """Return a batch of ``need`` rows, and what is left."""
        values, first, rows = parts[0]
        if rows >= need:
            batch = {name: column[first : first + need] for name, column in values.items()}
            rest = [(values, first + need, rows - need)] if rows > need else []
            return batch, rest + parts[1:]
        joined = Rows(self._filler.columns, need, self._joined)
        done = 0
        left = []
        for values, first, rows in parts:
            count = min(rows, need - done)
            for name, column in joined.values.items():
                part = values[name][first : first + count]
                if isinstance(column, Tensor):
                    torch.narrow(column, 0, done, count).copy_(part)
                else:
                    column[done : done + count] = part
            done += count
            if rows > count:
                left.append((values, first + count, rows - count))
        return joined.values, left

    def _windows(self, executor: ThreadPoolExecutor) -> Iterator[_Filling]:
        groups = [group for group in self._line.groups() if self._wanted(group.start, group.stop)]
        opened: deque[tuple[Group, list[Future[OpenShard]]]] = deque()
        for index in range(len(groups)):
            # One group ahead, so that the reader need not wait when its turn comes.
            for group in groups[index + len(opened) : index + 2]:
                futures = [executor.submit(self._shards.reader, int(s)) for s in group.shards]
                opened.append((group, futures))
            group, futures = opened.popleft()
            readers = [future.result() for future in futures]
            shapes = [
                self._shards.shape(int(shard), reader)
                for shard, reader in zip(group.shards, readers, strict=True)
            ]
            for window in self._line.windows(group, shapes, wanted=self._wanted):
                yield self._fill(executor, window, readers)

    def _wanted(self, start: int, stop: int) -> bool:
        return bool(((self._starts < stop) & (self._stops > start)).any())

    def _fill(
        self, executor: ThreadPoolExecutor, window: Window, readers: Sequence[OpenShard]
    ) -> _Filling:
        """Hand the segments of a window to the threads."""
        places, chosen, count = self._places(window)
        if chosen is None and len(window.segments) == count:
            # Where each row has a segment of its own, they are taken in the order of their places.
            order = np.argsort(places)
            window = window._replace(shards=window.shards[order], segments=window.segments[order])
            places = places[order]
        in_order = chosen is None and bool((np.diff(places) == 1).all())
        rows = Rows(self._filler.columns, count, self._buffers)
        segments = len(window.segments)
        tasks = min(segments, self._threads * _TASKS_A_THREAD)
        cuts = [segments * task // tasks for task in range(tasks + 1)]
        arguments = rows, window, readers, places, chosen, in_order
        return _Filling(
            rows,
            count,
            [
                executor.submit(self._work, *arguments, low, high)
                for low, high in itertools.pairwise(cuts)
            ],
        )

    def _places(self, window: Window) -> tuple[Ints, npt.NDArray[np.bool_] | None, int]:
        """Return where the rows of a window go, which of them are read unless all, and how many."""
        stop = window.start + len(window.targets)
        interval = int(np.searchsorted(self._starts, window.start, side="right")) - 1
        if interval >= 0 and stop <= self._stops[interval]:
            return window.targets, None, len(window.targets)
        # A stretch ends within the window, which few do.
        targets = window.start + window.targets
        intervals = np.searchsorted(self._starts, targets, side="right") - 1
        chosen = (intervals >= 0) & (targets < self._stops[intervals])
        places = self._before[intervals] + targets - self._starts[intervals]
        return places - places[chosen].min(), chosen, int(np.count_nonzero(chosen))

    def _work(
        self,
        rows: Rows,
        window: Window,
        readers: Sequence[OpenShard],
        places: Ints,
        chosen: npt.NDArray[np.bool_] | None,
        in_order: bool,
        low: int,
        high: int,
    ) -> None:
        scratch, fill = self._scratch, self._filler.fill
        starts = window.starts[low : high + 1].tolist()
        # Memory behind the last of these rows is another thread's.
        until = starts[-1] if in_order else 0
        shards, segments = window.shards[low:high].tolist(), window.segments[low:high].tolist()
        for index, (shard, segment) in enumerate(zip(shards, segments, strict=True)):
            targets = places[starts[index] : starts[index + 1]]
            if chosen is None:
                fill(rows, readers[shard], segment, scratch, targets, until=until)
                continue
            sources = np.flatnonzero(chosen[starts[index] : starts[index + 1]])
            if len(sources):
                fill(rows, readers[shard], segment, scratch, targets[sources], sources)
