from __future__ import annotations

import copy
import io
import logging
import math

import pytest
import torch

from lightning_secure.errors import ConfigError, LedgerError
from lightning_secure.privacy.accounting.ledger import HasLedger, Ledger
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.run_contract import begin_ledger, require_same_promise

PUBLIC = PublicNumbers(
    dataset_size=1000, dataset_size_declared=False, expected_batch_size=10, steps_per_epoch=100
)


def ledger(**changes):
    fields = {"delta": 1e-5, "max_grad_norm": 1.0, "noise_multiplier": 1.0, "public": PUBLIC}
    return Ledger(**{**fields, **changes})


def test_steps_are_entered_and_add_up():
    account = ledger()
    assert (account.steps, account.epsilon()) == (0, 0.0)
    for _ in range(1000):
        account.record()
    assert account.releases == [Release(1.0, 0.01, 1000)]
    assert account.steps == 1000
    assert account.epsilon() == pytest.approx(1.8282, rel=1e-3)
    assert account.epsilon_rdp() == pytest.approx(2.1014, rel=1e-3)
    assert account.epsilon(more_steps=1) > account.epsilon()


def test_the_journals_key_is_in_no_repr():
    account = ledger()
    key = account.state_dict()["journal_key"]
    assert len(key) == 64
    assert key not in repr(account) + repr(account._state())


def test_other_noise_is_another_entry():
    account = ledger()
    account.record()
    account.noise_multiplier = 2.0
    account.record()
    assert account.releases == [Release(1.0, 0.01, 1), Release(2.0, 0.01, 1)]


def test_a_run_that_is_not_private_has_no_epsilon():
    account = ledger(insecure=("insecure_seed",))
    account.record()
    assert not account.private
    assert account.epsilon() == account.epsilon_rdp() == math.inf


def test_the_budget_is_asked_about_the_next_step():
    account = ledger()
    assert account.affords_a_step(None)
    steps = 0
    while account.affords_a_step(0.8) and steps < 300:
        account.record()
        steps += 1
    assert account.epsilon() <= 0.8 < account.epsilon(more_steps=1)
    assert steps == account.steps > 10
    assert account.affords_a_step(0.9)
    assert ledger(insecure=("insecure_noise_off",)).affords_a_step(0.1)


def test_a_calibrated_run_needs_no_second_look():
    account = ledger()
    account.certify(0.5, steps=3)
    for _ in range(3):
        assert account.affords_a_step(0.5)
        account.record()


def test_it_travels_in_a_weights_only_checkpoint():
    account = ledger(insecure=("insecure_seed",), secure_noise=True)
    account.record()
    buffer = io.BytesIO()
    torch.save(account.state_dict(), buffer)
    buffer.seek(0)
    again = Ledger.from_state_dict(torch.load(buffer, weights_only=True))
    assert again.state_dict() == account.state_dict()
    assert again.run_id == account.run_id
    assert again.public == PUBLIC


@pytest.mark.parametrize(
    "change",
    [
        lambda s: None,
        lambda s: {},
        lambda s: {**s, "version": 3},
        lambda s: {k: v for k, v in s.items() if k != "releases"},
        lambda s: {**s, "releases": [[1.0, 0.1]]},
        lambda s: {**s, "releases": "x"},
        lambda s: {**s, "releases": [["a", 0.1, 1]]},
        lambda s: {**s, "releases": [[1.0, 0.1, -5]]},
        lambda s: {**s, "releases": [[1.0, 1.5, 5]]},
        lambda s: {**s, "releases": [[-1.0, 0.5, 5]]},
        lambda s: {**s, "releases": [[float("nan"), 0.5, 5]]},
        lambda s: {**s, "public": {"dataset_size": 5}},
        lambda s: {**s, "public": None},
        lambda s: {**s, "delta": None},
        lambda s: {**s, "insecure": None},
    ],
)
def test_a_damaged_ledger_is_refused(change):
    account = ledger()
    account.record()
    with pytest.raises(LedgerError, match="Nothing was resumed"):
        Ledger.from_state_dict(change(copy.deepcopy(account.state_dict())))


# ---------------------------------------------------------------- beginning and going on


def config(**changes):
    return DPConfig(**{"delta": 1e-5, "max_grad_norm": 1.0, "noise_multiplier": 1.0, **changes})


def begin(rows=1000, batch_size=32, planned=lambda per_epoch: 3 * per_epoch, **changes):
    return begin_ledger(config(**changes), rows=rows, batch_size=batch_size, planned_steps=planned)


def test_public_numbers_are_read_once():
    public = begin().public
    assert (public.dataset_size, public.expected_batch_size) == (1000, 32)
    assert public.steps_per_epoch == 32
    assert public.sample_rate == 0.032
    assert not public.dataset_size_declared


def test_declared_numbers_come_first():
    public = begin(public_dataset_size=2000, expected_batch_size=50).public
    assert (public.dataset_size, public.dataset_size_declared) == (2000, True)
    assert (public.expected_batch_size, public.steps_per_epoch) == (50, 40)


