"""The number of threads that decrypt."""

from __future__ import annotations

import os
from typing import Final

from lightning_secure.errors import ConfigError

_MOST: Final = 8


def threads_to_use(asked: int | None) -> int:
    """Return ``asked``; by default as many as this process may use cores, and no more than 8.

    Raises:
        ConfigError: if fewer than one was asked for.
    """
    if asked is None:
        return min(_MOST, len(os.sched_getaffinity(0)))
    if asked < 1:
        raise ConfigError(f"`threads` must be at least 1, got {asked}.")
    return asked
