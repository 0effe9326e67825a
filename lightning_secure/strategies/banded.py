"""Runs whose rows come in a fixed order, and whose noise hangs together over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_secure.errors import BudgetExhaustedError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.noise.banded.noise import BandedNoise
from lightning_secure.privacy.noise.banded.order import FixedOrderBatchSampler
from lightning_secure.privacy.noise.gaussian import GaussianNoise


class BandedFit:
    """A fit with banded noise: its order of rows, its noise, and which step is due.

    Args:
        trainer: Whose fit it is.
        config: The privacy configuration.
        ledger: The account, with the run's public numbers. It is told how many steps are planned.
        rows: Of the dataset.
        noise: Source of the independent noise.
        planned_steps: From the steps of an epoch to those of the whole run.

    Raises:
        ConfigError: if the length of the run is not given, or rows come again too soon for the
            bands.
        UnsupportedTrainerOptionError: if the Trainer would not take the rows in their order.

    Attributes:
        sampler: The order of the rows.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        config: DPConfig,
        ledger: Ledger,
        *,
        rows: int,
        noise: GaussianNoise,
        planned_steps: Callable[[int], int],
    ) -> None:
        self._trainer = trainer
        self._epoch = epoch = ledger.public.steps_per_epoch
        limit = trainer.limit_train_batches
        if limit < epoch if isinstance(limit, int) else limit != 1.0:
            raise UnsupportedTrainerOptionError(
                f"limit_train_batches={limit} would bring some rows back "
                "before the others had their turn. Leave it out, or use mechanism='poisson'. No "
                "step was taken."
            )
        # At least one, so that it can be said what the noise would have been.
        steps = max(1, planned_steps(epoch) - trainer.global_step)
        self._noise = BandedNoise(
            noise,
            bands=config.bands or 1,
            steps=steps,
            separation=epoch,
            dtype=torch.float64 if config.secure_noise else None,
        )
        self._steps, self._taken = steps, 0
        ledger.plan(steps)
        self.sampler = FixedOrderBatchSampler(rows, steps=epoch, seed=config.insecure_seed)

    @property
    def over(self) -> bool:
        """Whether all steps that were planned are taken."""
        return self._taken == self._steps

    def require_turn(self) -> None:
        """Make sure that the batch at hand is the one that is due.

        Raises:
            BudgetExhaustedError: if all planned steps are taken.
            UnsupportedTrainerOptionError: if an epoch was begun in its middle, or left before its
                end.
        """
        if self.over:
            raise BudgetExhaustedError(
                f"all {self._steps} steps that this fit was planned for are taken. They are one "
                "release, whose epsilon covers no other; to go on, fit again, which is charged "
                "anew. The step was not taken."
            )
        due, found = self._taken % self._epoch, self._trainer.fit_loop.epoch_loop.batch_idx
        if due != found:
            raise UnsupportedTrainerOptionError(
                f"batch {found} of the epoch comes where batch {due} is due: the run was resumed "
                "in the middle of an epoch, or an epoch was left early. Then rows come again "
                "sooner than the noise allows for. Resume from the end of an epoch. The step was "
                "not taken."
            )

    def next_noise(self, parameters: Sequence[nn.Parameter]) -> BandedNoise:
        """Return the noise of this step.

        Raises:
            PrivacyError: if there is no next step; see
                :meth:`~lightning_secure.privacy.noise.banded.noise.BandedNoise.begin_step`.
        """
        self._noise.begin_step(parameters)
        self._taken += 1
        return self._noise
