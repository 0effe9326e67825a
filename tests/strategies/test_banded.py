"""Whole runs with banded noise."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.callbacks.privacy_audit import PrivacyAudit
from lightning_secure.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.carried_ledger import ledger_of
from lightning_secure.privacy.accounting.ledger import Ledger, known_releases
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.noise.banded.matrix import diagonals, sensitivity
from lightning_secure.privacy.released.step_metrics import ClippedFraction
from lightning_secure.strategies.private import PrivateStrategy

ROWS, WIDTH, BATCH, EPOCH = 30, 40, 8, 4
Z, CLIP = 1.5, 2.0


class Model(L.LightningModule):
    """Gradients are next to nothing, so that what appears is noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.rows = []

    def training_step(self, batch, batch_idx):
        self.rows.append(batch[1].tolist())
        return 1e-6 * self.layer(batch[0]).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.arange(ROWS)), batch_size=BATCH)


class Gradients(Callback):
    def __init__(self):
        self.found, self.releases = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).numpy())
        self.releases.append(
            known_releases(trainer.strategy.ledger, trainer.strategy.ledger.journal_directory)
        )


def dp(**options):
    given = {"delta": 1e-5, "max_grad_norm": CLIP, "mechanism": "banded", "bands": 3}
    if "target_epsilon" not in options:
        given["noise_multiplier"] = Z
    return DPConfig(**{**given, **options})


