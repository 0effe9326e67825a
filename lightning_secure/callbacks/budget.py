"""``Trainer(callbacks=[PrivacyBudget()])``: what the run has spent, while it runs."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_secure.errors import BudgetExhaustedError, ConfigError
from lightning_secure.privacy.accounting.ledger import HasLedger, Ledger
from lightning_secure.util.validate import positive, positive_int

log = logging.getLogger(__name__)


class PrivacyBudget(Callback):
    """Shows epsilon in the progress bar, logs it as a metric, and can stop the run early.

    Args:
        max_epsilon: Stop after the last step that keeps epsilon at or below this; the Trainer's
            ``min_epochs`` and ``min_steps`` give way. The strategy's own ``target_epsilon`` holds
            without it; this one is for stopping sooner.
        every_n_epochs: How often epsilon is computed, which takes some hundredths of a second.

    Metrics: ``privacy/epsilon``, ``privacy/delta`` and ``privacy/steps``, at the end of epochs.

    Raises:
        ConfigError: if the Trainer's strategy keeps no account of privacy.
        BudgetExhaustedError: if training went on although it was asked to stop. The step that would
            have passed ``max_epsilon`` was not taken.

    A module can replace callbacks in its ``configure_callbacks``; ``max_epsilon`` is then not
    checked. A budget that must hold whatever the module does is
    ``DPConfig(target_epsilon=)``, which the strategy enforces.

    >>> from lightning_secure import DPConfig, PrivateStrategy
    >>> config = DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    >>> callbacks = [PrivacyBudget(max_epsilon=1.0)]
    >>> trainer = pl.Trainer(strategy=PrivateStrategy(config), callbacks=callbacks, logger=False)
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take no step at all if an earlier fit has spent ``max_epsilon``."""
        self._stop_if_spent(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse the step that would pass ``max_epsilon``, if something made training go on.

        Raises:
            BudgetExhaustedError: if the step would pass ``max_epsilon``.
        """
        ledger = _ledger(trainer)
        if not ledger.affords_a_step(self._max_epsilon):
            raise BudgetExhaustedError(
                f"one more step would exceed PrivacyBudget(max_epsilon={self._max_epsilon:g}) "
                f"after {ledger.steps} steps, and something made training go on. The step was not "
                "taken."
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop when one more step would pass ``max_epsilon``."""
        self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        # Whether something else asked to stop says nothing: Lightning may not have listened.
        strategy, ledger = trainer.strategy, _ledger(trainer)
        if ledger.affords_a_step(self._max_epsilon):
            return
        log.warning(
            "epsilon would exceed %g after %d steps: training stops here",
            self._max_epsilon,
            ledger.steps,
        )
        assert isinstance(strategy, HasLedger)  # noqa: S101 # or _ledger would have raised
        strategy.stop_training()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was spent."""
        last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if not last and (trainer.current_epoch + 1) % self._every_n_epochs:
            return
        ledger = _ledger(trainer)
        # The same in every process. Their maximum is it, to the bit, which their mean need not be.
        alike: dict[str, Any] = {"on_epoch": True, "sync_dist": True, "reduce_fx": "max"}
        pl_module.log("privacy/epsilon", ledger.epsilon(), prog_bar=True, **alike)
        pl_module.log("privacy/delta", ledger.delta, **alike)
        pl_module.log("privacy/steps", float(ledger.steps), **alike)

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
