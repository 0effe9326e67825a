"""Statements that a run's processes compare: promise, options, model, optimizer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_secure.compat.lightning import validation_source
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.collective import Collective, answered
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.released.sums import ChargesAccount, PrivateSum
from lightning_secure.util.agreement import Statement, compared

#: How many rows one process runs at once depends on its own memory.
_OF_ONE_PROCESS: Final = frozenset({"max_physical_batch_size"})
#: By these the processes take as many steps, and exchange metrics as often.
_OPTIONS: Final = (
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "reload_dataloaders_every_n_epochs",
    "overfit_batches",
    "fast_dev_run",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "precision",
    "num_nodes",
)
#: When callbacks save or stop, which takes all processes; as far as a callback has them.
_CALLBACK_OPTIONS: Final = (
    "monitor",
    "mode",
    "save_top_k",
    "save_last",
    "save_weights_only",
    "_every_n_train_steps",
    "_every_n_epochs",
    "_train_time_interval",
    "_save_on_train_epoch_end",
    "patience",
    "min_delta",
    "stopping_threshold",
    "_check_on_train_epoch_end",
)
_MOST_NUMBERS: Final = 16


def require_same(collective: Collective, statement: Callable[[], Statement]) -> None:
    """Compare a statement over all processes.

    Args:
        collective: Is asked nothing if it is a single process.
        statement: Returns that of this process.

    Raises:
        UnsupportedTrainerOptionError: if the statements differ.
    """
    if collective.size == 1:
        return
    with collective.together():
        own = statement()
    if found := answered(lambda: compared(own)):
        collective.fail(
            UnsupportedTrainerOptionError(
                f"the processes of this run were not given the same: {'; '.join(found)}. Run "
                "the same script with the same settings in every process. No step was taken."
            )
        )


def run_statement(
    trainer: pl.Trainer, config: DPConfig, public_metrics: Collection[str]
) -> Statement:
    """Return what is run, and under which promise.

    Args:
        trainer: Its options and what it was asked to do.
        config: The promise.
        public_metrics: Names of the metrics that are not withheld.
    """
    stated: dict[str, str | bytes] = {
        "the run": str(trainer.state.fn),
        "ckpt_path": "given" if trainer.ckpt_path else "not given",
    }
    options: Any = trainer
    for name in _OPTIONS:
        stated[f"Trainer({name}=)"] = _plain(getattr(options, name, None))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "insecure_seed":
            stated["DPConfig(insecure_seed=)"] = _hidden(value)
        elif field.name not in _OF_ONE_PROCESS:
            stated[f"DPConfig({field.name}=)"] = str(value)
    stated["public_metrics"] = ", ".join(sorted(public_metrics))
    return {**stated, **_validation_statement(trainer), **_callbacks_statement(trainer)}


def _validation_statement(trainer: pl.Trainer) -> Statement:
    """Return whether a fit validates, and on how many loaders if it was given them."""
    if trainer.state.fn != TrainerFn.FITTING:
        return {}
    source = validation_source(trainer)
    if not trainer.enable_validation:
        return {"validation": "none"}
    if source.is_module():
        return {"validation": f"by {type_name(source.instance)}"}
    loaders = source.instance
    number = len(loaders) if isinstance(loaders, list | tuple | Mapping) else 1
    return {"validation": f"{number} DataLoader{'s' * (number != 1)}"}


def _callbacks_statement(trainer: pl.Trainer) -> Statement:
    """Return which callbacks save checkpoints or stop training, and when."""
    stated: dict[str, str | bytes] = {}
    for kind, callbacks in (
        ("checkpoint", trainer.checkpoint_callbacks),
        ("early stopping", trainer.early_stopping_callbacks),
    ):
        stated[f"the {kind} callbacks"] = ", ".join(map(type_name, callbacks)) or "none"
        for number, callback in enumerate(callbacks):
            for name in _CALLBACK_OPTIONS:
                if hasattr(callback, name):
                    option = f"{name.removeprefix('_')} of {kind} callback {number}"
                    stated[option] = _plain(getattr(callback, name))
    return stated


def loader_statement(loader: DataLoader[Any], *, begins: bool, config: DPConfig) -> Statement:
    """Return how a loader batches rows.

    Args:
        loader: The user's.
        begins: Whether the run's public numbers are yet to be fixed.
        config: May fix them without the loader.
    """
    collate = loader.collate_fn
    name = getattr(collate, "__qualname__", None) or type_name(collate)
    stated: dict[str, str | bytes] = {"DataLoader(collate_fn=)": str(name)}
    if begins and config.expected_batch_size is None:
        stated["DataLoader(batch_size=)"] = str(loader.batch_size)
    return stated


def model_statement(module: nn.Module) -> Statement:
    """Return of which layers, parameters and buffers a model consists, and not their values."""
    stated: dict[str, str | bytes] = {"the module's class": type_name(module)}
    for name, layer in module.named_modules():
        if name:
            stated[f"layer {name!r}"] = type_name(layer)
        if isinstance(layer, ChargesAccount):
            stated[f"metric {name!r}"] = _sums_of(layer)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        trainable = "trainable" if parameter.requires_grad else "frozen"
        stated[f"parameter {name!r}"] = f"{_form(parameter)} {trainable}"
    for name, buffer in module.named_buffers(remove_duplicate=False):
        stated[f"buffer {name!r}"] = _form(buffer)
    stated["the order of the parameters"] = _hidden(list(parameters))
    return stated


def optimizer_statement(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], module: nn.Module
) -> Statement:
    """Return which optimizers and schedules there are, with settings and parameters.

    Args:
        optimizers: Of the run.
        schedulers: The Trainer's configurations of learning rate schedules.
        module: Names the parameters.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    stated: dict[str, str | bytes] = {
        "the optimizer": ", ".join(map(type_name, optimizers)) or "none",
        "the schedule": ", ".join(type_name(item.scheduler) for item in schedulers) or "none",
    }
    for optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            where = f"of the optimizer's parameter group {number}"
            for key, value in group.items():
                if key != "params":
                    stated[f"{key} {where}"] = _plain(value)
            own = [names.get(id(parameter), _form(parameter)) for parameter in group["params"]]
            stated[f"the parameters {where}"] = _hidden(own)
    for item in schedulers:
        for key in ("interval", "frequency", "monitor"):
            stated[f"{key} of the schedule"] = _plain(getattr(item, key, None))
        state = item.scheduler.state_dict() if hasattr(item.scheduler, "state_dict") else {}
        for key, value in state.items():
            stated[f"{key} of the schedule"] = _plain(value)
    return stated


def type_name(value: object) -> str:
    """Return the name of an object's class, with its module."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _form(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return "without a shape yet"
    dtype = str(tensor.dtype).removeprefix("torch.")
    sharded = f" {tensor.placements}" if isinstance(tensor, DTensor) else ""
    return f"{tuple(tensor.shape)} {dtype}{sharded}"


def _sums_of(metric: object) -> str:
    sums = [value for value in vars(metric).values() if isinstance(value, PrivateSum)]
    return "; ".join(
        f"noise_multiplier {item.noise_multiplier}, bounds {item.bounds}, "
        f"public_rows {item.public_rows}"
        for item in sums
    )


def _hidden(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


def _plain(value: Any) -> str:
    """Return a setting as text: of numbers and texts themselves, of other objects the class."""
    if isinstance(value, bool | int | float | str | None):
        return str(value)
    if isinstance(value, Tensor):
        if value.numel() > _MOST_NUMBERS or isinstance(value, DTensor) or is_lazy(value):
            return _form(value)
        return str(value.tolist())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, set | frozenset):  # in an order of its own in each process
        return f"{{{', '.join(sorted(map(_plain, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, torch.dtype | torch.device | timedelta):
        return str(value)
    return type_name(value)
