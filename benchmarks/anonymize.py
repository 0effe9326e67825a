"""Measure what anonymisation by patterns costs while sealing.

    python benchmarks/anonymize.py [--quick] [--json benchmarks/results/anonymize.json]

Each kind of rows is sealed with a plan and without one, turn by turn in one process, from the same
columns in memory; the ratio of a round is what counts, and the median of all rounds is given.
After each sealing it is looked whether what was planted is gone, or still there.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from faker import Faker
from loading.machine import commit, describe_machine

from lightning_secure import (
    AnonymizationPlan,
    EncryptedShardDataset,
    Generalize,
    Keep,
    LocalKeyProvider,
    Pseudonymize,
    Redact,
    Suppress,
    seal,
)

SEED: Final = 20261124
TARGET: Final = 1.5
ROOT: Final = Path(__file__).resolve().parent.parent
#: One text in so many holds a telephone number and an e-mail address.
EVERY: Final = 10
RARE: Final = 100
PLANTED: Final = "planted@clinic.example"

Columns = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Rows to seal.

    Attributes:
        make: Returns so many.
        plan: What is done to them.
        rows: How many there are in a full run.
        what: For the reader.
    """

    make: Callable[[int], Columns]
    plan: AnonymizationPlan
    rows: int
    what: str


def notes(rows: int, sentences: int, every: int = EVERY) -> list[str]:
    """Return running text, of which one in ``every`` names a telephone number and an address."""
    fake, draw = Faker("en_US"), random.Random(SEED)
    fake.seed_instance(SEED)
    known = [fake.sentence(10) for _ in range(2000)]
    result = []
    for number in range(rows):
        text = " ".join(draw.choice(known) for _ in range(sentences))
        if number % every == 0:
            text += f" Call {fake.numerify('(###) 555-01##')} or write to {PLANTED}."
        result.append(f"{text} Visit {number}.")
    return result


def people(rows: int) -> Columns:
    """Return what ``examples/seal.yaml`` seals: a few columns about a person, and features."""
    fake, draw = Faker("en_US"), random.Random(SEED)
    fake.seed_instance(SEED)
    names = [fake.name() for _ in range(5000)]
    return {
        "name": [draw.choice(names) for _ in range(rows)],
        "email": [f"{draw.choice(names).replace(' ', '.')}{i}@clinic.example" for i in range(rows)],
        "born": [f"{draw.randrange(1930, 2010)}-0{draw.randrange(1, 10)}-11" for _ in range(rows)],
        "postcode": [f"{draw.randrange(10000, 99999)}" for _ in range(rows)],
        "record": [f"R{number:08d}" for number in range(rows)],
        "note": notes(rows, 3),
        "diagnosis": [draw.choice(("flu", "gout", "asthma")) for _ in range(rows)],
        "x": np.random.default_rng(SEED).random((rows, 30), dtype=np.float32),
    }


PEOPLE: Final = AnonymizationPlan(
    {
        "name": Suppress(),
        "email": Suppress(),
        "born": Generalize(date="decade"),
        "postcode": Generalize(prefix=2),
        "record": Pseudonymize(domain="patient"),
        "note": Redact(),
        "diagnosis": Keep(),
    },
    quasi_identifiers=["born", "postcode"],
    sensitive=["diagnosis"],
)
NOTE: Final = AnonymizationPlan({"note": Redact()})
KINDS: Final = {
    "people": Kind(
        people, PEOPLE, 40_000, "seven columns about a person, a note of 200 characters, 30 floats"
    ),
    "records": Kind(
        lambda rows: {
            "note": notes(rows, 6),
            "x": np.random.default_rng(SEED).random((rows, 3, 16, 16), dtype=np.float32),
        },
        NOTE,
        40_000,
        "3 KB of floats and a note of 400 characters",
    ),
    "notes": Kind(
        lambda rows: {"note": notes(rows, 6)}, NOTE, 100_000, "a note of 400 characters alone"
    ),
    "rare": Kind(
        lambda rows: {"note": notes(rows, 6, RARE)},
        NOTE,
        100_000,
        f"the same, of which one in {RARE} holds something",
    ),
}


def sealed(columns: Columns, plan: AnonymizationPlan | None, keys: LocalKeyProvider) -> float:
    """Return the seconds that sealing takes; raises if rows are missing or planted values are."""
    gc.collect()
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        seal(columns, root, keys=keys, anonymize=plan)
        seconds = time.perf_counter() - start
        data = EncryptedShardDataset(root, split="train", keys=keys, output="dict")
        rows = len(columns["note"])
        if len(data) != rows or any(
            (PLANTED in data[i]["note"]) is not (plan is None) for i in range(0, rows, RARE * 10)
        ):
            raise SystemExit("rows are missing, or what was planted was not treated as it should")
        return seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result of one run."""
    kinds: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        keys = LocalKeyProvider.generate(Path(folder) / "project.kek")
        for name, kind in KINDS.items():
            rows = arguments.rows or (kind.rows // 8 if arguments.quick else kind.rows)
            columns = kind.make(rows)
            for plan in (None, kind.plan):  # imports and what is compiled once
                sealed({n: values[:500] for n, values in columns.items()}, plan, keys)
            rounds = [
                (sealed(columns, None, keys), sealed(columns, kind.plan, keys))
                for _ in range(arguments.rounds)
            ]
            kinds[name] = {
                "what": kind.what,
                "rows": rows,
                "seconds_without": [round(without, 4) for without, _ in rounds],
                "seconds_with": [round(given, 4) for _, given in rounds],
                "ratio": round(statistics.median(given / without for without, given in rounds), 3),
            }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": describe_machine(),
        "commit": commit(ROOT),
        "command": arguments.command,
        "seed": SEED,
        "versions": {p: version(p) for p in ("faker", "google-re2", "phonenumbers", "torch")},
        "findings": f"one note in {EVERY} has a telephone number and an e-mail address",
        "kinds": kinds,
        "ratios": {f"seal_with_vs_without_{name}": of["ratio"] for name, of in kinds.items()},
        "target": TARGET,
        "missed": [name for name, of in kinds.items() if of["ratio"] > TARGET],
    }


def main() -> int:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the rows, under a minute"
    )
    parser.add_argument("--rows", type=int, help="rows of each kind")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    words = ["benchmarks/anonymize.py", *(["--quick"] if arguments.quick else [])]
    words += ["--rows", str(arguments.rows)] if arguments.rows else []
    arguments.command = " ".join([*words, "--rounds", str(arguments.rounds)])
    result = measure(arguments)
    for name, of in result["kinds"].items():
        print(f"{name:8} {of['ratio']:.2f} times  ({of['rows']} rows of {of['what']})")
    print("target missed:", ", ".join(result["missed"]) or "no")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return bool(result["missed"])


if __name__ == "__main__":
    sys.exit(main())
