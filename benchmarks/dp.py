"""The cost of private training, beside training without privacy and beside Opacus.

    python benchmarks/dp.py [--quick] [--json FILE] [--device cuda]

For each model and batch size every system has a process of its own that keeps its model and
optimizer. In each round every system takes some steps, one after another, and the next round goes
the other way round; a ratio is taken within a round, and its median over the rounds is reported.
Below 1 we need less.

*Time* is that from the end of one step to the end of the next. Private systems draw by Poisson
sampling, so their batches have as many rows as without privacy only on average: seconds per row are
compared, each step's by its own rows. The first step, in which our checks and the trials of the
cheapest way per layer run, is given as ``first_step_seconds`` and is no part of a ratio; nor are
two steps after it, and the first of each turn.

*Memory* is the most that a step takes beyond what the process had before the model was built, with
a sampling rate of 1, so that all batches are alike. ``memory_...`` is that of the whole run with
the first step, ``memory_later_...`` that without it. On a processor it is resident memory,
after glibc was made to return what it had kept; on a GPU what torch has allocated.

All train the same weights on the same rows with the same SGD, all private ones with the same
clipping norm and noise, and in float32; on a GPU under autocast to bfloat16.

*Equal work.* Before anything is timed, each private system gives the gradient of one batch without
noise, in float32, once with a clipping norm that no row reaches and once with the real one. The
first must be that of Opacus' hooks to 1e-4 of its norm, and so must the second, save that it may be
shorter: our norms are upper bounds of what rounding may have done to them, and where they come by
formula we clip harder for it. By how much is published as ``clips_harder_by_...``. A system whose
gradient is another has no time and no ratio, and if it is ours the exit code is 1.

fastDP (Bu et al.) is not on PyPI, and is left out.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loading.driver import SystemFailedError
from loading.machine import commit, describe_machine
from training.bench import Bench
from training.models import TASKS
from training.ratios import Cell, ratios
from training.systems import CLIP, DELTA, NOISE, SYSTEMS, Setting

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
MODELS = ("mlp", "wrn", "vit", "gpt2")
#: A perceptron's step is so short that smaller batches would measure Lightning.
BATCHES = {"mlp": (128, 512)}
OTHER_BATCHES = (32, 64)

Cells = dict[str, dict[int, dict[str, Cell]]]


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the result of one run."""
    base = Setting(
        system="plain",
        model=MODELS[0],
        size=arguments.size,
        batch=1,
        rate=1 / 64,
        device=arguments.device,
        bf16=arguments.precision == "bf16",
        threads=arguments.threads,
        noise=True,
        clip=CLIP,
        folder=folder,
    )
    bench = Bench(
        base,
        rounds=arguments.rounds,
        turn_seconds=0.1 if arguments.quick else 1.0,
        steps=1 if arguments.quick else 4,
        say=say,
    )
    about = bench.about()
    cells: Cells = {}
    for model in arguments.models:
        batches = arguments.batches or BATCHES.get(model, OTHER_BATCHES)
        for batch in batches[:1] if arguments.quick else batches:
            cells.setdefault(model, {})[batch] = bench.cell(model, batch, arguments.only)
    return {
        "machine": describe_machine() | {key: about[key] for key in ("gpu",) if key in about},
        "versions": about["versions"],
        "commit": commit(ROOT),
        "command": arguments.command,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "threads": about["threads"],
        "device": arguments.device,
        "precision": arguments.precision,
        "size": arguments.size,
        "private": {"max_grad_norm": CLIP, "noise_multiplier": NOISE, "delta": DELTA},
        "left_out": {"fastDP": "not on PyPI"},
        "cells": {
            f"{model}/b{batch}/{system}": _plain(cell, batch)
            for model, batches in cells.items()
            for batch, systems in batches.items()
            for system, cell in systems.items()
        },
        "failed": {
            f"{model}/b{batch}/{system}": cell.failed
            for model, batches in cells.items()
            for batch, systems in batches.items()
            for system, cell in systems.items()
            if cell.failed is not None
        },
        "ratios": {name: float(f"{value:.4g}") for name, value in ratios(cells).items()},
    }


def _plain(cell: Cell, batch: int) -> dict[str, Any]:
    """Return a cell as JSON has it, with the median time of a step that has ``batch`` rows."""
    rates = cell.seconds_per_row
    known = {"step_ms": statistics.median(rates) * batch * 1e3} if rates else {}
    return {
        name: _short(value)
        for name, value in {**known, **asdict(cell)}.items()
        if value is not None
    }


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def say(text: str) -> None:
    """Tell what takes so long."""
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="What private training costs.")
    parser.add_argument(
        "--quick", action="store_true", help="small models and one batch size, under a minute"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--models", nargs="+", choices=TASKS["full"], default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, help="rows of a step, of all models")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--size", choices=TASKS, help="of the models; by default full on a GPU, small without one"
    )
    parser.add_argument("--precision", choices=("32", "bf16"), help="bf16 on a GPU by default")
    parser.add_argument("--threads", type=int, default=cores, help="of all systems alike")
    arguments = parser.parse_args()
    words = ["benchmarks/dp.py"]
    words += ["--quick"] * arguments.quick
    words += ["--device", arguments.device] if arguments.device != "cpu" else []
    words += ["--only", *arguments.only] if arguments.only != list(SYSTEMS) else []
    words += ["--models", *arguments.models] if arguments.models != list(MODELS) else []
    words += ["--batches", *map(str, arguments.batches)] if arguments.batches else []
    for name in ("rounds", "size", "precision"):
        if (value := getattr(arguments, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--threads", str(arguments.threads)] if arguments.threads != cores else []
    arguments.command = " ".join(words)  # without paths: they say nothing about the result
    on_gpu = arguments.device == "cuda"
    if arguments.size is None:
        arguments.size = "full" if on_gpu else "quick" if arguments.quick else "small"
    arguments.precision = arguments.precision or ("bf16" if on_gpu else "32")
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 7
    return arguments


def table(result: dict[str, Any]) -> str:
    """Return times and peaks as lines of text."""
    lines = [f"{'model/batch/system':30} {'step ms':>9} {'first s':>8} {'peak MB':>8} {'later':>8}"]
    for name, cell in result["cells"].items():
        figures = (cell.get(key, float("nan")) for key in _COLUMNS)
        lines.append("{:30} {:9.4g} {:8.3g} {:8.4g} {:8.4g}".format(name, *figures))
    lines += [f"{name}: {why}" for name, why in result["failed"].items()]
    return "\n".join(lines)


_COLUMNS = ("step_ms", "first_step_seconds", "peak_mb", "peak_mb_later")


def exit_code(result: dict[str, Any]) -> int:
    """Return 1 if a ratio is missing through us; what fails in Opacus is a result."""
    return int(any(name.split("/")[-1] in ("plain", "ours") for name in result["failed"]))


def main() -> int:
    """Measure, print and write; 1 if we failed, did other work than Opacus, or plain failed."""
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments, Path(folder))
    except SystemFailedError as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    print(table(result))
    for name, value in result["ratios"].items():
        if not re.search(r"_b\d+$", name):
            print(f"{name:44} {value:8.4g}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return exit_code(result)


if __name__ == "__main__":
    # Asking whether there is a GPU must not open it in a process that others are forked from.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    sys.exit(main())
