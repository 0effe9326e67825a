from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_secure.errors import ConfigError, PrivacyError, UnsupportedModelError
from lightning_secure.privacy.accounting.ledger import (
    Ledger,
    attach_journal,
    known_releases,
    restore_journal,
)
from lightning_secure.privacy.accounting.mechanism import Release, joint_noise
from lightning_secure.privacy.accounting.pld import calibrate_noise, epsilon_pld
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.released.step_metrics import (
    ClippedFraction,
    GradientNorm,
    ReleasedMetric,
    RowMean,
    StepMetrics,
    require_rows_apart,
)
from lightning_secure.privacy.run_contract import begin_ledger

DELTA = 1e-5
METRICS = {
    "clipped": ClippedFraction(noise_multiplier=4.0),
    "norm": GradientNorm(noise_multiplier=5.0, largest=8.0),
    "nll": RowMean(noise_multiplier=6.0, entry="nll", bounds=(-1.0, 3.0)),
}
OUTPUT = {"loss": torch.tensor(1.0), "nll": torch.tensor([0.0, 5.0, -9.0, torch.nan])}
NORMS = torch.tensor([0.5, 2.0, 100.0, torch.inf])


def metrics(chosen=METRICS):
    return StepMetrics(chosen, max_grad_norm=1.0)


def test_values_are_means_over_the_expected_batch():
    step = metrics()
    for part in (slice(0, 3), slice(3, 4)):
        step.add_chunk({"nll": OUTPUT["nll"][part]}, NORMS[part])
    sums = step.take(torch.device("cpu"))
    found = step.release(sums, GaussianNoise(), expected_batch_size=4, on=False)
    assert found["clipped"] == pytest.approx(3 / 4)
    assert found["norm"] == pytest.approx((0.5 + 2 + 8 + 8) / 4)
    assert found["nll"] == pytest.approx((0 + 3 - 1 + 1) / 4)


def test_one_row_changes_each_sum_by_one_unit_at_most():
    for row in range(4):
        step = metrics()
        step.add_chunk({"nll": OUTPUT["nll"][row : row + 1]}, NORMS[row : row + 1])
        assert step.take(torch.device("cpu")).abs().max() <= 1


def test_each_metric_has_its_own_noise():
    step, noise = metrics(), GaussianNoise(1)
    step.begin_step()
    nothing_drawn = step.take(torch.device("cpu"))
    found = [step.release(nothing_drawn, noise, expected_batch_size=2) for _ in range(2000)]
    widths = {name: torch.stack([f[name] for f in found]).std() for name in METRICS}
    # Half the width of the bounds, times the multiplier, over the batch.
    assert widths["clipped"] == pytest.approx(0.5 * 4 / 2, rel=0.1)
    assert widths["norm"] == pytest.approx(4 * 5 / 2, rel=0.1)
    assert widths["nll"] == pytest.approx(2 * 6 / 2, rel=0.1)
    values = torch.stack([torch.stack(list(f.values())) for f in found])
    assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 0.1


def test_sums_are_those_of_one_step():
    step = metrics()
    step.add_chunk(OUTPUT, NORMS)
    step.begin_step()
    assert step.take(torch.device("cpu")).tolist() == [0, 0, 0]
    step.add_chunk(OUTPUT, NORMS)
    step.take(torch.device("cpu"))
    assert step.take(torch.device("cpu")).tolist() == [0, 0, 0]


def test_an_entry_must_be_one_number_a_row():
    step = metrics()
    for output in (
        torch.tensor(1.0),
        {"loss": torch.tensor(1.0)},
        {"nll": torch.tensor(1.0)},
        {"nll": torch.ones(3)},
        {"nll": [1.0] * 4},
    ):
        with pytest.raises(UnsupportedModelError, match="one number a row"):
            step.add_chunk(output, NORMS)


def test_metrics_out_of_range_are_refused():
    with pytest.raises(TypeError, match="abstract"):
        ReleasedMetric(noise_multiplier=1.0)  # says nothing of a row, nor between what it lies
    with pytest.raises(ConfigError, match="noise_multiplier"):
        ClippedFraction(noise_multiplier=0)
    with pytest.raises(ConfigError, match="largest"):
        GradientNorm(noise_multiplier=1.0, largest=-1.0)
    with pytest.raises(ConfigError, match="bounds"):
        RowMean(noise_multiplier=1.0, entry="nll", bounds=(1, 1))
    with pytest.raises(ConfigError, match="'loss' must be a RowMean"):
        metrics({"loss": 3.0})


# ---------------------------------------------------------------- what it costs


def test_releases_of_one_draw_are_one_release_of_all():
    """Against the loss of the pair itself, of which the draw decides both halves at once."""
    q, s1, s2 = 0.2, 1.0, 1.5
    noise = joint_noise(s1, s2)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 2, generator=rng, dtype=torch.float64) * torch.tensor([s1, s2])
    # Likelihood ratio of a draw with one more row against without: all of a row or nothing.
    ratio = 1 - q + q * torch.exp((x / torch.tensor([s1, s2]).square()).sum(1) - noise**-2 / 2)
    for epsilon in (0.2, 0.5, 1.0):
        measured = (ratio - math.exp(epsilon)).clamp(min=0).mean()
        y = torch.randn(200_000, generator=rng, dtype=torch.float64) * noise
        one = 1 - q + q * torch.exp(y / noise**2 - noise**-2 / 2)
        assert measured == pytest.approx(
            float((one - math.exp(epsilon)).clamp(min=0).mean()), rel=0.1
        )
        # As if each had drawn rows of its own: less than what is revealed.
        a, b = (x[:, i] / s**2 - s**-2 / 2 for i, s in enumerate((s1, s2)))
        apart = (1 - q + q * torch.exp(a)) * (1 - q + q * torch.exp(b))
        assert (apart - math.exp(epsilon)).clamp(min=0).mean() < 0.9 * measured


