"""Measure the detectors: what they find, what they take by mistake, and how fast.

    make redaction-peers                        # once: the peers, in an environment of their own
    python benchmarks/redaction.py [--quick] [--json benchmarks/results/redaction.json]

Recall and precision do not depend on the machine: everything is drawn from a seed. Speed does, so
peers and we go through the same texts on the same machine, and the ratio is what counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from redaction_data import (
    Case,
    configuration_names,
    filled,
    harmless,
    parameters,
    personal,
    secrets,
)

from lightning_secure import Redactor
from lightning_secure.redaction.detectors import (
    AssignmentDetector,
    KeyNameDetector,
    PersonalDataDetector,
    SecretDetector,
)

SEED: Final = 20261124
Spans = list[tuple[int, int]]
TARGETS: Final = {
    "e-mail": 0.98, "ssn": 0.98, "iban": 0.98, "ip": 0.98, "card": 0.98, "phone": 0.90,
}  # fmt: skip


def ours() -> Callable[[str], Spans]:
    detectors = (SecretDetector(), AssignmentDetector(), PersonalDataDetector())
    return lambda text: [(f.start, f.end) for d in detectors for f in d.find(text)]


def covered(spans: Spans, start: int, end: int) -> bool:
    """Return whether the spans hide everything from ``start`` to ``end``."""
    for first, last in sorted(spans):
        if first <= start < last:
            start = last
    return start >= end


def recall(cases: Sequence[Case], found: Sequence[Spans]) -> dict[str, dict[str, float]]:
    hits: dict[str, list[bool]] = defaultdict(list)
    for case, spans in zip(cases, found, strict=True):
        hits[case.kind].append(covered(spans, case.start, case.end))
    return {
        kind: {"found": sum(of), "of": len(of), "recall": round(sum(of) / len(of), 4)}
        for kind, of in hits.items()
    }


def precision(expected: Iterable[Sequence[Case]], found: Sequence[Spans]) -> dict[str, float]:
    """Return how many of the findings lie on something that was put there."""
    right = wrong = 0
    for cases, spans in zip(expected, found, strict=True):
        for start, end in spans:
            good = any(start < case.end and case.start < end for case in cases)
            right, wrong = right + good, wrong + (not good)
    return {"right": right, "wrong": wrong, "precision": round(right / max(1, right + wrong), 4)}


def templates(peers: Path) -> list[str] | None:
    """Return the templates of presidio-evaluator, from the peers' environment."""
    path = "presidio_evaluator/data_generator/raw_data/templates.txt"
    for folder in peers.glob("lib/python3*/site-packages"):
        if (folder / path).exists():
            return (folder / path).read_text(encoding="utf-8").splitlines()
    return None


