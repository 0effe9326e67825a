"""Noise that later steps take back in part."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.noise.banded.matrix import diagonals, sensitivity
from lightning_secure.privacy.noise.gaussian import GaussianNoise


class BandedNoise:
    """The noise of one run of so many steps, ``C^-1 Z`` row by row.

    Args:
        noise: Source of the independent noise ``Z``.
        bands: Of the matrix ``C``.
        steps: That the run takes at most.
        separation: Steps from one use of a row to the next.
        dtype: In which noise is drawn, kept and added, so that each sum is rounded once; by default
            that of the sums.

    Attributes:
        sensitivity: What one row changes in ``C G`` at most, over the clipping norm. The noise
            ``Z`` is so many times wider than ``noise_multiplier`` says, so that the whole run is
            one Gaussian mechanism of that noise multiplier.

    The last ``bands - 1`` rows are held in memory, each as large as the parameters. With
    them the noise can be taken off the next gradient, so they are in no checkpoint and cannot be
    pickled: a run that is resumed begins a new mechanism, with a charge of its own.

    Raises:
        ConfigError: if a row comes again too soon; see
            :func:`~lightning_secure.privacy.noise.banded.matrix.sensitivity`.

    >>> noise = BandedNoise(GaussianNoise(), bands=2, steps=6, separation=2)
    >>> round(noise.sensitivity, 4)
    1.9365
    """

    def __init__(
        self,
        noise: GaussianNoise,
        *,
        bands: int,
        steps: int,
        separation: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._noise = noise
        self._diagonals = diagonals(bands)
        self.sensitivity = sensitivity(self._diagonals, steps=steps, separation=separation)
        self._dtype = dtype
        self._left = steps
        self._past: list[deque[Tensor]] = []
        self._parameters: list[int] | None = None
        self._std: float | None = None
        self._at = 0

    def begin_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Begin the noise of the next step, for these parameters in this order.

        Raises:
            PrivacyError: if there is no next step, or the parameters are others than before: the
                noise of one would be taken back from another. Nothing may be released.
        """
        if self._left == 0:
            raise PrivacyError(
                "all steps that this run's noise was planned for are taken, and its epsilon covers "
                "no further step. The step was not taken."
            )
        ids = [id(parameter) for parameter in parameters]
        if self._parameters is None:
            self._parameters = ids
            self._past = [deque(maxlen=len(self._diagonals) - 1) for _ in ids]
        if ids != self._parameters or self._at not in (0, len(ids)):
            raise PrivacyError(
                "the parameters are not those with which the run began, or a step broke off, so "
                "the noise would no longer be correlated as planned. The step was not taken."
            )
        self._left -= 1
        self._at = 0

    def add_(self, tensor: Tensor, *, std: float) -> Tensor:
        """Add the noise of this step for the next parameter, in place.

        Args:
            tensor: Its clipped sum.
            std: The clipping norm times the noise multiplier, always the same. Zero adds nothing.

        Raises:
            PrivacyError: if the parameter is not the same as before, or the step has no further
                parameter.
        """
        if std == 0:
            return tensor
        if self._std not in (None, std) or self._at >= len(self._past):
            raise PrivacyError(
                "the noise's standard deviation cannot change within a run of banded noise. The "
                "step was not taken."
            )
        self._std = std
        past = self._past[self._at]
        self._at += 1
        own = self._noise.add_(torch.zeros_like(tensor, dtype=self._dtype), std=1.0)
        for coefficient, before in zip(self._diagonals[1:], past, strict=False):
            own.sub_(before, alpha=coefficient)
        own.div_(self._diagonals[0])
        past.appendleft(own)
        return tensor.add_(own, alpha=std * self.sensitivity)

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(
            "noise that is still to be taken back cannot be copied or pickled: the copy's holder "
            "could take it off the gradients."
        )
