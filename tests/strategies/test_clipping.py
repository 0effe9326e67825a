"""Clipping by layers and to a bound that follows, in whole runs."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.errors import ConfigError, LedgerError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.carried_ledger import ledger_of
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import calibrate_noise, epsilon_pld
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import (
    AdaptiveClipping,
    FlatClipping,
    PerLayerClipping,
)
from lightning_secure.privacy.released.adaptive_bound import BOUND, COUNT
from lightning_secure.privacy.released.step_metrics import ClippedFraction, GradientNorm
from lightning_secure.strategies.private import PrivateStrategy

ROWS, WIDTH = 32, 60
Z, COUNT_NOISE = 0.8, 5.0
ADAPTIVE = AdaptiveClipping(learning_rate=0.7, noise_multiplier=COUNT_NOISE)


class Model(L.LightningModule):
    """Every row's gradient has the same norm, by default next to none."""

    def __init__(self, size=1e-5):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.size = size

    def training_step(self, batch, batch_idx):
        return self.size * self.layer(batch[0]).sum(1).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(ROWS, WIDTH) / WIDTH**0.5), batch_size=8)


class Gradients(Callback):
    def __init__(self):
        self.found, self.bounds, self.metrics = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.bounds.append(trainer.strategy.ledger.clip_bound)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})


def fit(tmp_path, model, *, clipping=ADAPTIVE, dp=None, ckpt=None, epochs=1):
    dp = {"noise_multiplier": Z, "delta": 1e-5, "max_grad_norm": 2.0, **(dp or {})}
    spy = Gradients()
    trainer = L.Trainer(
        strategy=PrivateStrategy(DPConfig(clipping=clipping, **dp)),
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        callbacks=[spy],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, ckpt_path=ckpt)
    return spy, trainer


def test_the_noise_follows_the_bound_and_so_does_the_account_of_both(tmp_path):
    # Without gradients nothing is clipped, so that the bound falls, and the noise is all there is.
    model, count_noise = Model(), 1.0
    adaptive = AdaptiveClipping(learning_rate=0.7, noise_multiplier=count_noise)
    spy, _ = fit(tmp_path, model, clipping=adaptive)
    bounds = [2.0, *spy.bounds[1:]]
    assert spy.bounds[0] is None
    for gradient, bound in zip(spy.found, bounds, strict=True):
        assert float(gradient.std()) == pytest.approx(Z * bound / 8, rel=0.06)
    ledger = ledger_of(model)
    assert ledger.clip_bound not in bounds
    # It falls by 0.35 a step in its logarithm, and the noise of the count is 0.04.
    assert min(bounds) < 1.6
    # Theorem 1 of Andrew et al.: the gradient's noise and the count's are one step's.
    together = (Z**-2 + count_noise**-2) ** -0.5
    assert ledger.releases == [Release(pytest.approx(together, rel=1e-12), 0.25, 4)]
    assert ledger.epsilon() == pytest.approx(
        epsilon_pld([Release(together, 0.25, 4)], delta=1e-5), rel=1e-6
    )
    assert spy.metrics[0][BOUND] == pytest.approx(sum(bounds) / len(bounds), rel=1e-5)


def test_rows_are_clipped_to_the_bound_of_their_step(tmp_path):
    # All rows are drawn, all are too long, and there is no noise: the gradient is the bound.
    quiet = {"noise_multiplier": None, "insecure_noise_off": True, "expected_batch_size": ROWS}
    spy, trainer = fit(tmp_path, Model(size=1e4), dp=quiet, clipping=ADAPTIVE)
    assert float(spy.found[0].norm()) == pytest.approx(2.0, rel=1e-4)
    assert trainer.strategy.ledger.clip_bound == pytest.approx(2.0 * math.exp(0.35), rel=1e-6)
    assert spy.metrics[0][COUNT] == pytest.approx(1.0)


