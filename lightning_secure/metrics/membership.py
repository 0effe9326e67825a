"""Membership inference: how well an attacker tells a model's training rows from others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_secure.errors import ConfigError
from lightning_secure.util.validate import open_unit_interval


def membership_advantage(
    losses: Tensor, members: Tensor, *, max_false_positive_rate: float | None = None
) -> Tensor:
    """Return the largest true-positive rate minus false-positive rate of any threshold on the loss.

    Args:
        losses: Shape ``(rows,)``; those of members are taken to be lower.
        members: Whether a row was trained on, shape ``(rows,)``, bool.
        max_false_positive_rate: Look only at thresholds that take no larger part of the others for
            members; between 0 and 1.

    Returns:
        Shape ``()``, between 0 and 1; NaN without members or without others.

    Source:
        Yeom et al. 2018, arXiv:1709.01604; at low false-positive rates Carlini et al. 2022,
        arXiv:2112.03570.

    >>> losses = torch.tensor([0.1, 0.2, 0.9, 0.8])
    >>> membership_advantage(losses, torch.tensor([True, True, False, False]))
    tensor(1.)
    """
    losses, order = torch.nan_to_num(losses.float(), nan=torch.inf, posinf=torch.inf).sort()
    inside = members[order].double()
    hits, alarms = inside.cumsum(0), (1 - inside).cumsum(0)
    if not len(losses) or hits[-1] == 0 or alarms[-1] == 0:
        return torch.tensor(torch.nan, device=losses.device)
    true, false = hits / hits[-1], alarms / alarms[-1]
    # Rows of the same loss are on the same side of each threshold.
    last = torch.cat([losses[1:] != losses[:-1], torch.ones(1, dtype=torch.bool).to(losses.device)])
    if max_false_positive_rate is not None:
        last &= false <= max_false_positive_rate
    gain = (true - false)[last]
    best = gain.max() if len(gain) else gain.new_zeros(())
    return best.clamp(min=0).float()


class MembershipInferenceAdvantage(Metric):
    """The advantage of guessing by the loss which rows a model was trained on.

    Args:
        max_false_positive_rate: As for :func:`membership_advantage`.

    :meth:`update` takes losses of shape ``(rows,)`` and whether each row was trained on; between
    :meth:`reset` and :meth:`compute` there should be about as many of both kinds. On several ranks
    those of all are taken together. :meth:`compute` returns shape ``()``, without unit: 0 is
    guessing, 1 is knowing. The best threshold is chosen on the rows that it is tried on, so a few
    rows show more than there is, about ``1 / sqrt(rows)``.

    With (epsilon, delta)-differential privacy it is at most
    ``(exp(epsilon) - 1 + 2 * delta) / (exp(epsilon) + 1)`` on average.

    The figure is computed from training rows without noise. It is for those who may see them: do
    not publish it.

    Source:
        Yeom et al. 2018, arXiv:1709.01604; the bound: Humphries et al. 2020, arXiv:2010.12112.

    >>> metric = MembershipInferenceAdvantage()
    >>> metric.update(torch.tensor([0.1, 0.2]), members=True)
    >>> metric.update(torch.tensor([0.15, 0.9]), members=False)
    >>> metric.compute()
    tensor(0.5000)
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    losses: list[Tensor] | Tensor
    members: list[Tensor] | Tensor

    def __init__(self, *, max_false_positive_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_false_positive_rate is not None:
            open_unit_interval(max_false_positive_rate=max_false_positive_rate)
        self._limit = max_false_positive_rate
        self.add_state("losses", [], dist_reduce_fx="cat")
        self.add_state("members", [], dist_reduce_fx="cat")

    def update(self, losses: Tensor, members: Tensor | bool) -> None:
        """Add rows.

        Args:
            losses: Of the model, shape ``(rows,)``.
            members: Whether it was trained on each of them, shape ``(rows,)`` and bool; or one bool
                for all.

        Raises:
            ConfigError: if the tensors have other shapes or another type.
        """
        if isinstance(members, bool):
            members = torch.full(losses.shape, members, device=losses.device)
        if losses.ndim != 1 or members.shape != losses.shape or members.dtype != torch.bool:
            raise ConfigError(
                "losses and members must be one number and one bool a row, and are "
                f"{tuple(losses.shape)} and {tuple(members.shape)} of {members.dtype}."
            )
        assert isinstance(self.losses, list)  # noqa: S101 # synced states are not updated
        assert isinstance(self.members, list)  # noqa: S101
        self.losses.append(losses.detach().float())
        self.members.append(members.float())

    def compute(self) -> Tensor:
        """Return the advantage of the best threshold."""
        if isinstance(self.losses, list) and not self.losses:
            return torch.tensor(torch.nan)
        losses, members = dim_zero_cat(self.losses), dim_zero_cat(self.members)
        return membership_advantage(losses, members > 0, max_false_positive_rate=self._limit)