def fit(tmp_path, *callbacks, model=None, config=None, ckpt=None, **options):
    model, spy = model or Model(), Gradients()
    strategy = PrivateStrategy(config or dp())
    trainer = L.Trainer(
        **{
            "strategy": strategy,
            "accelerator": "cpu",
            "max_epochs": 3,
            "logger": False,
            "callbacks": [spy, *callbacks],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )
    trainer.fit(model, ckpt_path=ckpt)
    return spy, trainer, model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    spy, trainer, model = fit(folder)
    path = folder / "run.ckpt"
    trainer.save_checkpoint(path)
    return spy, trainer, model, path


def balle_wang(z, delta):
    """Epsilon of one Gaussian mechanism, by theorem 8 of arXiv:1805.06530."""

    def excess(epsilon):
        a, b = 1 / (2 * z), epsilon * z
        return norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta

    return brentq(excess, 0, 100)


def test_the_noise_of_the_steps_is_one_gaussian_of_the_declared_width(run):
    spy, _, _, _ = run
    steps = 3 * EPOCH
    noise = np.stack(spy.found) * BATCH
    matrix = sum(c * np.eye(steps, k=-i) for i, c in enumerate(diagonals(3)))
    independent = matrix @ noise / CLIP
    width = Z * sensitivity(diagonals(3), steps=steps, separation=EPOCH)
    np.testing.assert_allclose(independent.std(1), width, rtol=0.1)
    correlation = np.corrcoef(independent)
    assert abs(correlation - np.eye(steps)).max() < 0.12
    # As it is released, a step takes back a part of the one before.
    assert np.corrcoef(noise)[0, 1] < -0.3
    # And so the sum of all has less noise than a sum of as many independent ones.
    assert noise.sum(0).std() < 0.7 * np.sqrt(steps) * noise[0].std()


def test_it_is_charged_once_and_before_the_first_step(run):
    spy, _, model, _ = run
    ledger = ledger_of(model)
    assert ledger.releases == [Release(Z, 1.0, 1)]
    assert spy.releases == [[Release(Z, 1.0, 1)]] * (3 * EPOCH)
    exact = balle_wang(Z, 1e-5)
    assert exact <= ledger.epsilon() <= exact * 1.001


def test_rows_come_in_one_order_each_once_an_epoch(run):
    rows = run[2].rows[-3 * EPOCH :]
    first = rows[:EPOCH]
    assert rows[EPOCH : 2 * EPOCH] == rows[2 * EPOCH :] == first
    assert sorted(row for batch in first for row in batch) == list(range(ROWS))
    assert first[0] != list(range(len(first[0])))


def test_the_checkpoint_says_what_was_promised(run):
    state = torch.load(run[3], weights_only=True)["lightning_secure"]["privacy"]
    assert state["version"] == 3  # who knows only Poisson sampling must not go on with it
    assert (state["mechanism"], state["sampling"]) == ("banded", "fixed-order")
    assert state["adjacency"] == "zero-out-one-row"
    assert Ledger.from_state_dict(state).step == Release(Z, 1.0, 1)
    lies = [
        {"mechanism": "poisson"},
        {"sampling": "poisson"},
        {"adjacency": "add-or-remove-one-row"},
    ]
    for lie in (*lies, {"mechanism": "matrix"}, {"mechanism": []}):
        with pytest.raises(LedgerError):
            Ledger.from_state_dict({**state, **lie})


def test_a_resumed_run_is_charged_as_another_mechanism(run, tmp_path):
    spy, trainer, _, path = run
    more, resumed, _ = fit(trainer.default_root_dir, ckpt=path, max_epochs=4)
    assert resumed.strategy.ledger.releases == [Release(Z, 1.0, 2)]
    assert len(more.found) == EPOCH
    # Its noise is new, and takes nothing back of the run before.
    assert abs(np.corrcoef(spy.found[-1], more.found[0])[0, 1]) < 0.1
    width = Z * sensitivity(diagonals(3), steps=EPOCH, separation=EPOCH)
    assert more.found[0].std() == pytest.approx(width * CLIP / BATCH, rel=0.1)


def test_it_goes_on_under_no_other_mechanism(run):
    _, trainer, _, path = run
    poisson = DPConfig(delta=1e-5, max_grad_norm=CLIP, noise_multiplier=Z)
    with pytest.raises(LedgerError, match="mechanism was banded and is poisson"):
        fit(trainer.default_root_dir, ckpt=path, config=poisson, max_epochs=4)


class Onwards(Callback):
    """Makes the Trainer go on, whatever it was asked."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = False
        trainer.fit_loop.max_epochs = 9


def test_no_step_is_taken_beyond_the_plan(tmp_path):
    spy = Gradients()
    with pytest.raises(BudgetExhaustedError, match="all 4 steps"):
        fit(tmp_path, Onwards(), spy, max_epochs=1)
    assert len(spy.found) == EPOCH


def test_a_plan_may_end_within_an_epoch(tmp_path):
    spy, trainer, _ = fit(tmp_path, max_epochs=-1, max_steps=6)
    assert (len(spy.found), trainer.global_step) == (6, 6)
    width = Z * sensitivity(diagonals(3), steps=6, separation=EPOCH)
    assert spy.found[0].std() == pytest.approx(width * CLIP / BATCH, rel=0.1)


class Saved(Callback):
    """Writes a checkpoint in the middle of the second epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def test_a_run_does_not_go_on_in_the_middle_of_an_epoch(tmp_path):
    path = tmp_path / "middle.ckpt"
    fit(tmp_path, Saved(path))
    spy = Gradients()
    with pytest.raises(UnsupportedTrainerOptionError, match=r"batch 2 .* where batch 0 is due"):
        fit(tmp_path, spy, ckpt=path)
    assert not spy.found


class Early(Model):
    """Ends the first epoch after its first batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 and self.trainer.current_epoch == 0 else None


def test_an_epoch_that_is_left_early_brings_no_row_back_too_soon(tmp_path):
    spy = Gradients()
    with pytest.raises(UnsupportedTrainerOptionError, match=r"batch 0 .* where batch 1 is due"):
        fit(tmp_path, spy, model=Early())
    assert len(spy.found) == 1


def test_a_budget_is_for_the_whole_fit_and_for_no_second(tmp_path):
    _, _, model = fit(tmp_path, config=dp(target_epsilon=2.0), max_epochs=1)
    ledger = ledger_of(model)
    assert balle_wang(ledger.noise_multiplier, 1e-5) == pytest.approx(2.0, rel=2e-3)
    assert ledger.epsilon() <= 2.0
    with pytest.raises(BudgetExhaustedError, match="is spent"):
        fit(tmp_path, model=model, config=dp(target_epsilon=2.0), max_epochs=1)
    assert ledger_of(model).releases == ledger.releases


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 2}, "limit_train_batches=2"),
        ({"limit_train_batches": 1}, "limit_train_batches=1"),
        ({"limit_train_batches": 0.5}, "limit_train_batches=0.5"),
        ({"reload_dataloaders_every_n_epochs": 1}, "loaded anew"),
    ],
)
def test_options_that_change_the_order_are_refused(tmp_path, options, message):
    with pytest.raises(UnsupportedTrainerOptionError, match=message):
        fit(tmp_path, **options)


def test_it_must_be_known_how_long_the_run_is(tmp_path):
    with pytest.raises(ConfigError, match="neither max_epochs nor max_steps"):
        fit(tmp_path, max_epochs=-1)


def test_bands_are_no_more_than_the_steps_of_an_epoch(tmp_path):
    with pytest.raises(ConfigError, match="5 bands needs as many steps"):
        fit(tmp_path, config=dp(bands=5))


def test_audits_of_another_mechanism_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="another mechanism"):
        fit(tmp_path, PrivacyAudit())


@pytest.mark.parametrize(
    "options",
    [
        {"mechanism": "matrix", "bands": None},
        {"bands": None},
        {"mechanism": "poisson"},
        {"bands": 0},
        {"clipping": "adaptive"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(options):
    with pytest.raises(ConfigError):
        dp(**options)


def test_steps_that_are_one_release_release_no_metrics():
    with pytest.raises(UnsupportedTrainerOptionError, match="one release"):
        PrivateStrategy(dp(), released_metrics={"c": ClippedFraction(noise_multiplier=5.0)})

    class Another(PrivateStrategy):
        banded = False

    with pytest.raises(UnsupportedTrainerOptionError, match="Another does not train"):
        Another(dp())
