"""The entry point in each Trainer: a CheckpointIO meets its strategy, a module gets its ledger.

Lightning asks for it by the entry point ``lightning.pytorch.callbacks_factory``.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import lightning.pytorch as pl

from lightning_secure.util.strategy_check import introduce

_OURS: Final = frozenset(
    {
        "lightning_secure.plugins.checkpoint",
        "lightning_secure.plugins.hyperparameters",
        "lightning_secure.privacy.accounting.ledger",
    }
)


def callbacks() -> list[pl.Callback]:
    """Return what is added to a Trainer: nothing, where no part of ours can have been made.

    Without a CheckpointIO or a ledger, Trainers of this environment are what they were.
    """
    return [Introduction()] if _OURS & sys.modules.keys() else []


def _bring_ledgers(trainer: pl.Trainer) -> None:
    # Not before Lightning asks for it: a Trainer without any of our parts imports none of them.
    from lightning_secure.privacy.accounting.carried_ledger import bring_ledger_with_weights

    bring_ledger_with_weights(trainer.strategy)


class Introduction(pl.Callback):
    """Introduces a Trainer's strategy before anything is written, and after something was read.

    Lightning does not say beforehand that a checkpoint is going to be loaded. Callbacks that save
    one whenever there is an exception do so when a run is refused, too.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a strategy that would write past its CheckpointIO; have others bring ledgers."""
        introduce(trainer.strategy)
        _bring_ledgers(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for ledgers once more, in parts that the module's own ``setup`` has made."""
        _bring_ledgers(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a checkpoint that was read past it."""
        introduce(trainer.strategy, loaded=bool(trainer.ckpt_path))
        _bring_ledgers(trainer)

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint that would be written past it, or goes on from such a one."""
        self.on_train_start(trainer, pl_module)
