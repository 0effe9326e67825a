"""The time of redacting: of a step's metrics, and of params beside the peers.

Everything is measured beside what it is compared with, one after the other in turn, in CPU time,
and what counts is the median of the differences or ratios of such neighbours: the machine may be
busy, and redacting waits for nothing.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lightning_secure import Redactor

METRICS: Final = [f"{stage}/{name}" for stage in ("train", "val") for name in "abcde"]


def turns(work: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Return what each piece of work took in each round; every other round goes backward."""
    took: list[list[float]] = [[] for _ in work]
    for number in range(rounds):
        for place in range(len(work))[:: -1 if number % 2 else 1]:
            took[place].append(work[place]())
    return took


def clocked(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def per_pass(work: Callable[[], object]) -> float:
    """Return the seconds of one pass, of as many as take a twentieth of a second."""
    passes, start = 0, time.thread_time()
    while (took := time.thread_time() - start) < 0.05:
        work()
        passes += 1
    return took / passes


@contextmanager
def loggers(store: str) -> Iterator[tuple[Any, Any]]:
    """Yield our logger and Lightning's, for one store: ``sqlite``, ``file`` or ``discard``.

    The last one keeps nothing: what is left is the way to it.
    """
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.store.tracking.file_store import FileStore
    from mlflow.tracking._tracking_service import utils

    from lightning_secure import RedactingMLFlowLogger

    class Discarding(FileStore):
        def log_batch(self, run_id: Any, metrics: Any, params: Any, tags: Any) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        address = {
            "sqlite": f"sqlite:///{folder}/mlflow.db",
            "file": Path(folder, "runs").as_uri(),
            "discard": f"discard://{folder}/runs",
        }[store]
        # MLflow does not type these two.
        kept = Discarding(f"{folder}/runs")  # type: ignore[no-untyped-call]
        utils._tracking_store_registry.register("discard", lambda **_: kept)  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            both = (
                RedactingMLFlowLogger("runs", tracking_uri=address),
                MLFlowLogger("runs", tracking_uri=address),
            )
            yield both


def metrics_overhead(
    rounds: int, stores: Sequence[str] = ("sqlite", "file", "discard")
) -> dict[str, dict[str, float]]:
    """Return what redaction adds to ``log_metrics`` of ten metrics, in microseconds, by store."""
    from lightning_secure.redaction.mlflow_store.guard import call_inside

    found = {}
    for store in stores:
        with loggers(store) as (ours, plain):
            step = 0

            def metrics() -> tuple[dict[str, float], int]:
                nonlocal step
                step += 1
                return dict.fromkeys(METRICS, step / 3), step

            def redacted() -> float:
                given = metrics()
                return clocked(lambda: ours.log_metrics(*given))

            def without() -> float:
                # As if it were inside of MLflow, where the store does not redact once more.
                given = metrics()
                return clocked(lambda: call_inside(plain.log_metrics, *given))

            turns((redacted, without), 10)  # names are new only once
            first, second = turns((redacted, without), rounds)
            added = [(a - b) * 1e6 for a, b in zip(first, second, strict=True)]
            found[store] = {
                "with_us": round(statistics.median(first) * 1e6, 1),
                "without_us": round(statistics.median(second) * 1e6, 1),
                "overhead_p50_us": round(statistics.median(added), 1),
            }
    return found


def texts_speed(
    texts: list[str], peers: dict[str, Callable[[list[str]], float]], rounds: int
) -> dict[str, Any]:
    """Return how fast we and the peers go through texts; before a pass nothing is remembered."""

    def once() -> None:
        redactor = Redactor()
        for text in texts:
            redactor.redact_text(text)

    def ours() -> float:
        return per_pass(once)

    size = sum(len(text.encode()) for text in texts)
    own, *others = turns(
        [ours, *(lambda ask=ask: ask(texts) for ask in peers.values())],
        rounds,
    )
    speed: dict[str, Any] = {
        "texts": len(texts),
        "bytes": size,
        "lightning_secure": {"MB_per_s": round(size / statistics.median(own) / 1e6, 2)},
    }
    for name, took in zip(peers, others, strict=True):
        ratio = statistics.median(b / a for a, b in zip(own, took, strict=True))
        speed[name] = {
            "MB_per_s": round(size / statistics.median(took) / 1e6, 3),
            "we_are_faster": round(ratio, 1),
        }
    return speed
