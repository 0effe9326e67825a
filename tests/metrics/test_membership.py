from __future__ import annotations

import math

import pytest
import torch

from lightning_secure.errors import ConfigError
from lightning_secure.metrics import MembershipInferenceAdvantage, membership_advantage


def brute(losses, members, limit=1.0):
    best = 0.0
    for threshold in losses.tolist():
        guess = losses <= threshold
        false = float(guess[~members].float().mean())
        if false <= limit:
            best = max(best, float(guess[members].float().mean()) - false)
    return best


@pytest.mark.parametrize("limit", [None, 0.1])
def test_the_best_threshold_is_found(limit):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        members = torch.rand(40, generator=generator) < 0.5
        # Rounded, so that there are ties.
        losses = (torch.rand(40, generator=generator) - 0.3 * members).mul(8).round()
        found = membership_advantage(losses, members, max_false_positive_rate=limit)
        assert float(found) == pytest.approx(brute(losses, members, limit or 1.0))


def test_knowing_is_one_and_guessing_is_near_zero():
    members = torch.arange(2000) % 2 == 0
    assert membership_advantage((~members).float(), members) == 1
    losses = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    assert membership_advantage(losses, members) < 0.08
    assert membership_advantage(torch.zeros(2000), members) == 0
    assert membership_advantage(members.float(), members) == 0


def test_batches_and_ranks_are_taken_together():
    def other_rank(value, group):
        others = {True: torch.tensor([0.1, 0.9]), False: torch.tensor([1.0, 0.0])}
        return [value, others[bool(value[-1] > 2)]]

    metric = MembershipInferenceAdvantage(
        dist_sync_fn=other_rank, distributed_available_fn=lambda: True
    )
    metric.update(torch.tensor([0.2, 5.0]), torch.tensor([True, False]))
    metric.update(torch.tensor([6.0]), False)
    assert metric.compute() == 1
    assert len(metric.losses) == 2, "its own rows only, afterwards"


def test_a_loss_that_is_no_number_is_that_of_no_member():
    metric = MembershipInferenceAdvantage()
    metric.update(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
    assert metric.compute() == 1


def test_without_both_kinds_there_is_no_figure():
    metric = MembershipInferenceAdvantage(max_false_positive_rate=0.01)
    metric.update(torch.ones(3), True)
    assert math.isnan(metric.compute())
    assert math.isnan(membership_advantage(torch.ones(0), torch.ones(0, dtype=torch.bool)))


def test_other_shapes_are_refused():
    metric = MembershipInferenceAdvantage()
    for losses, members in (
        (torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)),
        (torch.ones(2), torch.ones(3, dtype=torch.bool)),
        (torch.ones(2), torch.ones(2)),
    ):
        with pytest.raises(ConfigError, match="one number and one bool a row"):
            metric.update(losses, members)
    with pytest.raises(ConfigError, match="max_false_positive_rate"):
        MembershipInferenceAdvantage(max_false_positive_rate=1.5)