def seconds(work: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def metrics_overhead(rounds: int) -> dict[str, float]:
    """Return what redacting ten metrics of a step takes, in microseconds."""
    redactor = Redactor()
    names = [f"{stage}/{name}" for stage in ("train", "val") for name in "abcde"]
    took = []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        redactor.redact(dict.fromkeys(names, 0.5))
        took.append((time.perf_counter_ns() - start) / 1000)
    return {"p50_us": round(statistics.median(took), 1), "max_us": round(max(took), 1)}


def ask_peers(peers: Path, texts: list[str], throughput: list[str]) -> dict[str, Any]:
    python = peers / "bin" / "python"
    if not python.exists():
        return {}
    script = Path(__file__).with_name("redaction_peers.py")
    done = subprocess.run(
        [python, script],
        input=json.dumps({"texts": texts, "throughput": throughput}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(quick: bool, peers: Path) -> dict[str, Any]:
    each = 20 if quick else 100
    find = ours()
    people = list(personal(each, SEED))
    hidden = list(secrets(5 if quick else 20, SEED))
    plain = harmless(1500, SEED)
    shaped = [
        pair
        for lap in range(1 if quick else 10)
        for pair in filled(templates(peers) or [], SEED + lap)
    ]
    texts = [[c.text for c in people], [c.text for c in hidden], plain, [t for t, _ in shaped]]
    known = {"lightning_secure": [[find(text) for text in part] for part in texts]}
    logged = parameters()
    speed: dict[str, Any] = {}
    answers = ask_peers(peers, [text for part in texts for text in part], logged)
    size = sum(len(text.encode()) for text in logged)
    redactor = Redactor()
    own = seconds(lambda: [redactor.redact_text(text) for text in logged], 9)
    speed["lightning_secure"] = {"MB_per_s": round(size / own / 1e6, 2)}
    for name, answer in answers.items():
        if "failed" in answer:
            speed[name] = answer
            continue
        rest, parts = answer["spans"], []
        for part in texts:
            parts.append([[(a, b) for a, b in spans] for spans in rest[: len(part)]])
            rest = rest[len(part) :]
        known[name] = parts
        speed[name] = {
            "version": answer["version"],
            "MB_per_s": round(size / answer["seconds"] / 1e6, 3),
            "we_are_faster": round(answer["seconds"] / own, 1),
        }
    systems = {}
    for name, (of_people, of_hidden, of_plain, of_shaped) in known.items():
        systems[name] = {
            "personal": recall(people, of_people),
            "personal_precision": precision([[case] for case in people], of_people),
            "secrets": recall([case._replace(kind="all formats") for case in hidden], of_hidden),
            "harmless_sentences_hit": sum(bool(spans) for spans in of_plain),
        }
        if shaped:
            cases = [case for _, found in shaped for case in found]
            spans = [s for (_, found), s in zip(shaped, of_shaped, strict=True) for _ in found]
            systems[name]["templates"] = recall(cases, spans)
            systems[name]["templates_precision"] = precision(
                [found for _, found in shaped], of_shaped
            )
        if name == "lightning_secure":
            by_format = recall(hidden, of_hidden)
            systems[name]["harmless_sentences_hit_as_secrets"] = sum(
                any(True for d in (SecretDetector(), AssignmentDetector()) for _ in d.find(text))
                for text in plain
            )
            systems[name]["formats_missed"] = [k for k, v in by_format.items() if v["recall"] < 1]
    names = configuration_names()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "seed": SEED,
        "versions": {
            p: version(p) for p in ("faker", "transformers", "phonenumbers", "google-re2")
        },
        "systems": systems,
        "key_names": {
            "names": len(names),
            "hits": [name for name in names if KeyNameDetector().matches(name)],
            "found": [
                name
                for name in ("hub_token", "api_key", "db_password", "aws_secret_access_key")
                if KeyNameDetector().matches(name)
            ],
        },
        "speed": {
            "params": speed,
            "params_bytes": size,
            "log_metrics_of_ten": metrics_overhead(200 if quick else 5000),
        },
    }


def missed_targets(result: dict[str, Any]) -> list[str]:
    us = result["systems"]["lightning_secure"]
    missed = [f"{k} < {t}" for k, t in TARGETS.items() if us["personal"][k]["recall"] < t]
    if us["secrets"]["all formats"]["recall"] < 0.98:
        missed.append("secrets < 0.98")
    if us["harmless_sentences_hit_as_secrets"]:
        missed.append("harmless sentences were hit")
    if set(result["key_names"]["hits"]) - {"hub_token"} or len(result["key_names"]["found"]) < 4:
        missed.append("key names")
    if result["speed"]["params"]["lightning_secure"]["MB_per_s"] < 20:
        missed.append("params < 20 MB/s")
    if result["speed"]["log_metrics_of_ten"]["p50_us"] > 50:
        missed.append("log_metrics > 50 us")
    return missed


def show(result: dict[str, Any]) -> None:
    for name, of in result["systems"].items():
        print(name)
        for part in ("personal", "secrets", "templates"):
            for kind, figures in of.get(part, {}).items():
                print(f"  {part:10} {kind:18} {figures['recall']:.4f}  of {figures['of']}")
        for part in ("personal_precision", "templates_precision"):
            if part in of:
                print(f"  {part:29} {of[part]['precision']:.4f}  {of[part]['wrong']} wrong")
        print(f"  harmless sentences hit: {of['harmless_sentences_hit']} of 1500", end="")
        secret = of.get("harmless_sentences_hit_as_secrets")
        print("" if secret is None else f", {secret} of them as secrets")
    print("key names:", json.dumps(result["key_names"]))
    print("speed:", json.dumps(result["speed"], indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="a fifth of the values")
    parser.add_argument("--peers", type=Path, default=Path(".venv-redaction-peers"))
    arguments = parser.parse_args()
    result = measure(arguments.quick, arguments.peers)
    show(result)
    if "presidio" not in result["systems"]:
        print("peers and templates left out: make redaction-peers")
    missed = missed_targets(result)
    print("targets missed:", ", ".join(missed) or "none")
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "missed": missed}, indent=1) + "\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
