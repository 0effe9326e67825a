from __future__ import annotations

import ast
import copy
import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_secure
from lightning_secure.errors import BudgetExhaustedError, ConfigError, LedgerError
from lightning_secure.metrics import PrivateAccuracy, PrivateMean
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import epsilon_pld
from lightning_secure.privacy.checks.metric_isolation import metrics_kept_apart
from lightning_secure.privacy.released.sums import ChargesAccount, PrivacyAccount

VALUES = torch.tensor([0.5, 1.5, 2.5, 11.0, -3.0, torch.inf, torch.nan])
KEPT = [0.5, 1.5, 2.5, 4.0, 0.0, 4.0, 2.0]  # in bounds of 0 and 4


def account(**settings):
    return PrivacyAccount(**{"delta": 1e-5, **settings})


def mean(noise=1e-6, **settings):
    settings = {"bounds": (0, 4), "noise_multiplier": noise, "account": account(), **settings}
    return PrivateMean(**settings)


def test_values_are_moved_into_the_bounds():
    for rows in (None, len(KEPT)):
        metric = mean(public_rows=rows)
        metric.update(VALUES[:3])
        metric(VALUES[3:])
        assert float(metric.compute()) == pytest.approx(sum(KEPT) / len(KEPT), abs=1e-4)


@pytest.mark.parametrize("public", [True, False])
def test_noise_is_as_wide_as_declared(public):
    found = []
    for seed in range(400):
        metric = mean(noise=5.0, public_rows=100 if public else None, insecure_seed=seed)
        metric.update(torch.full((100,), 3.0))
        found.append(float(metric.compute()))
    # Half the width of the bounds, 2, times 5 over 100 rows; the noise of the count comes on top.
    expected = 0.1 if public else math.hypot(0.1, 0.05)
    assert torch.tensor(found).std() == pytest.approx(expected, rel=0.15)
    assert torch.tensor(found).mean() == pytest.approx(3.0, abs=0.02)


def test_no_two_releases_have_the_same_noise():
    found = set()
    metric = mean(noise=1.0)
    for _ in range(3):
        metric.reset()
        metric.update(torch.ones(50))
        found.add(float(metric.compute()))
    for copied in (copy.deepcopy(metric), mean(noise=1.0)):
        copied.reset()
        copied.update(torch.ones(50))
        found.add(float(copied.compute()))
    assert len(found) == 5


def test_one_row_changes_the_sum_by_one_unit_at_most():
    metric = mean()
    for value in (*VALUES, torch.tensor(2.0)):
        total, count = metric._sum.summed(value.reshape(1))
        assert abs(float(total)) <= 1
        assert count == 1


def test_each_release_is_charged_once():
    paid = account()
    metric = mean(noise=10.0, account=paid, public_rows=1000)
    metric.update(torch.ones(1000))
    first = metric.compute()
    metric._computed = None  # whatever torchmetrics keeps: the value is the same, and paid for
    assert metric.compute() == first
    assert paid.releases == [Release(10.0, 1.0, 1)]
    metric.update(torch.ones(1000))
    assert metric.compute() != first
    metric.reset()
    metric.update(torch.ones(1000))
    assert metric.compute() != first
    assert paid.epsilon() == epsilon_pld([Release(10.0, 1.0, 3)], delta=1e-5)


def test_a_number_of_rows_is_charged_as_well():
    paid = account()
    metric = mean(noise=10.0, account=paid)
    metric.update(torch.ones(3))
    metric.compute()
    assert paid.releases == [Release(pytest.approx(10 / math.sqrt(2)), 1.0, 1)]


def test_charging_comes_before_releasing():
    class Broke:
        def charge(self, release):
            raise LedgerError("no")

    metric = mean(account=Broke())
    metric.update(torch.ones(3))
    with pytest.raises(LedgerError):
        metric.compute()
    assert metric._released is None


def test_nobody_to_pay_is_no_release():
    metric = mean(account=None)
    metric.update(torch.ones(3))
    with pytest.raises(LedgerError, match="no account to charge"):
        metric.compute()
    assert isinstance(metric, ChargesAccount)
    paid = account()
    metric.charge_to(paid)
    metric.compute()
    assert len(paid.releases) == 1


def test_the_account_that_was_chosen_stays():
    chosen, other = account(), account()
    metric = mean(account=chosen)
    metric.charge_to(other)
    metric.update(torch.ones(3))
    metric.compute()
    assert (len(chosen.releases), other.releases) == (1, [])


