"""``Trainer(callbacks=[PrivacyBudget()])``: what the run has spent, while it runs."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.ledger import HasLedger, Ledger
from lightning_secure.validate import positive, positive_int

__all__ = ["PrivacyBudget"]

log = logging.getLogger(__name__)


class PrivacyBudget(Callback):
    """Shows epsilon in the progress bar, logs it as a metric, and can stop the run early.

    Args:
        max_epsilon: Stop after the last step that keeps epsilon at or below this. The strategy's
            own ``target_epsilon`` holds without it; this one is for stopping sooner.
        every_n_epochs: How often epsilon is computed, which takes some tenths of a second.

    Metrics: ``privacy/epsilon``, ``privacy/delta`` and ``privacy/steps``, at the end of epochs.

    Raises:
        ConfigError: The Trainer's strategy keeps no account of privacy.
    """

    def __init__(self, *, max_epsilon: float | None = None, every_n_epochs: int = 1) -> None:
        positive(max_epsilon=max_epsilon)
        positive_int(every_n_epochs=every_n_epochs)
        self._max_epsilon = max_epsilon
        self._every_n_epochs = every_n_epochs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make sure that there is something to show."""
        if stage == "fit" and not isinstance(trainer.strategy, HasLedger):
            raise ConfigError(
                f"PrivacyBudget needs Trainer(strategy=PrivateStrategy(...)); "
                f"{type(trainer.strategy).__name__} spends no budget because it is not private."
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ask the Trainer to stop when one more step would pass ``max_epsilon``."""
        ledger = _ledger(trainer)
        if trainer.should_stop or ledger.affords_a_step(self._max_epsilon):
            return
        log.warning(
            "epsilon would exceed %g after %d steps: training stops here",
            self._max_epsilon,
            ledger.steps,
        )
        trainer.should_stop = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was spent."""
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if not last and (trainer.current_epoch + 1) % self._every_n_epochs:
            return
        ledger = _ledger(trainer)
        pl_module.log("privacy/epsilon", ledger.epsilon(), prog_bar=True, on_epoch=True)
        pl_module.log("privacy/delta", ledger.delta, on_epoch=True)
        pl_module.log("privacy/steps", float(ledger.steps), on_epoch=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was spent."""
        ledger = _ledger(trainer)
        if ledger.private:
            log.info(
                "privacy spent: epsilon %.4g at delta %g, in %d steps",
                ledger.epsilon(),
                ledger.delta,
                ledger.steps,
            )
        else:
            log.warning("this run is NOT PRIVATE: %s", ", ".join(ledger.insecure))


def _ledger(trainer: pl.Trainer) -> Ledger:
    strategy = trainer.strategy
    ledger = strategy.ledger if isinstance(strategy, HasLedger) else None
    if ledger is None:
        raise ConfigError("the strategy has not opened its account yet.")
    return ledger
