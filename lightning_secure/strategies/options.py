"""The Trainer's options under the privacy promise, and the refusal of those that break it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PyTorchProfiler
from torch.optim import LBFGS, Optimizer

from lightning_secure.errors import (
    ConfigError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.ledger import Ledger, attach_journal
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.run_contract import require_same_promise

_JOURNALS: Final = "privacy_journal"
_INSTEAD_OF_ACCUMULATION: Final = (
    "Use a larger DPConfig(expected_batch_size=); what does not fit into memory is split by "
    "DPConfig(max_physical_batch_size=)."
)


def require_trainer_options(
    trainer: pl.Trainer, module: pl.LightningModule, precision: Precision, config: DPConfig
) -> None:
    """Refuse what would break the promise.

    Args:
        trainer: Its options and callbacks are looked at.
        module: The module to train.
        precision: What Lightning computes with.
        config: The privacy configuration.

    Raises:
        UnsupportedTrainerOptionError: if an option would break the promise; the message names the
            option and what to use instead.
        UnsupportedModelError: if the module optimises by hand.
    """
    require_no_accumulation(trainer)
    options: Any = trainer  # many of them are set without being declared
    overfit, profiler = options.overfit_batches, options.profiler
    refused: list[tuple[bool, str]] = [
        (
            bool(trainer.gradient_clip_val),
            f"gradient_clip_val={trainer.gradient_clip_val} clips the sum over the batch, which "
            "bounds no single row. Use DPConfig(max_grad_norm=).",
        ),
        *_refused_callbacks(options.callbacks),
        (
            bool(options.fast_dev_run)
            and config.target_epsilon is not None
            and config.planned_epochs is None,
            "fast_dev_run takes real steps, and target_epsilon would be spread over those few: "
            "their noise would be too small for any run after it. Set DPConfig(planned_epochs=), "
            "or DPConfig(noise_multiplier=) instead of target_epsilon.",
        ),
        (
            isinstance(profiler, PyTorchProfiler) and _records_sizes(profiler),
            "PyTorchProfiler with record_shapes or profile_memory writes into its trace how "
            "many rows each step has drawn. Use it without them, and keep the trace to yourself.",
        ),
        (
            bool(options._detect_anomaly),
            "detect_anomaly=True ends the run at a row whose gradient is not a number, so that one "
            "row decides how long all others are trained on. Such a row is left out without it; "
            "look for the cause in a run on public data.",
        ),
        (
            bool(overfit),
            f"overfit_batches={overfit} trains on a few rows again and again, and "
            "the rate at which rows are drawn would be wrong. Use a smaller dataset.",
        ),
        (
            not _exact_precision(precision),
            f"precision plugin {type(precision).__name__} scales gradients by what it sees in "
            "them, and skips steps by it, or is unknown. Use '32-true', 'bf16-mixed', 'bf16-true' "
            "or '64-true'; or '16-mixed' with a scale that never changes, DPConfig(loss_scale=).",
        ),
    ]
    for wrong, reason in refused:
        if wrong:
            raise UnsupportedTrainerOptionError(f"{reason} No step was taken.")
    if not module.automatic_optimization:
        raise UnsupportedModelError(
            "the module optimises by hand (automatic_optimization=False), so its steps cannot be "
            "accounted for. Use automatic optimisation. No step was taken."
        )


def require_no_accumulation(trainer: pl.Trainer) -> None:
    """Refuse that several draws become one step, also if a callback makes them so later.

    Raises:
        UnsupportedTrainerOptionError: if several draws would become one step.
    """
    if trainer.accumulate_grad_batches != 1:
        raise UnsupportedTrainerOptionError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would make several draws "
            f"one step. {_INSTEAD_OF_ACCUMULATION} No step was taken."
        )


def _refused_callbacks(callbacks: Sequence[pl.Callback]) -> Iterator[tuple[bool, str]]:
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, GradientAccumulationScheduler):
            yield (
                callback.going_to_accumulate_grad_batches(),
                f"{name} would make several draws one step. {_INSTEAD_OF_ACCUMULATION}",
            )
        elif isinstance(callback, LearningRateFinder | BatchSizeFinder):
            yield (
                True,
                f"{name}, also as Tuner uses it, takes steps whose losses it looks at without "
                "noise, and throws their account away with their weights. Try values in private "
                "runs and compare them on validation data that is none of the rows.",
            )
        elif isinstance(callback, DeviceStatsMonitor):
            yield (
                True,
                f"{name} logs the memory of each step, which tells how many rows it has drawn. "
                "Measure a run on public data, or without a logger.",
            )
        elif isinstance(callback, SpikeDetection):
            yield (
                True,
                f"{name} decides by the training loss, which is computed without noise and is not "
                "handed out. Clipping bounds what one row can do; use DPConfig(max_grad_norm=).",
            )


def _records_sizes(profiler: PyTorchProfiler) -> bool:
    options = profiler._profiler_kwargs
    return bool(options.get("record_shapes") or options.get("profile_memory"))


def require_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse several optimizers, none, and those that look at the loss more than once a step.

    Raises:
        UnsupportedTrainerOptionError: if there are several, none, or such a one; the message says
            which.
    """
    found = [o for o in optimizers if not isinstance(o, _MockOptimizer)]
    if len(found) != 1:
        raise UnsupportedTrainerOptionError(
            f"configure_optimizers returned {len(found)} optimizers, and private training "
            "takes exactly one, over parameter groups if need be. No step was taken."
        )
    if isinstance(found[0], LBFGS):
        raise UnsupportedTrainerOptionError(
            "LBFGS evaluates the loss several times a step, and each evaluation is a release of "
            "its own. Use SGD or Adam. No step was taken."
        )


