"""``Trainer(strategy=PrivateStrategy(...))``: DP-SGD for an unmodified LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision

from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import (
    AdaptiveClipping,
    ClippingRule,
    FlatClipping,
    PerLayerClipping,
)
from lightning_secure.privacy.released.step_metrics import ReleasedMetric
from lightning_secure.strategies.single import OneDeviceStrategy
from lightning_secure.strategies.training import PrivateTraining


class PrivateStrategy(PrivateTraining, OneDeviceStrategy):
    """Trains on one device so that the weights reveal at most ``epsilon`` about any one row.

    Args:
        config: The budget, the clipping norm and the rest of what the promise depends on.
        public_metrics: Names of metrics, logged while training, that do not depend on the rows.
            All others are withheld from loggers, callbacks and the progress bar; metrics of
            validation and test are not touched.
        released_metrics: Metrics of the rows of each step that are published with noise, by the
            name under which their mean over an epoch is logged: ``ClippedFraction``,
            ``GradientNorm``, or ``RowMean`` of an entry of ``training_step``'s dict. Each step is
            charged for them and its gradient together.
        journal: Local directory where the run notes each release before it happens, so that no old
            checkpoint, second branch or crash makes the account forget one; keep it with the
            checkpoints. By default ``privacy_journal`` in the Trainer's ``default_root_dir``.
        accelerator: As for any strategy; normally left to the Trainer.
        checkpoint_io: As for any strategy; normally a plugin of the Trainer.
        precision_plugin: As for any strategy; normally left to the Trainer.

    The module stays as it is: ``training_step`` returns a mean loss, ``configure_optimizers`` one
    optimizer. A step draws rows by Poisson sampling, takes each row's gradient, clips it, adds the
    clipped ones up, adds Gaussian noise, and divides by the public expected batch size. That, and
    nothing before it, is what ``on_after_backward``, ``on_before_optimizer_step``, the optimizer
    and every checkpoint see.

    Raises:
        UnsupportedModelError: if the model or its loss cannot be made private.
        UnsupportedTrainerOptionError: if a Trainer option would break the promise.
        BudgetExhaustedError: if the next step would exceed ``target_epsilon``. Training is asked to
            stop one step earlier; this is for when something made it go on.
        LedgerError: if a checkpoint is resumed without its ledger or without its run's journal.

    Guarantees:
        (epsilon, delta)-differential privacy of the weights after each step, for neighbouring
        training sets that differ by one row added or removed, with the epsilon of :attr:`ledger`;
        with ``mechanism="banded"``, that differ by one row which is made to have no gradient.
        It does not cover validation data, the number of rows, hyperparameters chosen by looking at
        the data, nor what the module writes itself past ``self.log``.

    Source:
        Abadi et al. 2016, arXiv:1607.00133; Bu et al. 2023, arXiv:2210.00038.

    >>> import lightning.pytorch as pl
    >>> config = DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    >>> trainer = pl.Trainer(strategy=PrivateStrategy(config), max_epochs=1, logger=False)
    >>> trainer.strategy.ledger is None  # the first fit opens it
    True
    """

    strategy_name = "private"
    clippings: ClassVar[tuple[type[ClippingRule], ...]] = (
        FlatClipping,
        PerLayerClipping,
        AdaptiveClipping,
    )
    banded = True

    def __init__(
        self,
        config: DPConfig,
        *,
        public_metrics: Sequence[str] = (),
        released_metrics: Mapping[str, ReleasedMetric] | None = None,
        journal: str | Path | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            config,
            public_metrics=public_metrics,
            released_metrics=released_metrics,
            journal=journal,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
