"""Shards sealed side by side: several at once, in order, and never more than were allowed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, Self

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.util.validate import positive_int

#: More threads than this wait for the disk, and each holds a shard in memory.
DEFAULT_THREADS: Final = min(4, os.cpu_count() or 1)


class ShardPool:
    """Threads that seal shards, shared by the writers of one source.

    Args:
        threads: How many shards are sealed at the same time. With one, the caller's thread does
            it.

    Raises:
        ConfigError: if ``threads`` is not positive.

    Guarantees:
        At most ``threads`` shards are held here: handing in one more waits for one to be done.
    """

    def __init__(self, threads: int) -> None:
        positive_int(threads=threads)
        self._free = threading.BoundedSemaphore(threads)
        self._executor = (
            concurrent.futures.ThreadPoolExecutor(threads, "lsec-seal") if threads > 1 else None
        )

    def submit(self, task: Callable[[], ShardEntry]) -> concurrent.futures.Future[ShardEntry]:
        """Begin ``task`` as soon as a thread is free, and return its future."""
        if self._executor is None:
            done: concurrent.futures.Future[ShardEntry] = concurrent.futures.Future()
            done.set_result(task())
            return done
        self._free.acquire()
        try:
            future = self._executor.submit(task)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        return future

    def close(self) -> None:
        """Wait for what was begun, and end the threads."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardQueue:
    """The shards of one split: begun in order, and taken in order, whichever is done first.

    Args:
        pool: Seals them.
        entries: Shards that are done already.
        on_done: Told of each shard, in order, once it and all before it are on the disk.
    """

    def __init__(
        self,
        pool: ShardPool,
        *,
        entries: tuple[ShardEntry, ...] = (),
        on_done: Callable[[ShardEntry], None] = lambda _: None,
    ) -> None:
        self._pool = pool
        self._on_done = on_done
        self._running: deque[concurrent.futures.Future[ShardEntry]] = deque()
        self.entries = list(entries)

    @property
    def begun(self) -> int:
        """The number of shards handed in, which is the number of the next one."""
        return len(self.entries) + len(self._running)

    def add(self, task: Callable[[], ShardEntry]) -> None:
        """Hand in the next shard; raises what an earlier one failed with."""
        self._collect()
        self._running.append(self._pool.submit(task))
        self._collect()

    def finish(self) -> tuple[ShardEntry, ...]:
        """Wait for all shards and return them; raises what one failed with."""
        concurrent.futures.wait(self._running, return_when=concurrent.futures.FIRST_EXCEPTION)
        self._collect()
        return tuple(self.entries)

    def stop(self) -> list[ShardEntry]:
        """Wait for running work, begin nothing more, and return the shards not yet reported.

        Those that are done together with all before them are taken as always.
        """
        for future in self._running:
            future.cancel()
        stray, in_order = [], True
        for future in self._running:
            entry = None
            with contextlib.suppress(BaseException):  # the first error is on its way already
                entry = future.result()
            if entry is not None and in_order:
                with contextlib.suppress(Exception):
                    self._take(entry)
                    continue
            in_order = False
            stray += [entry] if entry is not None else []
        self._running.clear()
        return stray

    def _collect(self) -> None:
        # Any failure ends the sealing at once, also one of a shard that is not next.
        for future in self._running:
            if future.done() and (error := future.exception()) is not None:
                raise error
        while self._running and self._running[0].done():
            self._take(self._running.popleft().result())

    def _take(self, entry: ShardEntry) -> None:
        self._on_done(entry)
        self.entries.append(entry)
