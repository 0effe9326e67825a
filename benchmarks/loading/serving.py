"""A system under measurement is a process that answers one line of JSON with another.

It keeps its imports and its open dataset, so that neither is timed, and sleeps while others are
measured. Only numpy and the standard library here: the peers' environment imports this too.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loading.source import Array, Size, digest, open_rows

__all__ = ["Cell", "Epoch", "System", "serve"]

#: Starts pass number n over the rows, and yields batches of images and labels.
Epoch = Callable[[int], Iterable[tuple[Any, Any]]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The rows that are read, and the way of reading.

    Attributes:
        variant: Which of a system's ways of storing it is.
        size: The rows.
        mode: ``sequential``, ``shuffled`` or ``random``.
        workers: Worker processes.
        option: A setting of the system's own.
        data: Where the system stores the rows.
        source: Where the rows lie as they were made.
    """

    variant: str
    size: Size
    mode: str
    workers: int
    option: str
    data: Path
    source: Path

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Cell:
        """Return what the driver sent."""
        size = Size(**{**value["size"], "shape": tuple(value["size"]["shape"])})
        paths = {name: Path(value[name]) for name in ("data", "source")}
        return cls(**{**value, **paths, "size": size})

    def rows(self) -> tuple[Array, Array, Array]:
        """Return images, labels and the random order."""
        return open_rows(self.source)


class System(Protocol):
    """A way to store rows and to read them; ``packages`` are those whose versions count."""

    @property
    def packages(self) -> Sequence[str]: ...

    def prepare(self, cell: Cell) -> None:
        """Store the rows in ``cell.data``."""

    def open(self, cell: Cell) -> Epoch:
        """Make ready to read; whatever a training run does once belongs here."""


@dataclass
class _Open:
    """A cell that is ready to be read, how often it was, and its worker processes."""

    epoch: Epoch
    passes: int = 0
    children: list[Any] = field(default_factory=list)


def serve(system: System) -> None:
    """Answer the driver until it closes the pipe."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print must not stand between the answers
        opened: dict[Cell, _Open] = {}
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = _answer(system, opened, request.pop("do"), request)
            except Exception:  # noqa: BLE001 - whatever it is, the driver must hear of it
                traceback.print_exc()
                answer = {"error": traceback.format_exc(limit=-3)}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answer(
    system: System, opened: dict[Cell, _Open], do: str, request: dict[str, Any]
) -> dict[str, Any]:
    if do == "versions":
        return {name: importlib.metadata.version(name) for name in system.packages}
    if do not in ("prepare", "epoch", "close"):
        result: dict[str, Any] = getattr(system, do)(**request)
        return result
    cell = Cell.parse(request)
    if do == "prepare":
        system.prepare(cell)
        return {}
    if do == "close":
        for child in opened.pop(cell).children:
            child.terminate()
        gc.collect()  # or the loader ends within what is timed next
        return {}
    if cell not in opened:
        opened[cell] = _Open(system.open(cell))
    state = opened[cell]
    state.passes += 1
    before = multiprocessing.active_children()
    rows = total = 0
    start = time.perf_counter()
    for x, y in state.epoch(state.passes):
        x, y = np.asarray(x), np.asarray(y)
        total += digest(x, y)
        rows += len(x)
    seconds = time.perf_counter() - start
    state.children += [child for child in multiprocessing.active_children() if child not in before]
    return {"seconds": seconds, "rows": rows, "digest": total % 2**64}
