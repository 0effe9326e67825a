"""The mean of some rows, released once, and what pays for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_secure.errors import BudgetExhaustedError, ConfigError
from lightning_secure.privacy.accounting.mechanism import Release, joint_noise
from lightning_secure.privacy.accounting.pld import epsilon_by
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.util.validate import open_unit_interval, positive, positive_int

Bounds = tuple[float, float]


class Chargeable(Protocol):
    """An account that a release is charged to: a run's ledger, or a :class:`PrivacyAccount`."""

    def charge(self, release: Release) -> None:
        """Enter a release that is about to happen, or raise and have it not happen."""


@runtime_checkable
class ChargesAccount(Protocol):
    """A metric whose releases are charged to an account; a private strategy names its own."""

    def charge_to(self, account: Chargeable) -> None:
        """Charge this account, unless another one was chosen before."""


@dataclass(kw_only=True)
class PrivacyAccount:
    """An account of releases about rows that no private training has, such as validation rows.

    Args:
        delta: Probability with which the epsilon may fail to hold.
        budget: Epsilon that no release may exceed; None for no limit.

    It is kept in memory only.

    >>> account = PrivacyAccount(delta=1e-5, budget=1.0)
    >>> account.charge(Release(noise_multiplier=10.0, sample_rate=1.0, steps=1))
    >>> round(account.epsilon(), 2)
    0.34
    """

    delta: float
    budget: float | None = None
    releases: list[Release] = field(default_factory=list)

    def __post_init__(self) -> None:
        open_unit_interval(delta=self.delta)
        positive(budget=self.budget)

    def charge(self, release: Release) -> None:
        """Enter a release that is about to happen.

        Raises:
            BudgetExhaustedError: if the release would exceed the budget.

        >>> account = PrivacyAccount(delta=1e-5, budget=1.0)
        >>> account.charge(Release(noise_multiplier=1.0, sample_rate=1.0, steps=1))
        Traceback (most recent call last):
        lightning_secure.errors.BudgetExhaustedError: ...
        """
        after = [*self.releases, release]
        if self.budget is not None and epsilon_by("pld", after, delta=self.delta) > self.budget:
            raise BudgetExhaustedError(
                f"one more release would exceed the budget of epsilon {self.budget:g}. Nothing was "
                "released."
            )
        self.releases = after

    def epsilon(self) -> float:
        """Return the epsilon spent."""
        return epsilon_by("pld", self.releases, delta=self.delta)


def require_bounds(bounds: Sequence[float]) -> Bounds:
    """Return bounds that are two finite numbers, the lower one first.

    Raises:
        ConfigError: if the bounds are not two finite numbers, the lower one first.

    >>> require_bounds([0, 2])
    (0.0, 2.0)
    """
    if len(bounds) == 2 and all(math.isfinite(b) for b in bounds) and bounds[0] < bounds[1]:
        return float(bounds[0]), float(bounds[1])
    raise ConfigError(f"bounds must be two finite numbers, the lower one first, not {bounds!r}.")


def centred(values: Tensor, bounds: Bounds) -> Tensor:
    """Return numbers in [-1, 1]: -1 where a value is at or below the lower bound, 1 at the upper.

    Args:
        values: Any shape. One that is no number becomes zero, and an infinite one a bound.
        bounds: The declared ones.

    Returns:
        The same shape, float64, or float32 where the device has no float64.

    >>> centred(torch.tensor([-1.0, 0.5, 1.0, 9.0]), (0.0, 2.0)).tolist()
    [-1.0, -0.5, 0.0, 1.0]
    """
    low, high = bounds
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    middle, half = (low + high) / 2, (high - low) / 2
    known = torch.nan_to_num(values.detach().to(dtype), nan=middle, posinf=high, neginf=low)
    return ((known - middle) / half).clamp(-1, 1)


class PrivateSum:
    """A single private release of the mean of some rows.

    Args:
        bounds: Between which values are moved.
        noise_multiplier: Standard deviation of the noise, in units of what one row can change.
        public_rows: Number of rows to divide by, if it is public. Otherwise the number is released
            as well, with the same noise multiplier, and both are charged.
        known: Whether the noise may be known to others. It is charged as none.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        bounds: Bounds,
        *,
        noise_multiplier: float,
        public_rows: int | None = None,
        known: bool = False,
    ) -> None:
        positive(noise_multiplier=noise_multiplier)
        positive_int(public_rows=public_rows)
        self.bounds = require_bounds(bounds)
        self.noise_multiplier = noise_multiplier
        self.public_rows = public_rows
        self.known = known

    @property
    def cost(self) -> Release:
        """The release that is charged."""
        parts = 1 if self.public_rows is not None else 2
        noise = 0.0 if self.known else joint_noise(*[self.noise_multiplier] * parts)
        return Release(noise, 1.0, 1)

    def summed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the rows' :func:`centred` values, and their number, each shape ``()``.

        Args:
            values: One number a row, shape ``(rows,)``.

        Raises:
            ConfigError: if ``values`` has another shape.
        """
        if values.ndim != 1:
            raise ConfigError(
                f"values must be one number a row, shape (rows,), not of {values.ndim} dimensions."
            )
        total = centred(values, self.bounds).sum()
        return total, total.new_tensor(float(len(values)))

    def released(
        self, total: Tensor, count: Tensor, *, account: Chargeable, noise: GaussianNoise
    ) -> Tensor:
        """Charge an account, and return the mean with noise, moved into the bounds, shape ``()``.

        Args:
            total: As :meth:`summed` returns it, over all rows and ranks; each row once.
            count: The same.
            account: The account that is charged.
            noise: Source of the noise. On several ranks, that of the first one counts.

        Raises:
            BudgetExhaustedError: if the account cannot pay. Nothing was released.
            LedgerError: if the account cannot be charged. Nothing was released.
        """
        account.charge(self.cost)
        noised = noise.add_(torch.stack([total, count.to(total)]), std=self.noise_multiplier)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Noise of their own on each rank could be averaged away by an observer of them all.
            torch.distributed.broadcast(noised, 0)
        rows = noised[1].clamp(1)
        if self.public_rows is not None:
            rows = torch.full_like(rows, self.public_rows)
        low, high = self.bounds
        return ((low + high) / 2 + (high - low) / 2 * noised[0] / rows).clamp(low, high)
