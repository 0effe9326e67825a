"""Measurements of a training step from outside, which would tell how many rows it drew."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_secure.errors import PrivacyError, UnsupportedTrainerOptionError
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.util.validate import whole_number

log = logging.getLogger(__name__)

_SILENT: Final = PassThroughProfiler()


def require_public_throughput(trainer: pl.Trainer, batch: ExpectedBatch) -> None:
    """Try the functions of each ``ThroughputMonitor`` on the batch that they will be given.

    Args:
        trainer: Its callbacks are looked at.
        batch: What ``on_train_batch_end`` gets in each step.

    Raises:
        UnsupportedTrainerOptionError: if a function fails, or returns no number.
    """
    options: Any = trainer  # its callbacks are set without being declared
    for callback in options.callbacks:
        if isinstance(callback, ThroughputMonitor):
            for name in ("batch_size_fn", "length_fn"):
                if (function := getattr(callback, name)) is not None:
                    _require_number(f"{type(callback).__name__}({name}=)", function, batch)


def _require_number(name: str, function: Callable[[Any], Any], batch: ExpectedBatch) -> None:
    try:
        value = function(batch)
        if whole_number(value) is not None or type(value) is float:
            return
        reason = f"it returned a {type(value).__name__} and no number."
    except PrivacyError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 # whatever it is would end the run after a step
        reason = f"it raised {type(error).__name__}."
    raise UnsupportedTrainerOptionError(
        f"{name} cannot be computed in private training: {reason} Use a function such as lambda "
        f"batch: len(batch[0]), or a constant, such as lambda batch: {len(batch)}. No step was "
        "taken."
    )


@contextmanager
def uncounted(trainer: pl.Trainer) -> Iterator[None]:
    """Keep from the Trainer's profiler what happens once a chunk while a block runs.

    A report with the number of calls would tell how many chunks all steps had, and so about how
    many rows they drew.
    """
    options: Any = trainer  # its profiler is set without being declared
    profiler, options.profiler = options.profiler, _SILENT
    try:
        yield
    finally:
        options.profiler = profiler


def stop_system_metrics() -> None:
    """Stop MLflow's system metrics of this process: memory and load tell how many rows were drawn.

    They are a thread beside the run, which logs past the Trainer's loggers.
    """
    fluent = sys.modules.get("mlflow.tracking.fluent")
    monitors = getattr(fluent, "run_id_to_system_metrics_monitor", {})
    for monitor in list(monitors.values()):
        if monitor._process is not None:
            monitor.finish()
            log.warning(
                "MLflow's system metrics of this process were stopped: memory, load and network "
                "traffic tell how many rows a step drew. Call "
                "mlflow.disable_system_metrics_logging() before the run to be without this notice."
            )
