"""Strategies that ask their CheckpointIO, and those that write and read checkpoints themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_secure.errors import ConfigError

_Asks = Callable[[Any], bool]

#: By the class whose method it is; what is not here does not ask, unless it says so itself.
_WRITING: Final[Mapping[type, _Asks]] = {
    Strategy: lambda _: True,
    XLAStrategy: lambda _: True,
    FSDPStrategy: lambda fsdp: getattr(fsdp, "_state_dict_type", None) == "full",
    ModelParallelStrategy: lambda parallel: (
        getattr(parallel, "_save_distributed_checkpoint", None) is False
    ),
}
_READING: Final[Mapping[type, _Asks]] = {Strategy: lambda _: True}
_INSTEAD: Final[Mapping[type, str]] = {
    FSDPStrategy: (
        'FSDPStrategy(state_dict_type="full") writes through it, for load_encrypted_checkpoint '
        'and not for ckpt_path; "private_fsdp" writes and reads through it.'
    ),
    ModelParallelStrategy: (
        "ModelParallelStrategy(save_distributed_checkpoint=False) writes through it, for "
        'load_encrypted_checkpoint and not for ckpt_path; "private_fsdp" writes and reads through '
        "it."
    ),
    DeepSpeedStrategy: '"ddp" and "private_fsdp" write and read through it.',
}
_DECLARED: Final = "asks_checkpoint_io"
_BY_ITSELF: Final = (
    f"If it hands every checkpoint to its checkpoint_io, say {_DECLARED} = True in the class that "
    "defines {method}."
)


def require_asked_to_write(strategy: Strategy, checkpoint_io: CheckpointIO) -> None:
    """Refuse a strategy that writes checkpoints itself.

    Args:
        strategy: Whose ``save_checkpoint`` the Trainer calls.
        checkpoint_io: Which would have to be asked.

    Raises:
        ConfigError: if the strategy is Lightning's and known to write checkpoints itself, or has a
            ``save_checkpoint`` of its own whose class does not say ``asks_checkpoint_io``.
    """
    if _asks(strategy, "save_checkpoint", _WRITING):
        return
    raise ConfigError(
        f"{type(strategy).__name__} writes checkpoints itself and does not ask "
        f"{type(checkpoint_io).__name__}: weights and hyperparameters would be in them as they "
        f"are. Nothing was written. {_instead(strategy, 'save_checkpoint')}"
    )


def require_asked_to_read(strategy: Strategy, checkpoint_io: CheckpointIO) -> None:
    """Refuse a checkpoint that a strategy has read itself.

    Args:
        strategy: Whose ``load_checkpoint`` the Trainer has called.
        checkpoint_io: Which would have had to be asked.

    Raises:
        ConfigError: if the strategy is Lightning's and known to read checkpoints itself, or has a
            ``load_checkpoint`` of its own whose class does not say ``asks_checkpoint_io``.
    """
    if _asks(strategy, "load_checkpoint", _READING):
        return
    raise ConfigError(
        f"{type(strategy).__name__} has read a checkpoint itself and not asked "
        f"{type(checkpoint_io).__name__}: its writer is unknown, and it may have run code. "
        "What is in the module now was not trained, evaluated or saved. Make the module anew, with "
        "load_encrypted_checkpoint and without ckpt_path. "
        f"{_BY_ITSELF.format(method='load_checkpoint')}"
    )


def _asks(strategy: Strategy, method: str, known: Mapping[type, _Asks]) -> bool:
    owner = _owner(strategy, method)
    if vars(owner).get(_DECLARED) is True:
        return True
    return owner in known and known[owner](strategy)


def _owner(strategy: Strategy, method: str) -> type:
    """Return the class whose method is called."""
    return next(kind for kind in type(strategy).__mro__ if method in vars(kind))


def _instead(strategy: Strategy, method: str) -> str:
    return _INSTEAD.get(_owner(strategy, method), _BY_ITSELF.format(method=method))
