"""The introduction of a CheckpointIO to its strategy, which Lightning does not name to it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class DependsOnStrategy(Protocol):
    """A CheckpointIO whose promise holds only where its strategy asks it."""

    def meet(self, strategy: Any, *, loaded: bool) -> None:
        """Refuse a strategy that would write checkpoints past it, or has loaded one past it."""


def introduce(strategy: Any, *, loaded: bool = False) -> None:
    """Let each CheckpointIO that a strategy was given look at it, also a wrapped one.

    Args:
        strategy: The Trainer's.
        loaded: Whether it has loaded a checkpoint.

    Raises:
        ConfigError: if the strategy writes checkpoints past one of them, or has loaded one past it.
    """
    checkpoint_io = strategy.checkpoint_io
    while checkpoint_io is not None:
        if isinstance(checkpoint_io, DependsOnStrategy):
            checkpoint_io.meet(strategy, loaded=loaded)
        checkpoint_io = getattr(checkpoint_io, "checkpoint_io", None)
