"""A fit whose rows come in a fixed order, and whose noise hangs together over steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_secure.errors import BudgetExhaustedError, UnsupportedTrainerOptionError
from lightning_secure.privacy.noise.banded.noise import BandedNoise
from lightning_secure.privacy.noise.banded.order import FixedOrderBatchSampler
from lightning_secure.privacy.noise.gaussian import GaussianNoise


class BandedFit:
    """A fit with banded noise: its order of rows, its noise, and which step is due.

    Args:
        noise: Source of the independent noise.
        bands: Of the noise.
        rows: Of the dataset.
        steps: Steps that are planned.
        epoch: Steps of an epoch.
        seed: Makes the order of the rows repeatable, and so not private.
        secure: Whether noise is drawn, kept and added in double precision.
        batch: Returns the number of the batch at hand in its epoch.

    Raises:
        ConfigError: if rows come again too soon for the bands.

    Attributes:
        sampler: The order of the rows.
    """

    def __init__(
        self,
        noise: GaussianNoise,
        *,
        bands: int,
        rows: int,
        steps: int,
        epoch: int,
        seed: int | None,
        secure: bool,
        batch: Callable[[], int],
    ) -> None:
        self._noise = BandedNoise(
            noise,
            bands=bands,
            steps=steps,
            separation=epoch,
            dtype=torch.float64 if secure else None,
        )
        self._steps, self._taken = steps, 0
        self._epoch, self._batch = epoch, batch
        self.sampler = FixedOrderBatchSampler(rows, steps=epoch, seed=seed)

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
        due, found = self._taken % self._epoch, self._batch()
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
