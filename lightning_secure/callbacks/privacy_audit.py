"""``Trainer(callbacks=[PrivacyAudit()])``: what an attack finds, beside what the account claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import default_collate

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.accounting.ledger import HasLedger, Ledger
from lightning_secure.privacy.auditing.audit_report import AuditReport
from lightning_secure.privacy.auditing.one_run import OneRunAudit
from lightning_secure.privacy.auditing.white_box import CanaryRun, canary_audit
from lightning_secure.util.validate import open_unit_interval, positive_int


class PrivacyAudit(Callback):
    """Attacks a private run when it ends, and logs lower bounds on epsilon.

    Args:
        one_run: The audit whose canaries are among the rows that are trained on; None for none.
        losses: From the module and a batch of canaries to the loss of each, shape ``(rows,)``.
        collate_fn: Makes a batch of canaries, as the training loader's makes one of rows.
        canaries: Of the white-box audit, which replays steps with the run's noise and sampling
            rate on rows of its own.
        most_steps: Steps that it replays at most, which bounds what it costs; what the first steps
            reveal, all of them do.
        confidence: Probability with which each bound is to hold.

    Metrics: ``privacy/epsilon_lower_bound_canary`` and ``privacy/epsilon_lower_bound_one_run``,
    once, beside the ``privacy/epsilon`` of
    :class:`~lightning_secure.callbacks.budget.PrivacyBudget`. They depend on canaries and on noised
    weights only. A bound above the claim is logged as an error; a callback cannot enforce anything.

    Attributes:
        reports: The reports of the last audit.

    Raises:
        ConfigError: if the strategy keeps no account of privacy, ``losses`` is missing, or
            processes have tossed their coins each by itself.

    >>> PrivacyAudit(canaries=5000, most_steps=100).reports  # filled when the fit ends
    ()
    """

    def __init__(
        self,
        one_run: OneRunAudit | None = None,
        *,
        losses: Callable[[pl.LightningModule, Any], Tensor] | None = None,
        collate_fn: Callable[[Any], Any] = default_collate,
        canaries: int = 20_000,
        most_steps: int = 500,
        confidence: float = 0.95,
    ) -> None:
        if (one_run is None) != (losses is None):
            raise ConfigError("one_run and losses belong together: give both or none.")
        positive_int(canaries=canaries, most_steps=most_steps)
        open_unit_interval(confidence=confidence)
        self._one_run = one_run
        self._losses = losses
        self._collate_fn = collate_fn
        self._canaries = canaries
        self._most_steps = most_steps
        self._confidence = confidence
        self.reports: Sequence[AuditReport] = ()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make sure that there is a claim to attack."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, HasLedger):
            raise ConfigError(
                f"PrivacyAudit needs Trainer(strategy=PrivateStrategy(...)); "
                f"{type(trainer.strategy).__name__} claims nothing that could be attacked."
            )
        if trainer.world_size > 1 and self._one_run is not None and self._one_run.tossed:
            raise ConfigError(
                "each process has tossed its own coins for the canaries: toss them once, and give "
                "all processes OneRunAudit(canaries, included=...)."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that the claim is about rows that are drawn, as canaries are.

        Raises:
            ConfigError: if the rows come in a fixed order.
        """
        ledger = trainer.strategy.ledger if isinstance(trainer.strategy, HasLedger) else None
        if ledger is not None and ledger.mechanism != "poisson":
            raise ConfigError(
                f"PrivacyAudit attacks DP-SGD, and mechanism={ledger.mechanism!r} is another "
                "mechanism, of which its bounds would say nothing. Leave it out. No step was taken."
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attack, if this was the last epoch."""
        last = (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or 0 <= trainer.max_steps <= trainer.global_step
        )
        strategy = trainer.strategy
        ledger = strategy.ledger if isinstance(strategy, HasLedger) else None
        if not last or ledger is None or not ledger.steps:
            return
        claimed, reports = ledger.epsilon(), []
        if ledger.noise_multiplier > 0:
            reports.append(self._replay(ledger, claimed))
        if self._one_run is not None:
            scores = self._scores(self._one_run, trainer, pl_module)
            reports.append(
                self._one_run.report(
                    scores, claimed=claimed, delta=ledger.delta, confidence=self._confidence
                )
            )
        self.reports = reports
        for report in reports:
            name = f"privacy/epsilon_lower_bound_{report.method.replace('-', '_')}"
            pl_module.log(name, report.lower_bound, on_epoch=True, rank_zero_only=True)

    def _replay(self, ledger: Ledger, claimed: float) -> AuditReport:
        rate = ledger.public.sample_rate
        canaries = max(self._canaries, math.ceil(1 / rate))
        run = CanaryRun(
            canaries,
            noise_multiplier=ledger.noise_multiplier,
            delta=ledger.delta,
            max_grad_norm=ledger.max_grad_norm,
            steps=min(ledger.steps, self._most_steps),
            # Rounded down: draws that are rarer than the run's show no more than the run does.
            expected_batch_size=max(1, int(rate * canaries)),
        )
        return canary_audit(
            run,
            canaries=canaries,
            claimed=claimed,
            delta=ledger.delta,
            confidence=self._confidence,
        )

    def _scores(
        self, audit: OneRunAudit, trainer: pl.Trainer, module: pl.LightningModule
    ) -> Tensor:
        assert self._losses is not None  # noqa: S101 # given together with the audit
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            losses = partial(self._losses, module)
            return audit.scores(
                lambda batch: losses(trainer.strategy.batch_to_device(batch)),
                collate_fn=self._collate_fn,
            )
        finally:
            for part, training in modes:
                part.training = training
