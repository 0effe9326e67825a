"""The response of each system to a storage administrator who changes its files.

    python benchmarks/attacks.py --peers .venv-peers [--json FILE] [--document FILE]

Each attack is made on a fresh dataset of 200 rows, sealed by the library itself, and the dataset
is then read by the library itself, in a process of its own. Where a system has an index that
nothing protects, the attacker corrects it: sizes, counts, hashes. Results:

accepted   other rows than were sealed were delivered without an error
refused    the library says that the data are not right
crashed    an error about something else: no wrong rows, but by luck
no effect  the rows are as they were sealed
hung       not done after ten seconds
ran code   code of the attacker was executed
-          the attack does not exist there
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attack_moves import ATTACKS, OURS, Dataset, NotApplicableError
from attack_systems import SYSTEMS, rows_of

HERE = Path(__file__).parent
TRAIN, OLD, OTHER = 0, 20_000, 40_000


class Worker:
    """A process with one library loaded; see ``attack_systems.py``."""

    def __init__(self, name: str, python: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [python, HERE / "attack_systems.py", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def ask(self, **task: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task, default=str) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the system's process ended; run attack_systems.py by hand")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


def judge(answer: dict[str, Any], marked: bool) -> str:
    if marked:
        return "ran code"
    if "rows" in answer:
        return "no effect" if answer["rows"] == rows_of(TRAIN).tolist() else "accepted"
    if "hung" in answer:
        return "hung"
    return "refused" if "refused" in answer else "crashed"


def run_system(name: str, python: Path, base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the versions, then each attack's result."""
    worker = Worker(name, python)
    yield "versions", worker.versions
    keys, strange = base / "keys", base / "stranger-keys"
    sealed = worker.ask(do="seal", root=base / "clean", keys=keys, first=TRAIN)
    if "parts" not in sealed:
        raise RuntimeError(f"{name} could not seal: {sealed}")
    worker.ask(do="seal", root=base / "other", keys=keys, first=OTHER)
    worker.ask(do="seal", root=base / "stranger", keys=strange, first=OTHER)
    shutil.copytree(base / "clean", base / "old")
    if name == OURS:  # an older state of the same dataset, not another one
        shutil.rmtree(base / "clean")
        worker.ask(do="seal", root=base / "old-first", keys=keys, first=OLD)
        shutil.rmtree(base / "old")
        shutil.copytree(base / "old-first", base / "old")
        shutil.copytree(base / "old-first", base / "clean")
        sealed = worker.ask(do="seal", root=base / "clean", keys=keys, first=TRAIN)
    else:
        shutil.rmtree(base / "old")
        worker.ask(do="seal", root=base / "old", keys=keys, first=OLD)
    before = worker.ask(do="read", root=base / "clean", keys=keys)
    if judge(before, marked=False) != "no effect":
        raise RuntimeError(f"{name} does not read what it sealed: {before}")
    plain = plaintext(name, base, worker)
    for attack, do in ATTACKS.items():
        root = base / "attacked" / "dataset"
        shutil.copytree(base / "clean", root)
        stranger = base / "stranger" if attack != "plaintext in place of the dataset" else plain
        pins: dict[str, Any] = {}
        if attack == "the same, with a pin":
            pins = {"min_generation": 4}
        try:
            if stranger is None or (pins and name != OURS):
                raise NotApplicableError
            do(Dataset(name, root, base / "old", base / "other", stranger, sealed["parts"]))
            answer = worker.ask(do="read", root=root, keys=keys, pins=pins)
            outcome = judge(answer, marked=(base / "attacked" / "ran").exists())
            answer.pop("rows", None)
            if "message" in answer:
                answer["message"] = answer["message"].replace(str(base), "...")
            yield attack, {"outcome": outcome, **answer}
        except NotApplicableError:
            yield attack, {"outcome": "-"}
        shutil.rmtree(base / "attacked")
    worker.close()


def plaintext(name: str, base: Path, worker: Worker) -> Path | None:
    """A plaintext dataset that the attacker puts in place of an encrypted one, without any key."""
    if name in ("litdata", "MosaicML MDS"):
        return base / "stranger"  # there is nothing else
    root = base / "plaintext"
    if name == OURS:
        for split in ("train", "val"):
            (root / split).mkdir(parents=True)
            rows_of(OTHER).tofile(root / split / "shard-00000.bin")
        return root
    return Path(worker.ask(do="seal plaintext", root=root, keys=base / "none", first=OTHER)["root"])


def table(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    names = list(results["systems"])
    lines = ["| attack | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for attack in ATTACKS:
        cells = [results["systems"][name]["attacks"][attack]["outcome"] for name in names]
        cells = [f"**{cell}**" if cell in BAD else cell for cell in cells]
        lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


BAD = {"accepted", "ran code", "hung"}


def write_table(results: dict[str, Any], path: Path) -> None:
    """Put the table between the marks in a document."""
    before, after = path.read_text().split(MARK)[::2]
    path.write_text(f"{before}{MARK}\n{table(results)}\n{MARK}{after}")


MARK = "<!-- made by benchmarks/attacks.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path, help="where the table is put between its marks")
    parser.add_argument("--only", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    options = parser.parse_args()
    results: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "systems": {},
    }
    for name in options.only:
        python = Path(sys.executable) if name == OURS else options.peers / "bin" / "python"
        found: dict[str, Any] = {"attacks": {}}
        with tempfile.TemporaryDirectory() as base:
            for attack, result in run_system(name, python, Path(base)):
                if attack == "versions":
                    found["versions"] = result
                else:
                    found["attacks"][attack] = result
        results["systems"][name] = found
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.document:
        write_table(results, options.document)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
