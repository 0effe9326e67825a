"""Measure the detectors: what they find, what they take by mistake, and how fast.

    make bench-redaction ARGS="[--quick] [--json benchmarks/results/redaction.json]"

Recall and precision do not depend on the machine: everything is drawn from a seed. Speed does, so
peers and we go through the same texts on the same machine in turn, and the ratio is what counts.
The exit code is 1 if a target of detection is missed; one of speed that is missed is only said.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

from loading.machine import commit, describe_machine
from redaction_data import (
    Case,
    configuration_names,
    filled,
    harmless,
    parameters,
    personal,
    secrets,
    short_parameters,
)
from redaction_speed import metrics_overhead, texts_speed

from lightning_secure.redaction.detect.detectors import AssignmentDetector, SecretDetector
from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.detect.secret_names import KeyNameDetector

SEED: Final = 20261124
OURS: Final = "lightning_secure"
Spans = Sequence[tuple[int, int, str]]
#: Our rules of personal data, and what the benchmark calls what they find; secrets are the others.
KINDS: Final = {
    "e-mail": "e-mail", "ip-address": "ip", "card": "card", "iban": "iban", "us-ssn": "ssn",
    "phone": "phone",
}  # fmt: skip
RECALL: Final = {
    "e-mail": 0.98, "ssn": 0.98, "iban": 0.98, "ip": 0.98, "card": 0.98, "phone": 0.90,
}  # fmt: skip
NAMES_OF_SECRETS: Final = ("hub_token", "api_key", "db_password", "aws_secret_access_key")


def ours() -> Callable[[str], Spans]:
    hidden, people = (SecretDetector(), AssignmentDetector()), PersonalDataDetector()
    return lambda text: [
        *((f.start, f.end, "secret") for detector in hidden for f in detector.find(text)),
        *((f.start, f.end, KINDS.get(f.rule, "national number")) for f in people.find(text)),
    ]


def covered(spans: Spans, start: int, end: int) -> bool:
    """Return whether the spans hide everything from ``start`` to ``end``."""
    for first, last, _ in sorted(spans):
        if first <= start < last:
            start = last
    return start >= end


def by_kind(texts: Sequence[Sequence[Case]], found: Sequence[Spans]) -> dict[str, dict[str, Any]]:
    """Return recall and precision for every kind.

    Args:
        texts: What stands in each text.
        found: What a system found in each.

    Recall: how many of what stands there the findings hide, of whatever kind they are said to be.
    Precision: how many of the findings of a kind lie on something of that kind; None if there are
    no findings.
    """
    hits: dict[str, list[bool]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    for cases, spans in zip(texts, found, strict=True):
        for case in cases:
            hits[case.kind].append(covered(spans, case.start, case.end))
        for start, end, kind in spans:
            right[kind].append(
                any(
                    start < case.end and case.start < end and case.kind.split(",")[0] == kind
                    for case in cases
                )
            )
    return {
        kind: {
            "found": sum(hits[kind]),
            "of": len(hits[kind]),
            "recall": round(sum(hits[kind]) / len(hits[kind]), 4) if hits[kind] else None,
            "findings": len(right[kind]),
            "wrong": right[kind].count(False),
            "precision": round(sum(right[kind]) / len(right[kind]), 4) if right[kind] else None,
        }
        for kind in [*hits, *(kind for kind in right if kind not in hits)]
    }


def templates(peers: Path) -> list[str] | None:
    """Return the templates of presidio-evaluator, from the peers' environment."""
    path = "presidio_evaluator/data_generator/raw_data/templates.txt"
    for folder in peers.glob("lib/python3*/site-packages"):
        if (folder / path).exists():
            return (folder / path).read_text(encoding="utf-8").splitlines()
    return None