def ledger(noise=1.0, **settings):
    public = PublicNumbers(
        dataset_size=1000, dataset_size_declared=True, expected_batch_size=10, steps_per_epoch=100
    )
    settings = {"delta": DELTA, "max_grad_norm": 1.0, "noise_multiplier": noise, **settings}
    return Ledger(public=public, **settings)


def test_a_step_is_charged_for_all_that_it_releases():
    account = ledger()
    account.record()
    account.release_beside([2.0])
    for _ in range(3):
        account.record()
    joint = 1 / math.sqrt(1 + 1 / 4)
    assert account.releases == [Release(1.0, 0.01, 1), Release(pytest.approx(joint), 0.01, 3)]
    assert account.epsilon(more_steps=7) == epsilon_pld(
        [Release(1.0, 0.01, 1), Release(joint, 0.01, 10)], delta=DELTA
    )


def test_without_noise_there_is_none_together():
    assert joint_noise(0.0, 2.0) == 0


def test_the_budget_counts_what_each_step_will_release():
    plain, beside = ledger(accountant="rdp"), ledger(accountant="rdp")
    beside.release_beside([1.0])
    taken = [0, 0]
    for number, account in enumerate((plain, beside)):
        while account.affords_a_step(2.3) and taken[number] < 200:
            account.record()
            taken[number] += 1
        assert account.epsilon() <= 2.3
    assert 0 < taken[1] < taken[0]
    # Metrics that are added later make what was known about the budget unknown.
    late = ledger(accountant="rdp")
    assert late.affords_a_step(2.3)
    late.release_beside([0.05])
    assert not late.affords_a_step(2.3)


def test_checkpoints_know_what_each_step_releases():
    account = ledger()
    account.release_beside([3.0])
    restored = Ledger.from_state_dict(account.state_dict())
    assert restored.beside == (3.0,)
    old = account.state_dict()
    del old["beside"]
    assert Ledger.from_state_dict(old).beside == ()


def begun(**settings):
    config = DPConfig(delta=DELTA, max_grad_norm=1.0, expected_batch_size=10, **settings)
    return lambda beside: begin_ledger(
        config, rows=1000, batch_size=10, planned_steps=lambda per_epoch: 200, beside=beside
    )


def test_noise_is_calibrated_for_all_that_is_released():
    begin = begun(target_epsilon=1.0, accountant="rdp")  # which takes no time
    alone, beside = begin(()), begin((4.0, 5.0))
    assert beside.noise_multiplier > alone.noise_multiplier
    assert beside.step.noise_multiplier == pytest.approx(alone.noise_multiplier, rel=1e-9)
    for account in (alone, beside):
        assert account.epsilon(more_steps=200) == pytest.approx(1.0, rel=2e-3)
        assert account.epsilon(more_steps=200) <= 1.0
    needed = calibrate_noise(
        target_epsilon=1.0, delta=DELTA, sample_rate=0.01, steps=200, accountant="rdp"
    )
    with pytest.raises(PrivacyError, match="released metrics alone spend the budget"):
        begin((needed * 0.99,))


def test_a_lost_journal_is_charged_for_the_most_that_a_step_has_released(tmp_path):
    account = ledger()
    account.release_beside([1.0])
    attach_journal(account, tmp_path)
    account.record()
    account.release_beside([])
    account.close_journal()
    restore_journal(account, tmp_path / "new", steps=5)
    joint = pytest.approx(1 / math.sqrt(2))
    assert known_releases(account, tmp_path / "new") == [Release(joint, 0.01, 5)]


# ---------------------------------------------------------------- rows that are mixed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)


def entries(step, batch=None, entry="nll"):
    net = Net()
    batch = (
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) if batch is None else batch
    )
    require_rows_apart([entry], net, lambda rows: step(net, rows), batch, size=len(batch))


def test_numbers_of_their_own_rows_pass():
    entries(lambda net, x: {"nll": net.layer(x).squeeze(1)})
    entries(lambda net, x: {"nll": nn.functional.dropout(net.layer(x).squeeze(1))})


@pytest.mark.parametrize(
    "mixed",
    [
        lambda y: y - y.mean(),
        lambda y: y.softmax(0),
        lambda y: y.sum().expand(len(y)),
        lambda y: y.roll(1),
    ],
    ids=["centred", "softmax", "sum", "rolled"],
)
def test_numbers_of_other_rows_are_refused(mixed):
    with pytest.raises(UnsupportedModelError, match="when another row does"):
        entries(lambda net, x: {"nll": mixed(net.layer(x).squeeze(1))})


def test_a_missing_entry_is_found_before_the_first_step():
    with pytest.raises(UnsupportedModelError, match="one number a row"):
        entries(lambda net, x: {"loss": net.layer(x).mean()})