def fixed_scale(precision: Precision, config: DPConfig) -> Precision:
    """Return what to compute with: for 16-mixed with a ``loss_scale``, a copy without a scaler.

    Lightning's scaler changes its scale, and skips steps, by what it sees in the gradients.
    """
    if type(precision) is MixedPrecision and config.loss_scale is not None:
        precision = copy.copy(precision)
        precision.scaler = None
    return precision


def _exact_precision(precision: Precision) -> bool:
    if type(precision) is MixedPrecision:
        return precision.scaler is None
    if type(precision) is HalfPrecision:
        return precision.precision == "bf16-true"
    return type(precision) in (Precision, DoublePrecision)


def planned_steps(trainer: pl.Trainer, config: DPConfig, steps_per_epoch: int) -> int:
    """Return the steps that the budget must last for.

    Args:
        trainer: Says for how long it will train.
        config: May say that the run is to be continued later.
        steps_per_epoch: Draws an epoch.

    Raises:
        ConfigError: if neither the configuration nor the Trainer says how many steps there are.
    """
    if config.planned_epochs is not None:
        return config.planned_epochs * steps_per_epoch
    limit = trainer.limit_train_batches
    per_epoch = (
        min(limit, steps_per_epoch) if isinstance(limit, int) else int(steps_per_epoch * limit)
    )
    epochs = trainer.max_epochs
    by_epochs = epochs * per_epoch if epochs is not None and epochs >= 0 else None
    by_steps = trainer.max_steps if trainer.max_steps >= 0 else None
    bounds = [steps for steps in (by_epochs, by_steps) if steps]
    if not bounds:
        raise ConfigError(
            "target_epsilon, or the noise of mechanism='banded', is to be spread over the run, and "
            "the Trainer has neither max_epochs nor max_steps. Set one, or "
            "DPConfig(planned_epochs=), or DPConfig(noise_multiplier=) for mechanism='poisson'."
        )
    return min(bounds)


def carry_ledger(
    trainer: pl.Trainer, ledger: Ledger, config: DPConfig, journal: str | Path | None
) -> None:
    """Let a run's journal cover the account of its weights.

    Args:
        trainer: In whose ``default_root_dir`` journals lie by default.
        ledger: A new one, or the one that the run goes on with.
        config: The present configuration, which must be the one that the run was begun with.
        journal: The directory that the user wants instead.

    Raises:
        ConfigError: if the directory is not on a local file system, where it can be locked and
            flushed.
        LedgerError: if the promise is another one, or the journal does not allow the run to go on;
            see :func:`~lightning_secure.privacy.accounting.ledger.attach_journal`.
    """
    require_same_promise(config, ledger)
    directory = str(journal) if journal is not None else f"{trainer.default_root_dir}/{_JOURNALS}"
    if "://" in directory:
        raise ConfigError(
            f"the privacy journal must be flushed and locked, which {directory!r} cannot be. Give "
            "a local directory that is kept with the checkpoints, PrivateStrategy(journal=...). No "
            "step was taken."
        )
    attach_journal(ledger, Path(directory))