def test_the_ledger_says_which_promise_holds(caplog):
    """One row more changes the rate of every row, unless the number of rows was declared."""
    with caplog.at_level(logging.WARNING, "lightning_secure"):
        counted = begin(rows=1000)
    assert "declares no number of rows" in caplog.text
    assert "zero-out-one-row" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lightning_secure"):
        declared = begin(rows=1000, public_dataset_size=1000)
        begin(noise_multiplier=None, insecure_noise_off=True)
    assert not caplog.records
    assert begin(rows=1001).public.sample_rate != counted.public.sample_rate
    same = begin(rows=1001, public_dataset_size=1000).public
    assert same == declared.public
    for account, adjacency in (
        (counted, "zero-out-one-row"), (declared, "add-or-remove-one-row")
    ):  # fmt: skip
        state = account.state_dict()
        assert account.adjacency == state["adjacency"] == adjacency
        # As ledgers say that were written before, whatever the number was.
        old = {**state, "adjacency": "add-or-remove-one-row"}
        assert Ledger.from_state_dict(old).adjacency == adjacency


@pytest.mark.parametrize("rows", [1, 2, 93, 186, 1999])
def test_an_epoch_has_no_step_too_few(rows):
    """``int(1 / (1 / n))`` is wrong for 141 of the numbers below 2000, 93 among them."""
    assert begin(rows=rows, batch_size=1, delta=1e-6).public.steps_per_epoch == rows


def test_a_batch_larger_than_the_dataset_is_the_dataset():
    assert begin(rows=20, batch_size=512).public.sample_rate == 1.0
    with pytest.raises(ConfigError, match="expected_batch_size=21"):
        begin(rows=20, expected_batch_size=21)


def test_the_noise_follows_the_budget_and_the_plan():
    account = begin(noise_multiplier=None, target_epsilon=2.0)
    account.releases = [Release(account.noise_multiplier, account.public.sample_rate, 96)]
    assert 1.998 <= account.epsilon() <= 2.0
    more = begin(noise_multiplier=None, target_epsilon=2.0, planned=lambda n: 9 * n)
    assert more.noise_multiplier > account.noise_multiplier


@pytest.mark.parametrize(
    ("rows", "batch_size", "steps", "target", "noise"),
    [
        (1, 1, 1, 4.3772, 1.0),
        (100, 1, 10_000, 0.9470, 4.0),
        (100, 1, 1000, 1.8282, 1.0),
        (60_000, 256, 14_062, 2.3817, 1.1),
        (50_000, 4096, 875, 0.9028, 10.0),
    ],
)
def test_calibration_finds_the_noise_of_the_reference_values(
    rows, batch_size, steps, target, noise
):
    account = begin(
        rows=rows,
        batch_size=batch_size,
        planned=lambda _: steps,
        noise_multiplier=None,
        target_epsilon=target,
    )
    assert account.noise_multiplier == pytest.approx(noise, rel=1e-3)
    assert target * (1 - 1e-3) <= account.epsilon(more_steps=steps) <= target


def test_given_noise_is_taken_as_it_is():
    assert begin(target_epsilon=2.0).noise_multiplier == 1.0
    off = begin_ledger(
        DPConfig(delta=1e-5, max_grad_norm=1.0, insecure_noise_off=True),
        rows=10,
        batch_size=2,
        planned_steps=lambda n: n,
    )
    assert off.noise_multiplier == 0.0
    assert not off.private


def test_a_large_delta_is_remarked_on(caplog):
    with caplog.at_level(logging.WARNING):
        begin(delta=0.01)
    assert "1/1000" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 1e-6},
        {"max_grad_norm": 2.0},
        {"noise_multiplier": 1.1},
        {"expected_batch_size": 33},
        {"public_dataset_size": 999},
        {"insecure_seed": 1},
    ],
)
def test_a_run_does_not_go_on_under_another_promise(change):
    account = begin()
    require_same_promise(config(), account)
    require_same_promise(config(target_epsilon=9.0), account)  # the budget may change
    with pytest.raises(LedgerError, match="another promise"):
        require_same_promise(config(**change), account)


def test_a_run_of_secure_noise_goes_on_with_it_only():
    account = begin(secure_noise=True)
    assert account.secure_noise
    require_same_promise(config(secure_noise=True), account)
    with pytest.raises(LedgerError, match="secure_noise was True"):
        require_same_promise(config(), account)
    require_same_promise(config(secure_noise=True), begin())


def test_a_ledger_from_before_secure_noise_had_none():
    state = ledger().state_dict()
    del state["secure_noise"]
    assert not Ledger.from_state_dict(state).secure_noise


def test_who_has_a_ledger():
    class Strategy:
        ledger = None

        def stop_training(self):
            pass

    assert isinstance(Strategy(), HasLedger)
    assert not isinstance(object(), HasLedger)