class Peers:
    """A process in the peers' environment."""

    def __init__(self, environment: Path, stack: ExitStack) -> None:
        self._process: subprocess.Popen[str] = stack.enter_context(
            subprocess.Popen(
                [environment / "bin" / "python", Path(__file__).with_name("redaction_peers.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    def ask(self, **what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def time(self, name: str) -> Callable[[list[str]], float]:
        return lambda texts: float(self.ask(time=name, texts=texts)["seconds"])


def measure(quick: bool, environment: Path) -> dict[str, Any]:
    find = ours()
    people = list(personal(20 if quick else 100, SEED))
    hidden = list(secrets(5 if quick else 20, SEED))
    plain = harmless(1500, SEED)
    shaped = [
        pair
        for lap in range(1 if quick else 10)
        for pair in filled(templates(environment) or [], SEED + lap)
    ]
    parts = [[c.text for c in people], [c.text for c in hidden], plain, [t for t, _ in shaped]]
    with ExitStack() as stack:
        peers = Peers(environment, stack) if (environment / "bin" / "python").exists() else None
        answers = peers.ask(find=[text for part in parts for text in part]) if peers else {}
        running = {
            name: peers.time(name)
            for name, answer in answers.items()
            if peers and "spans" in answer
        }
        rounds = 3 if quick else 9
        params = {
            "long": texts_speed(parameters(), running, rounds),
            "short": texts_speed(short_parameters(), running, rounds),
        }
    known: dict[str, list[list[Spans]]] = {OURS: [[find(text) for text in p] for p in parts]}
    for name in running:
        rest = answers[name]["spans"]
        known[name] = []
        for part in parts:
            known[name].append(rest[: len(part)])
            rest = rest[len(part) :]
    names = configuration_names()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(Path(__file__).parent),
        "machine": describe_machine(),
        "seed": SEED,
        "quick": quick,
        "versions": {
            **{p: version(p) for p in ("faker", "transformers", "phonenumbers", "google-re2")},
            **{name: answers[name]["version"] for name in running},
        },
        "failed": {name: a["failed"] for name, a in answers.items() if "failed" in a},
        "systems": {
            name: figures(people, hidden, plain, shaped, found) for name, found in known.items()
        },
        "key_names": {
            "names": len(names),
            "hits": [name for name in names if KeyNameDetector().matches(name)],
            "found": [name for name in NAMES_OF_SECRETS if KeyNameDetector().matches(name)],
        },
        "speed": {
            "params": params,
            "log_metrics_of_ten": metrics_overhead(60 if quick else 2000),
        },
    }


def figures(
    people: Sequence[Case],
    hidden: Sequence[Case],
    plain: Sequence[str],
    shaped: Sequence[tuple[str, list[Case]]],
    found: Sequence[Sequence[Spans]],
) -> dict[str, Any]:
    """Return what one system found in the four kinds of texts."""
    of_people, of_hidden, of_plain, of_shaped = found
    nothing: list[list[Case]] = [[] for _ in plain]
    personal_data = by_kind([*([case] for case in people), *nothing], [*of_people, *of_plain])
    said = by_kind(
        [*([case._replace(kind="secret")] for case in hidden), *nothing], [*of_hidden, *of_plain]
    )
    formats = by_kind([[case] for case in hidden], of_hidden)
    answer = {
        "personal": {kind: of for kind, of in personal_data.items() if kind != "secret"},
        "secrets": {"secret": said["secret"]},
        "formats_missed": [k for k, of in formats.items() if of["of"] and of["recall"] < 1],
        "harmless": {
            "lines": len(plain),
            "hit": sum(map(bool, of_plain)),
            "hit_as_secret": sum(any(kind == "secret" for *_, kind in s) for s in of_plain),
        },
    }
    if shaped:
        answer["templates"] = by_kind([cases for _, cases in shaped], of_shaped)
    return answer


class Target(NamedTuple):
    """The content that is asked for, and the findings."""

    what: str
    asked: str
    seen: str
    reached: bool
    detection: bool


def targets(result: dict[str, Any]) -> list[Target]:
    """Return all targets beside what was seen."""
    us, speed, names = result["systems"][OURS], result["speed"], result["key_names"]
    found = us["secrets"]["secret"]["recall"]
    hit = us["harmless"]["hit_as_secret"]
    # A setting of TrainingArguments that is a secret.
    wrong = sorted(set(names["hits"]) - {"hub_token"})
    rows = [
        Target("secrets by format: recall", ">= 0.98", f"{found:.4f}", found >= 0.98, True),
        Target("the same in 1,500 harmless lines: hits", "0", str(hit), hit == 0, True),
    ]
    for kind, least in RECALL.items():
        seen = us["personal"][kind]["recall"]
        rows.append(
            Target(f"{kind}: recall", f">= {least:.2f}", f"{seen:.4f}", seen >= least, True)
        )
    rows += [
        Target("transformers' settings taken for secrets", "0", str(len(wrong)), not wrong, True),
        Target(
            "names of secrets that are found",
            str(len(NAMES_OF_SECRETS)),
            str(len(names["found"])),
            len(names["found"]) == len(NAMES_OF_SECRETS),
            True,
        ),
    ]
    for store in ("sqlite", "file"):
        added = speed["log_metrics_of_ten"][store]["overhead_p50_us"]
        what = f"log_metrics of ten, {store}: added, p50"
        rows.append(Target(what, "<= 50 us", f"{added:.0f} us", added <= 50, False))
    for length, of in speed["params"].items():
        fast = of[OURS]["MB_per_s"]
        what = f"params, {length} texts ({of['bytes'] / of['texts']:.0f} bytes)"
        rows.append(Target(what, ">= 20 MB/s", f"{fast:.1f} MB/s", fast >= 20, False))
    return rows


def show(result: dict[str, Any]) -> None:
    for name, of in result["systems"].items():
        print(f"{name:26} recall            precision")
        for part in ("personal", "secrets", "templates"):
            for kind, f in of.get(part, {}).items():
                recall = "-" if f["recall"] is None else f"{f['recall']:.4f}"
                precision = "-" if f["precision"] is None else f"{f['precision']:.4f}"
                print(
                    f"  {part:9} {kind:17}{recall:>7} of {f['of']:<5}"
                    f"{precision:>7} ({f['wrong']} of {f['findings']} wrong)"
                )
        of = of["harmless"]
        print(
            f"  of {of['lines']} harmless lines: {of['hit']} hit, {of['hit_as_secret']} as secrets"
        )
    for name, reason in result["failed"].items():
        print(f"{name} did not run: {reason}")
    for length, speed in result["speed"]["params"].items():
        print(f"params, {length} ({speed['texts']} texts, {speed['bytes']} bytes):")
        for name in result["systems"]:
            faster = speed[name].get("we_are_faster")
            print(f"  {name:17}{speed[name]['MB_per_s']:8.2f} MB/s", end="")
            print("" if faster is None else f"   we are {faster} times as fast")
    print("log_metrics of ten metrics, medians in us:")
    for store, of in result["speed"]["log_metrics_of_ten"].items():
        print(f"  {store:17}{of['overhead_p50_us']:8.1f} added to {of['without_us']:.1f}")
    print(f"{'target':44}{'asked':>12}{'seen':>12}")
    for target in targets(result):
        print(f"{target.what:44}{target.asked:>12}{target.seen:>12}", end="")
        print("" if target.reached else "   MISSED")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="less of everything, under a minute")
    parser.add_argument("--peers", type=Path, default=Path(".venv-redaction-peers"))
    arguments = parser.parse_args(given)
    result = measure(arguments.quick, arguments.peers)
    show(result)
    if len(result["systems"]) == 1:
        print("without peers, and without the templates of one of them: make redaction-peers")
    missed = [target for target in targets(result) if not target.reached]
    if arguments.json:
        written = {**result, "missed": [target.what for target in missed]}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(target.detection for target in missed))


if __name__ == "__main__":
    sys.exit(main())
