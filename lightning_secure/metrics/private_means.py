"""Means over rows that are published with noise and charged for."""

from __future__ import annotations

import logging
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_secure.errors import ConfigError, LedgerError, PrivacyError
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.released.sums import Bounds, Chargeable, PrivateSum

log = logging.getLogger(__name__)


class _ReleasedMean(Metric):
    """The common part of :class:`PrivateMean` and :class:`PrivateAccuracy`."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor
    updates: Tensor

    def __init__(
        self,
        *,
        bounds: Bounds,
        noise_multiplier: float,
        public_rows: int | None = None,
        account: Chargeable | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__()
        seeded = insecure_seed is not None
        self._sum = PrivateSum(
            bounds, noise_multiplier=noise_multiplier, public_rows=public_rows, known=seeded
        )
        # Two numbers a release: secure in any run, which may be one that says so of all its noise.
        self._noise = GaussianNoise(insecure_seed, secure=not seeded)
        self._payer = _Payer(account)
        self._released: tuple[int, Tensor] | None = None
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")
        self.add_state("updates", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def charge_to(self, account: Chargeable) -> None:
        """Charge this account from now on, unless the constructor was given another one."""
        self._payer.offer(account)

    def _add(self, values: Tensor) -> None:
        total, count = self._sum.summed(values)
        self.total += total
        self.count += count
        self.updates += 1

    def compute(self) -> Tensor:
        """Release the mean, or return what was released of these rows before.

        >>> from lightning_secure import PrivacyAccount
        >>> account = PrivacyAccount(delta=1e-5)
        >>> metric = PrivateMean(bounds=(0.0, 1.0), noise_multiplier=10.0, account=account)
        >>> metric.update(torch.full((1000,), 0.25))
        >>> bool(metric.compute() == metric.compute()), len(account.releases)  # released once
        (True, 1)
        """
        # The number of updates does not depend on values, and is the same on all ranks.
        updates = int(self.updates)
        if self._released is None or self._released[0] != updates:
            self._released = (updates, self._release())
        return self._released[1]

    def _release(self) -> Tensor:
        account = self._payer.account
        if account is None:
            raise LedgerError(
                f"{type(self).__name__} has no account to charge: give it one, account=..., or use "
                "it in a module that a private strategy has taken. Nothing was released."
            )
        try:
            return self._sum.released(self.total, self.count, account=account, noise=self._noise)
        except LedgerError:
            raise
        except PrivacyError as error:
            # The budget, or a trial: known without the rows, and no reason to lose a run.
            log.warning("%s is not a number: %s", type(self).__name__, error)
            return torch.full_like(self.total, torch.nan)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Update. The value of a batch would be a release of its own, and is not computed."""
        self.update(*args, **kwargs)

    def reset(self) -> None:
        """Forget the rows; what is computed next is a release of its own."""
        super().reset()
        self._released = None


class PrivateMean(_ReleasedMean):
    """The mean of one number a row, published with Gaussian noise.

    Args:
        bounds: Between which values are moved. The noise is in proportion to their distance.
        noise_multiplier: Standard deviation of the noise, in units of what one row can change. The
            mean of n rows has noise of ``noise_multiplier * (high - low) / (2 * n)``.
        public_rows: Number of rows, if it is public. Otherwise it is released with noise of its
            own, and both are charged, as one release with ``noise_multiplier / sqrt(2)``.
        account: The account of each release: a run's ledger, or a ``PrivacyAccount`` of other rows.
            By default the ledger of the private strategy that trains the module that this metric is
            part of.
        insecure_seed: Makes the noise repeatable, and so not private: each release is charged as
            one without noise, and epsilon is infinite.

    :meth:`update` takes values of shape ``(rows,)``; :meth:`compute` returns shape ``()``, in the
    unit of the values, moved into the bounds. On several ranks the sums are added up and noise is
    added once, and each rank gets the same value.

    Each row may be in one update between two resets: one that is in several changes the sum by more
    than it is charged for. Calling the metric updates it, and returns nothing, because the value of
    a batch would be a release of its own.

    Raises:
        ConfigError: if a number is out of range, or values are not one number a row.
        LedgerError: if :meth:`compute` has no account to charge, or cannot charge it.

    Guarantees:
        The result is (epsilon, delta)-differentially private, for rows added or removed one
        at a time, and the account contains it. It is computed once: until the next update or reset
        the same value is returned, at no further cost. Where the budget does not allow it, and
        in the Trainer's sanity check, it is NaN, and a warning says so.

    The sums, without noise, are in the metric's state; do not make it persistent.

    >>> from lightning_secure import PrivacyAccount
    >>> account = PrivacyAccount(delta=1e-5)
    >>> metric = PrivateMean(bounds=(0.0, 1.0), noise_multiplier=10.0, account=account)
    >>> metric.update(torch.full((100_000,), 0.25))
    >>> abs(float(metric.compute()) - 0.25) < 0.01, len(account.releases)
    (True, 1)
    """

    higher_is_better = None

    def update(self, values: Tensor) -> None:
        """Add rows.

        Args:
            values: One number a row, shape ``(rows,)``. One that is no number counts as the middle
                of the bounds.
        """
        self._add(values)


class PrivateAccuracy(_ReleasedMean):
    """The part of the rows that are classified rightly, published with Gaussian noise.

    Args:
        noise_multiplier: As for :class:`PrivateMean`; the accuracy of n rows has noise of
            ``noise_multiplier / (2 * n)``.
        public_rows: As for :class:`PrivateMean`.
        account: As for :class:`PrivateMean`.
        insecure_seed: As for :class:`PrivateMean`.

    >>> from lightning_secure import PrivacyAccount
    >>> account = PrivacyAccount(delta=1e-5)
    >>> metric = PrivateAccuracy(noise_multiplier=10.0, account=account)
    >>> metric.update(torch.ones(100_000).long(), torch.ones(100_000).long())
    >>> float(metric.compute()) > 0.99
    True
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        noise_multiplier: float,
        public_rows: int | None = None,
        account: Chargeable | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        super().__init__(
            bounds=(0.0, 1.0),
            noise_multiplier=noise_multiplier,
            public_rows=public_rows,
            account=account,
            insecure_seed=insecure_seed,
        )

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add rows.

        Args:
            preds: Scores of classes, shape ``(rows, classes)``, or classes, shape ``(rows,)`` and
                whole numbers.
            target: Classes, shape ``(rows,)``.

        Raises:
            ConfigError: if the tensors have other shapes, or predictions of one number a row are no
                classes.
        """
        if preds.ndim == 2:
            preds = preds.argmax(1)
        elif preds.is_floating_point():
            raise ConfigError(
                f"preds of shape (rows,) must be class numbers, not {preds.dtype}; for scores of "
                "one class, apply a threshold: (scores > 0.5).long()."
            )
        if preds.shape != target.shape or preds.ndim != 1:
            raise ConfigError(
                f"preds and target must be one class a row, and have shapes {tuple(preds.shape)} "
                f"and {tuple(target.shape)}."
            )
        self._add((preds == target).float())


class _Payer:
    """The account that is charged, which copies of a metric share and other processes do not."""

    def __init__(self, account: Chargeable | None) -> None:
        self.account = account
        self._chosen = account is not None

    def offer(self, account: Chargeable) -> None:
        if not self._chosen:
            self.account = account

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The charges of a copy in another process would be missing here.
        return {"account": None, "_chosen": False}
