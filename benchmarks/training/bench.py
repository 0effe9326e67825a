"""The processes, and what they are measured at."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from loading.driver import SystemFailedError

from training.ratios import OPACUS, Cell, Gradients, UnequalWorkError, per_row, shorter_by
from training.systems import Setting
from training.worker import serve

__all__ = ["Bench"]

_PATIENCE_SECONDS = 300
_MOST_STEPS = 40


class Bench:
    """A run.

    Args:
        base: What all settings have in common.
        rounds: How often every system has its turn.
        turn_seconds: So long is a turn at least, unless it has enough steps.
        steps: So many steps has a turn at least.
        say: Tells what takes so long.
    """

    def __init__(
        self,
        base: Setting,
        *,
        rounds: int,
        turn_seconds: float,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        self._base = base
        self._rounds = rounds
        self._turn_seconds = turn_seconds
        self._steps = steps
        self._say = say
        # Children inherit what the first process has imported, and no threads and no GPU.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training.worker"])
        # Until Python 3.12 what is imported beforehand is not looked for where this process would.
        here = Path(__file__).resolve().parent.parent
        paths = [str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        # Threads that allocate apart from each other make peaks differ from run to run.
        os.environ["MALLOC_ARENA_MAX"] = "1"

    def about(self) -> dict[str, Any]:
        """Return versions, threads and GPU."""
        with self._process("about", self._base) as process:
            return process.answer()

    def cell(self, model: str, batch: int, systems: Sequence[str]) -> dict[str, Cell]:
        """Return what is measured of all systems on one model with one batch size."""
        setting = replace(self._base, model=model, batch=batch)
        cells = {system: Cell() for system in systems}
        self._say(f"{model}, batch {batch}: gradients and memory")
        self._memory(setting, cells)
        self._say(f"{model}, batch {batch}: time")
        self._time(setting, cells)
        return cells

    def _memory(self, setting: Setting, cells: dict[str, Cell]) -> None:
        gradients = {}
        for system, cell in cells.items():
            try:
                with self._process("memory", replace(setting, system=system, rate=1)) as process:
                    found = process.answer()
            except SystemFailedError as error:
                cell.failed = str(error)
                continue
            cell.peak_mb, cell.peak_mb_later = found["peak_mb"], found["peak_mb_later"]
            if system != "plain":
                paths = found["gradients"]
                gradients[system] = Gradients(*(np.load(paths[k]) for k in Gradients._fields))
        # The hooks, unless they need more memory than there is.
        reference = next((system for system in OPACUS if system in gradients), None)
        for system, pair in gradients.items():
            cell = cells[system]
            if reference is None:
                if any(name in cells for name in OPACUS):
                    cell.failed = f"{system}: Opacus gave no gradient to compare with"
            else:
                try:
                    cell.clips_harder_by = shorter_by(pair, gradients[reference])
                except UnequalWorkError as error:
                    cell.failed = f"{system}: its gradient is not that of {reference}: {error}"

    def _time(self, setting: Setting, cells: dict[str, Cell]) -> None:
        with contextlib.ExitStack() as stack:
            processes: dict[str, _Process] = {}
            for system in [name for name, cell in cells.items() if cell.failed is None]:
                process = self._process("turns", replace(setting, system=system))
                stack.enter_context(process)
                with _failing(cells[system]):
                    cells[system].first_step_seconds = process.steps(1)[0][0]
                    seconds = process.steps(2)[-1][0]
                    enough = max(self._steps, math.ceil(self._turn_seconds / seconds))
                    cells[system].steps_in_a_round = min(enough, _MOST_STEPS)
                    processes[system] = process
            for number in range(self._rounds):
                for system in list(processes)[:: 1 if number % 2 == 0 else -1]:
                    cell = cells[system]
                    if cell.failed is not None:
                        continue
                    assert cell.steps_in_a_round is not None
                    with _failing(cell):
                        # The first one finds the caches as another system has left them.
                        steps = processes[system].steps(1 + cell.steps_in_a_round)[1:]
                        cell.seconds_per_row.append(per_row(steps))

    def _process(self, what: str, setting: Setting) -> _Process:
        return _Process(self._context, what, setting)


class _Process:
    """A system in a process of its own."""

    def __init__(self, context: ForkServerContext, what: str, setting: Setting) -> None:
        self._name = setting.system
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, what, setting), daemon=True)
        self._process.start()
        other.close()

    def steps(self, count: int) -> list[tuple[float, int]]:
        """Let it take so many steps, and return the seconds and the rows of each."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer says why
            self._pipe.send(count)
        found: list[tuple[float, int]] = self.answer()["steps"]
        return found

    def answer(self) -> dict[str, Any]:
        """Return what it has to say.

        Raises:
            SystemFailedError: if the system failed, ended, or was silent for five minutes.
        """
        try:
            if not self._pipe.poll(_PATIENCE_SECONDS):
                raise SystemFailedError(f"{self._name} was silent for too long")
            found: dict[str, Any] = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            raise SystemFailedError(
                f"{self._name} has ended with exit code {self._process.exitcode}"
            ) from None
        if "error" in found:
            raise SystemFailedError(f"{self._name} failed: {found['error']}")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(0 if kind else 10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _failing(cell: Cell) -> Iterator[None]:
    try:
        yield
    except SystemFailedError as error:
        print(error, file=sys.stderr)
        cell.failed = str(error)
