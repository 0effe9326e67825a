"""The speed of reading encrypted shards, beside what others read in the clear.

    python benchmarks/shards.py [--quick] [--json FILE] [--only SYSTEM ...] [--records N]

Each system runs in a process of its own that keeps its dataset open; the peers' in an environment
of their own (``make peers``). In each round every system makes a pass over the same rows, one after
another, and the next round takes them in the other order; a ratio is taken within a round, and its
median over the rounds is reported. The consumer reads every byte of every batch, and the sum that
it makes must be that of the rows that were stored: a system that returns others ends the run.

All read from a warm page cache, with the same batch size; images are raw bytes to all, so that no
reader decodes pictures. Peers run once without worker processes and once with two, and from then
on in the better way, which the result names. Above 1 we are faster; ``trainer_fit_...`` is a
quotient of times, and what has a unit in its name is no ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from loading.bench import Bench
from loading.driver import SystemFailedError
from loading.machine import commit, describe_machine, private_folder
from loading.ratios import SYSTEMS, ratios
from loading.source import Size

START = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
SMALL = Size(
    name="3kb", shape=(3, 32, 32), rows=50_000, batch=256, random_batch=512, random_rows=20_480
)
LARGE = Size(
    name="150kb", shape=(3, 224, 224), rows=1_500, batch=64, random_batch=64, random_rows=768
)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the result of one run."""
    small, large = SMALL, LARGE
    if (rows := arguments.records) is not None:
        small = replace(SMALL, rows=rows, random_rows=min(rows, 1024))
        large = replace(LARGE, rows=rows // 20, random_rows=min(rows // 20, 64))
    own = {
        "fit": replace(small, name="fit", rows=max(1, small.rows // 5), random_rows=1),
        "quarter": replace(large, name="quarter", rows=large.rows // 4, random_rows=1),
    }
    bench = Bench([small, large], own, cache=arguments.cache, scratch=scratch)
    with contextlib.ExitStack() as stack:
        bench.start(arguments.only, arguments.peers, stack)
        say("storing the rows")
        bench.prepare()
        say("warming up, trying worker processes")
        bench.choose(quick=arguments.quick)
        for number in range(arguments.rounds):
            say(f"round {number + 1} of {arguments.rounds}")
            bench.round(number)
            if "ours" in arguments.only:
                bench.fit_round(number)
        say("memory, size on the disk, key calls")
        extras = bench.extras() if "ours" in arguments.only else {}
    rates = {
        key: [bench.rows_read(key) / seconds for seconds in times]
        for key, times in bench.seconds.items()
    }
    return {
        "machine": describe_machine(),
        "versions": bench.versions,
        "commit": commit(ROOT),
        "command": arguments.command,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "sizes": {
            size.name: {"shape": size.shape, "rows": size.rows, "batch": size.batch}
            | {"random_batch": size.random_batch, "random_rows": size.random_rows}
            for size in bench.sizes
        },
        "rounds": {
            key: {
                "workers": bench.cells[key][1].workers,
                "option": bench.cells[key][1].option,
                "passes_in_a_round": bench.passes[key],
                "tried": bench.tried[key],
                "rows": bench.rows_read(key),
                "seconds": [round(seconds, 5) for seconds in times],
            }
            for key, times in bench.seconds.items()
        },
        "fits": {
            "rows": own["fit"].rows,
            "seconds": {
                feed: [round(seconds, 4) for seconds in times] for feed, times in bench.fits.items()
            },
        },
        "ratios": {
            name: float(f"{value:.4g}")
            for name, value in {**ratios(rates, bench.fits), **extras}.items()
        },
    }


def say(text: str) -> None:
    """Tell what takes so long."""
    print(f"{time.perf_counter() - START:5.0f} s  {text}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="How fast encrypted shards are read.")
    parser.add_argument("--quick", action="store_true", help="smaller datasets, under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--records", type=int, help="rows of 3 KB; of 150 KB a twentieth")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path(os.environ.get("PEERS", ROOT / ".venv-peers")),
        help="the peers' environment, from make peers",
    )
    parser.add_argument("--cache", type=Path, help="where peers' datasets are kept")
    arguments = parser.parse_args()
    words = ["benchmarks/shards.py"]
    words += ["--quick"] * arguments.quick
    words += ["--only", *arguments.only] if arguments.only != list(SYSTEMS) else []
    words += ["--records", str(arguments.records)] if arguments.records is not None else []
    words += ["--rounds", str(arguments.rounds)] if arguments.rounds is not None else []
    arguments.command = " ".join(words)  # without paths: they say nothing about the result
    # The systems run elsewhere, and a path has to mean the same there.
    arguments.peers = arguments.peers.absolute()
    arguments.cache = (arguments.cache or private_folder()).absolute()
    if arguments.quick and arguments.records is None:
        arguments.records = 3_000
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 5
    return arguments


def main() -> int:
    """Measure, print and write; 1 if a system failed or returned other rows than were stored."""
    arguments = parse()
    try:
        with tempfile.TemporaryDirectory(dir=arguments.cache) as scratch:
            result = measure(arguments, Path(scratch))
    except SystemFailedError as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    for name, value in result["ratios"].items():
        print(f"{name:48} {value:10.4g}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
