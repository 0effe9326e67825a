"""Locks between threads that a fork does not leave closed."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


class ForkLock:
    """A lock that is open in a forked child, whichever thread held it in the parent.

    That thread is not in the child and would never let go of it. What the lock guards must be fit
    for use at each moment, as for a thread that is interrupted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: Any) -> None:
        self._lock.release()


_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _open_all() -> None:
    for lock in list(_locks):
        lock._lock = threading.Lock()


os.register_at_fork(after_in_child=_open_all)
