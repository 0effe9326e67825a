"""The processes, what they store, and what they are measured at."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loading.driver import Process, SystemFailedError
from loading.ratios import READERS, SYSTEMS, Reader
from loading.serving import Cell
from loading.source import Size, make_rows, open_rows, row_digests

__all__ = ["FEEDS", "Bench"]

#: What feeds ``Trainer.fit``.
FEEDS = ("aes", "ram", "ram_batches")
_SEED = 20261124
_SLOW_SECONDS = 0.5
_AT_LEAST_SECONDS = 0.2  # a reader is measured so long in a round, by as many passes as it takes


class Bench:
    """A run.

    Args:
        sizes: The rows that all systems read.
        own: The rows that only we are asked about: ``fit``, and ``quarter`` of the last size.
        cache: Where rows, and what peers store, are kept for later runs.
        scratch: Where all else goes.
    """

    def __init__(
        self, sizes: list[Size], own: dict[str, Size], *, cache: Path, scratch: Path
    ) -> None:
        self.sizes = sizes
        self.own = own
        self._cache = cache
        self._scratch = scratch
        self._peers = Path()
        self.processes: dict[str, Process] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.cells: dict[str, tuple[Process, Cell]] = {}
        self.passes: dict[str, int] = {}
        self.tried: dict[str, list[dict[str, Any]]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.fits: dict[str, list[float]] = {}
        self._expected: dict[tuple[str, bool], tuple[int, int]] = {}

    def start(self, systems: list[str], peers: Path, stack: contextlib.ExitStack) -> None:
        """Start the processes; they end with ``stack``."""
        self._peers = peers
        self.processes = {name: self._process(name, name, stack) for name in systems}

    def _process(self, system: str, name: str, stack: contextlib.ExitStack) -> Process:
        foreign, module = SYSTEMS[system]
        python = self._peers / "bin" / "python" if foreign else Path(sys.executable)
        if not python.exists():
            raise SystemFailedError(f"{name} needs {python}: run make peers, or leave it out")
        log = self._scratch / f"{name}.log"
        return stack.enter_context(Process(name, python, module, log))

    def prepare(self) -> None:
        """Make the rows, and let each system store them; those of peers are kept for later runs."""
        for size in [*self.sizes, *self.own.values()]:
            source = self._source(size)
            if not source.exists():
                part = source.with_suffix(".part")
                shutil.rmtree(part, ignore_errors=True)
                make_rows(part, size, seed=_SEED)
                part.rename(source)
            x, y, order = open_rows(source)
            terms = row_digests(x, y)
            self._expected[size.name, False] = (size.rows, int(terms.sum()) % 2**64)
            self._expected[size.name, True] = (len(order), int(terms[order].sum()) % 2**64)
        with ThreadPoolExecutor(len(self.processes)) as pool:
            for _ in pool.map(self._prepare_one, list(self.processes)):
                pass

    def _prepare_one(self, system: str) -> None:
        process = self.processes[system]
        self.versions[system] = process.ask("versions")
        variants = dict.fromkeys(r.variant for r in READERS if r.system == system)
        wanted = [(size, variant) for size in self.sizes for variant in variants]
        if system == "ours":
            wanted += [(self.sizes[0], "64k"), *((size, "256k") for size in self.own.values())]
        for size, variant in wanted:
            data = self._data(system, variant, size)
            if not data.exists():
                part = data.with_name(data.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                part.parent.mkdir(parents=True, exist_ok=True)
                process.cell("prepare", self._cell(size, variant, "sequential", 0, "", part))
                part.rename(data) if part.exists() else data.mkdir()

    def _source(self, size: Size) -> Path:
        return self._cache / f"rows-{size.name}-{size.rows}-{size.random_rows}-{_SEED}"

    def _data(self, system: str, variant: str, size: Size) -> Path:
        foreign, _ = SYSTEMS[system]
        if not foreign:  # what we seal is made anew: this code may have changed
            return self._scratch / f"{system}-{variant}-{size.name}"
        version = next(iter(self.versions[system].values()))
        return self._source(size).with_suffix(".stored") / f"{system}-{version}-{variant}"

    def _cell(
        self, size: Size, variant: str, mode: str, workers: int, option: str, data: Path
    ) -> Cell:
        return Cell(
            variant=variant,
            size=size,
            mode=mode,
            workers=workers,
            option=option,
            data=data,
            source=self._source(size),
        )

    def choose(self, *, quick: bool) -> None:
        """Warm everything up, and find for each reader the better number of workers."""
        for size in self.sizes:
            for reader in READERS:
                modes = (reader.quick if quick else None) or reader.modes
                for mode in modes if reader.system in self.processes else ():
                    self._choose(reader, size, mode, quick=quick)

    def _choose(self, reader: Reader, size: Size, mode: str, *, quick: bool) -> None:
        process = self.processes[reader.system]
        data = self._data(reader.system, reader.variant, size)
        key = f"{size.name}/{mode}/{reader.name}"
        tried: dict[Cell, float] = {}
        for workers in reader.workers if mode != "random" else (0,):
            for option in reader.options:
                cell = self._cell(size, reader.variant, mode, workers, option, data)
                slow = self._measure(process, cell) > _SLOW_SECONDS  # this pass warms up
                passes = [self._measure(process, cell) for _ in range(1 if slow else 2)]
                tried[cell] = min(passes)
        best = min(tried, key=tried.__getitem__)
        for cell in tried.keys() - {best}:
            process.cell("close", cell)
        self.tried[key] = [
            {"workers": cell.workers, "option": cell.option, "seconds": round(seconds, 5)}
            for cell, seconds in tried.items()
        ]
        self.cells[key] = (process, best)
        self.passes[key] = 1 if quick else max(1, round(_AT_LEAST_SECONDS / tried[best]))

    def _measure(self, process: Process, cell: Cell) -> float:
        answer = process.cell("epoch", cell)
        rows, total = self._expected[cell.size.name, cell.mode == "random"]
        if (answer["rows"], answer["digest"]) != (rows, total):
            raise SystemFailedError(
                f"{process.name} ({cell.variant}, {cell.size.name}, {cell.mode}) returned "
                f"{answer['rows']} rows that are not the {rows} rows that were stored"
            )
        return float(answer["seconds"])

    def round(self, number: int) -> None:
        """Let every reader make its passes, in the other order in every second round."""
        for key in list(self.cells) if number % 2 == 0 else reversed(list(self.cells)):
            passes = [self._measure(*self.cells[key]) for _ in range(self.passes[key])]
            self.seconds.setdefault(key, []).append(statistics.mean(passes))

    def rows_read(self, key: str) -> int:
        """Return how many rows a pass of one reader reads."""
        cell = self.cells[key][1]
        return cell.size.random_rows if cell.mode == "random" else cell.size.rows

    def fit_round(self, number: int) -> None:
        """Train a small network for an epoch, fed by us and out of RAM."""
        size = self.own["fit"]
        for feed in FEEDS if number % 2 == 0 else reversed(FEEDS):
            answer = self.processes["ours"].ask(
                "fit",
                data=str(self._data("ours", "256k", size)),
                source=str(self._source(size)),
                feed=feed,
                batch=size.batch,
            )
            if answer["rows"] != size.rows:
                raise SystemFailedError(f"{feed} trained on {answer['rows']} rows")
            self.fits.setdefault(feed, []).append(answer["seconds"])

    def extras(self) -> dict[str, float]:
        """Return what only we are asked: size on the disk, calls of the key provider, memory."""
        ours, last = self.processes["ours"], self.sizes[-1]
        found: dict[str, float] = {}
        first = self.sizes[0]
        stored = ours.ask("bytes_stored", data=str(self._data("ours", "64k", first)))["bytes"]
        found["size_overhead_64k"] = stored / (first.rows * first.row_bytes) - 1
        calls = ours.ask("key_calls", data=str(self._data("ours", "256k", last)))
        found["provider_calls_per_partition"] = calls["calls"] / calls["partitions"]
        rewrap = ours.ask("rewrap", data=str(self._data("ours", "256k", last)), count=10_000)
        if rewrap:
            found["rewrap_10000_seconds"] = rewrap["seconds"]
        # In processes that have read nothing yet, over two datasets of which one is larger.
        grown = {"quarter": self.own["quarter"], "whole": last}
        with contextlib.ExitStack() as stack:
            processes = {name: self._process("ours", f"memory-{name}", stack) for name in grown}
            for name, size in grown.items():
                data = self._data("ours", "256k", size)
                answer = processes[name].ask("memory", data=str(data), batch=size.batch)
                found[f"loader_extra_memory_mb_{name}"] = answer["megabytes"]
        found["loader_extra_memory_mb"] = max(
            found[f"loader_extra_memory_mb_{name}"] for name in grown
        )
        return found
