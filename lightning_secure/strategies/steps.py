"""The input and the output of a step."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_secure.compat.lightning import before_batch_transfer
from lightning_secure.errors import PrivacyError, UnsupportedModelError
from lightning_secure.privacy.sampling import LogicalBatch

T = TypeVar("T")


def loss_of(output: Any) -> Tensor:
    """Return the scalar that a training step wants minimised.

    Raises:
        UnsupportedModelError: if the step returned no loss.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsupportedModelError(
            "training_step must return the mean loss of the batch as a scalar tensor, or a dict "
            "with it under 'loss'. Returning None to skip a batch would let the rows decide "
            "whether a step is taken. No step was taken."
        )
    return loss.reshape(())


def withheld(outputs: Iterable[Any], device: torch.device, public: Container[str]) -> Any:
    """Run the steps of all chunks, and return what may be told of them.

    Args:
        outputs: The result of each chunk's training step.
        device: Where the loss is expected.
        public: Names of entries that do not depend on the rows.

    Returns:
        Not a number for the loss, which is computed from rows without noise: code that decides by
        it fails visibly. A dict with the public entries of the last chunk, if it had any.
    """
    last: Any = None
    for output in outputs:
        last = output
    loss = torch.full((), float("nan"), device=device)
    entries = last.items() if isinstance(last, dict) else ()
    told = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in entries
        if name in public
    }
    return {**told, "loss": loss} if told else loss


def spare_logical_batch(module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Run the module's hook on ordinary batches only; a logical one's chunks have their turn."""
    if isinstance(batch, LogicalBatch):
        return batch
    return before_batch_transfer(module, batch, dataloader_idx)


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
        PrivacyError: if the value is missing.
    """
    if value is None:
        raise PrivacyError("private training is not set up; it runs only inside Trainer.fit.")
    return value