def test_copies_charge_the_same_account_and_other_processes_none():
    paid = account()
    metric = copy.deepcopy(mean(account=paid))
    metric.update(torch.ones(3))
    metric.compute()
    assert len(paid.releases) == 1
    elsewhere = pickle.loads(pickle.dumps(mean(account=paid)))
    elsewhere.update(torch.ones(3))
    with pytest.raises(LedgerError, match="no account"):
        elsewhere.compute()


def test_a_budget_that_is_spent_gives_no_number(caplog):
    paid = account(budget=1.0)
    with pytest.raises(BudgetExhaustedError):
        paid.charge(Release(0.1, 1.0, 1))
    metric = mean(noise=0.1, account=paid)
    metric.update(torch.ones(3))
    with caplog.at_level(logging.WARNING):
        assert math.isnan(metric.compute())
    assert "would exceed the budget" in caplog.text
    assert paid.releases == []


def test_ranks_add_up_before_there_is_noise():
    paid = account()
    metric = mean(public_rows=6, account=paid)
    metric.dist_sync_fn = lambda value, group: [value, value]
    metric.distributed_available_fn = lambda: True
    metric.update(torch.ones(3))
    assert float(metric.compute()) == pytest.approx(1.0, abs=1e-4)
    assert len(paid.releases) == 1


# Forks after the imports, of which each process would else have its own.
TWO_RANKS = """
import os, sys
from datetime import timedelta
import torch
from torch import distributed
from lightning_secure.metrics import PrivateMean
from lightning_secure.privacy.released.sums import PrivacyAccount

first = os.fork()
rank = int(first == 0)
store = distributed.FileStore(sys.argv[1], 2)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=2,
                               timeout=timedelta(seconds=30))
account = PrivacyAccount(delta=1e-5)
metric = PrivateMean(bounds=(0, 4), noise_multiplier=20.0, public_rows=1000, account=account)
metric.update(torch.full((250,), 1.0 + rank))
if rank == 0:  # one rank has more batches than the other
    metric.update(torch.full((500,), 3.0))
found = [float(metric.compute()), float(metric.compute())]
gathered = [None, None]
distributed.all_gather_object(gathered, (found, [tuple(r) for r in account.releases]))
distributed.destroy_process_group()
if rank == 0:
    os.waitpid(first, 0)
    print(gathered)
"""


def test_ranks_publish_one_value_with_noise_added_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", TWO_RANKS, str(tmp_path / "store")],
        env={**os.environ, "PYTHONPATH": str(Path(lightning_secure.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (one, paid), (other, paid_there) = ast.literal_eval(done.stdout)
    assert len({*one, *other}) == 1, "not a value for each rank, whose noise could be averaged"
    assert one[0] != 2.25
    assert abs(one[0] - 2.25) < 6 * 20 * 2 / 1000
    assert paid == paid_there


def test_what_a_training_step_told_it_is_forgotten_with_what_it_released():
    metric = mean()
    metric.update(torch.ones(3))
    before = metric.compute()
    with metrics_kept_apart(torch.nn.ModuleList([metric])):
        metric.update(torch.full((30,), 4.0))
        assert metric.compute() > before
    assert metric.compute() == before


def test_calling_it_returns_nothing():
    paid = account()
    assert mean(account=paid)(torch.ones(3)) is None
    assert paid.releases == []


def test_an_accuracy_counts_rows():
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    for preds in (scores, scores.argmax(1)):
        metric = PrivateAccuracy(noise_multiplier=1e-6, public_rows=4, account=account())
        metric.update(preds, torch.tensor([1, 0, 1, 1]))
        assert float(metric.compute()) == pytest.approx(0.75, abs=1e-4)
    with pytest.raises(ConfigError, match="must be class numbers"):
        metric.update(torch.rand(4), torch.ones(4))
    with pytest.raises(ConfigError, match="one class a row"):
        metric.update(torch.rand(4, 2), torch.ones(3))


def test_what_is_out_of_range_is_refused():
    for bounds in ((1, 0), (0, 0), (0, math.inf), (0,)):
        with pytest.raises(ConfigError, match="bounds"):
            mean(bounds=bounds)
    with pytest.raises(ConfigError, match="noise_multiplier"):
        mean(noise=0.0)
    with pytest.raises(ConfigError, match="public_rows"):
        mean(public_rows=0)
    with pytest.raises(ConfigError, match=r"shape \(rows,\)"):
        mean().update(torch.ones(3, 1))
