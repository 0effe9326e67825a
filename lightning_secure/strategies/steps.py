"""What goes into a step and comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_secure.errors import PrivacyError, UnsupportedModelError
from lightning_secure.privacy.sampling import LogicalBatch

__all__ = [
    "loss_of",
    "merged",
    "required",
    "spare_logical_batch",
    "stop_before_any_minimum",
    "without_loss",
]

T = TypeVar("T")


def loss_of(output: Any) -> Tensor:
    """Return the scalar that a training step wants minimised.

    Raises:
        UnsupportedModelError: There is none.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsupportedModelError(
            "training_step must return the mean loss of the batch as a scalar tensor, or a dict "
            "with it under 'loss'. Returning None to skip a batch would let the rows decide "
            "whether a step is taken. No step was taken."
        )
    return loss.reshape(())


def merged(outputs: Iterable[tuple[int, Any]], device: torch.device) -> Any:
    """Return what the steps of all chunks amount to.

    Args:
        outputs: Rows of a chunk, and what its training step returned.
        device: Where the loss of no rows at all is made.

    Returns:
        The mean loss over the rows; a dict with it if there was one chunk that returned a dict.
        It is not private.
    """
    total, rows, last = torch.zeros((), device=device), 0, None
    count = 0
    for size, output in outputs:
        total = total + loss_of(output).detach() * size
        rows, count, last = rows + size, count + 1, output
    mean = total / max(1, rows)
    return {**last, "loss": mean} if count == 1 and isinstance(last, dict) else mean


def without_loss(closure: Callable[[], Any]) -> Callable[[], Tensor]:
    """Return a closure that does the same and tells the optimizer no loss.

    The loss is not private, and an optimizer that chose its step by it would carry it into the
    weights. Not a number, so that such an optimizer fails where it can be seen.
    """

    def call() -> Tensor:
        closure()
        return torch.tensor(float("nan"))

    return call


def spare_logical_batch(module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Run the module's hook on ordinary batches only; a logical one's chunks have their turn."""
    if isinstance(batch, LogicalBatch):
        return batch
    return pl.LightningModule._on_before_batch_transfer(module, batch, dataloader_idx)


def stop_before_any_minimum(trainer: pl.Trainer) -> None:
    """Make the Trainer stop after this step.

    Lightning passes over ``should_stop`` until ``min_epochs`` and ``min_steps`` are met. A budget
    that is spent before them is spent all the same, so they are given up.
    """
    trainer.fit_loop.min_epochs = None
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def required(value: T | None) -> T:
    """Return what is there while a Trainer fits, and only then.

    Raises:
        PrivacyError: It is not there.
    """
    if value is None:
        raise PrivacyError("private training is not set up; it runs only inside Trainer.fit.")
    return value
