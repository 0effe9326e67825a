"""Private attributes of Lightning's."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

_BEFORE_TRANSFER = "_on_before_batch_transfer"


def before_batch_transfer(module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Run the module's ``on_before_batch_transfer``, or its datamodule's."""
    return pl.LightningModule._on_before_batch_transfer(module, batch, dataloader_idx)


def has_before_transfer_hook(trainer: pl.Trainer) -> bool:
    """Return whether the module or its datamodule overrides ``on_before_batch_transfer``."""
    selector: Any = trainer._data_connector._datahook_selector
    return is_overridden(
        "on_before_batch_transfer", selector.get_instance("on_before_batch_transfer")
    )


def exchange_before_transfer(module: pl.LightningModule, hook: Callable[..., Any]) -> None:
    """Have Lightning call ``hook(module, batch, dataloader_idx)`` in place of the module's own."""
    vars(module)[_BEFORE_TRANSFER] = partial(hook, module)


def restore_before_transfer(module: pl.LightningModule) -> None:
    """Undo :func:`exchange_before_transfer`."""
    vars(module).pop(_BEFORE_TRANSFER, None)


def exchange_epoch_results(trainer: pl.Trainer, results: Any) -> None:
    """Have the training epoch collect what is logged in ``results``."""
    trainer.fit_loop.epoch_loop._results = results


def training_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the training DataLoaders as they are iterated over; none before there are any."""
    combined: Any = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def validation_source(trainer: pl.Trainer) -> Any:
    """Return what a fit takes its validation DataLoaders from."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def checkpoint_content(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what a checkpoint would hold if it were written now."""
    return trainer._checkpoint_connector.dump_checkpoint(False)


def bare_optimizer(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    """Return the optimizer without Lightning's wrapper.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> bare_optimizer(LightningOptimizer(optimizer)) is optimizer
    True
    """
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def leave_processes_apart(trainer: pl.Trainer) -> None:
    """Leave training loaders as the user made them, and exchange nothing when a signal arrives.

    Otherwise Lightning replaces the user's sampler by one of its own, and its handler of SIGTERM
    waits for a broadcast in the middle of another exchange.
    """
    connector, signals = trainer._data_connector, trainer._signal_connector
    vars(connector)["_prepare_dataloader"] = partial(_as_it_is, connector)
    vars(signals)["_sigterm_notifier_fn"] = partial(_note_sigterm, signals)


def bring_processes_together(module: pl.LightningModule) -> None:
    """Undo :func:`leave_processes_apart`."""
    trainer = module._trainer
    if trainer is not None:
        vars(trainer._data_connector).pop("_prepare_dataloader", None)
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)


def _as_it_is(
    connector: _DataConnector, dataloader: object, shuffle: bool, mode: RunningStage
) -> object:
    if mode == RunningStage.TRAINING:
        return dataloader
    return _DataConnector._prepare_dataloader(connector, dataloader, shuffle, mode)


def _note_sigterm(signals: _SignalConnector, number: int, frame: FrameType | None) -> None:
    launcher = signals.trainer.strategy.launcher
    if not signals.received_sigterm and launcher is not None:
        launcher.kill(signal.Signals(number))
    signals.received_sigterm = True