def test_the_count_is_told_with_its_noise_only(tmp_path):
    # Every row is drawn and every row is too long, so what is told would be one.
    every = {"expected_batch_size": ROWS, "max_physical_batch_size": 7}
    slow = AdaptiveClipping(learning_rate=0.01, noise_multiplier=COUNT_NOISE)
    spy, _ = fit(tmp_path, Model(size=1e4), dp=every, epochs=60, clipping=slow)
    found = torch.tensor([metrics[COUNT] for metrics in spy.metrics])
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(found.std()) == pytest.approx(COUNT_NOISE / 2 / ROWS, rel=0.35)


def test_a_budget_is_spent_on_both(tmp_path):
    model = Model()
    fit(tmp_path, model, dp={"noise_multiplier": None, "target_epsilon": 3.0, "accountant": "rdp"})
    together = calibrate_noise(
        target_epsilon=3.0, delta=1e-5, sample_rate=0.25, steps=4, accountant="rdp"
    )
    ledger = ledger_of(model)
    assert ledger.noise_multiplier == pytest.approx((together**-2 - COUNT_NOISE**-2) ** -0.5)
    assert 2.99 < ledger.epsilon() <= 3.0


def test_a_resumed_run_goes_on_with_its_bound(tmp_path):
    path = tmp_path / "run.ckpt"
    _, trainer = fit(tmp_path, Model())
    bound = trainer.strategy.ledger.clip_bound
    trainer.save_checkpoint(path)
    spy, trainer = fit(tmp_path, Model(), ckpt=path, epochs=2)
    assert spy.bounds[0] == bound
    assert float(spy.found[0].std()) == pytest.approx(Z * bound / 8, rel=0.06)
    assert trainer.strategy.ledger.steps == 8


def test_an_account_with_a_bound_that_cannot_be_is_refused(tmp_path):
    model = Model()
    fit(tmp_path, model)
    state = ledger_of(model).state_dict()
    assert Ledger.from_state_dict(state).clip_bound == state["clip_bound"] < 2.0
    for bound in (0.0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(LedgerError):
            Ledger.from_state_dict({**state, "clip_bound": bound})
    del state["clip_bound"]  # an account from before there was one
    assert Ledger.from_state_dict(state).clip_bound is None


def test_layers_are_clipped_apart_at_the_same_price(tmp_path):
    quiet = {"noise_multiplier": None, "insecure_noise_off": True, "expected_batch_size": ROWS}
    spy, _ = fit(tmp_path, Model(size=1e4), dp=quiet, clipping="per_layer")
    assert float(spy.found[0].norm()) == pytest.approx(2.0, rel=1e-4)
    model = Model()
    spy, _ = fit(tmp_path, model, clipping=PerLayerClipping(parts={"layer": 1.0}))
    assert ledger_of(model).releases == [Release(Z, 0.25, 4)]
    assert float(torch.stack(spy.found).std()) == pytest.approx(Z * 2.0 / 8, rel=0.06)


@pytest.mark.parametrize("name", [COUNT, BOUND])
def test_the_name_of_the_count_is_taken(name):
    config = DPConfig(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, clipping="adaptive")
    metrics = {name: GradientNorm(noise_multiplier=5.0, largest=1.0)}
    with pytest.raises(ConfigError, match="releases"):
        PrivateStrategy(config, released_metrics=metrics)


def test_rows_clipped_as_a_whole_are_not_counted_by_layers():
    config = DPConfig(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, clipping="per_layer")
    with pytest.raises(ConfigError, match="whole gradient is clipped"):
        PrivateStrategy(config, released_metrics={"c": ClippedFraction(noise_multiplier=5.0)})


def test_a_strategy_clips_only_as_it_was_shown_to():
    class Another(PrivateStrategy):
        clippings = (FlatClipping,)

    config = DPConfig(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, clipping="adaptive")
    with pytest.raises(UnsupportedTrainerOptionError, match="Another does not clip by"):
        Another(config)
