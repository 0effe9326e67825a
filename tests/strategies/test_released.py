from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    PrivacyError,
    UnsupportedModelError,
)
from lightning_secure.metrics import PrivateAccuracy
from lightning_secure.privacy.accounting.carried_ledger import ledger_of
from lightning_secure.privacy.accounting.ledger import known_releases
from lightning_secure.privacy.accounting.mechanism import Release, joint_noise
from lightning_secure.privacy.accounting.pld import affordable_steps
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.released.step_metrics import ClippedFraction, GradientNorm, RowMean
from lightning_secure.strategies.private import PrivateStrategy

ROWS = 64


class Model(L.LightningModule):
    def __init__(self, accuracy=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 2)
        self.accuracy = accuracy

    def rows(self, seed=0):
        x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, (x.sum(1) > 0).long())

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = F.cross_entropy(self.layer(x), y, reduction="none")
        self.log("nll", losses.mean())
        return {"loss": losses.mean(), "nll": self.told(losses)}

    def told(self, losses):
        return losses

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self.layer(x), y)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        return DataLoader(self.rows(), batch_size=16)

    def val_dataloader(self):
        return DataLoader(self.rows(1), batch_size=16)


class Metrics(Callback):
    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append({name: float(v) for name, v in trainer.callback_metrics.items()})


METRICS = {
    "nll": RowMean(noise_multiplier=20.0, entry="nll", bounds=(0.0, 5.0)),
    "clipped": ClippedFraction(noise_multiplier=20.0),
    "norm": GradientNorm(noise_multiplier=20.0, largest=100.0),
}


def fit(tmp_path, model=None, *, metrics=METRICS, dp=None, ckpt=None, **options):
    dp = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, **(dp or {})}
    strategy = PrivateStrategy(DPConfig(**dp), released_metrics=metrics)
    spy = Metrics()
    model = model or Model()
    trainer = L.Trainer(
        **{
            "strategy": strategy,
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "callbacks": [spy],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 2,
            "limit_val_batches": 1.0 if model.accuracy is not None else 0,
            "default_root_dir": tmp_path,
            **options,
        }
    )
    trainer.fit(model, ckpt_path=ckpt)
    return spy.found, strategy, model, trainer


QUIET = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": 3}


def test_metrics_are_means_over_an_epochs_steps(tmp_path):
    # On weights that stay, so that it is known what each row has; every row is drawn in each step.
    dp = {**QUIET, "expected_batch_size": ROWS, "max_physical_batch_size": 20}
    (found,), _, model, _ = fit(tmp_path, dp=dp, max_epochs=1)
    (x, y), model = model.rows().tensors, model.requires_grad_(False)
    losses = F.cross_entropy(model.layer(x), y, reduction="none")
    residual = model.layer(x).softmax(1) - F.one_hot(y, 2)
    norms = residual.norm(dim=1) * (x.square().sum(1) + 1).sqrt()
    assert found["nll"] == pytest.approx(float(losses.clamp(0, 5).mean()), rel=1e-4)
    assert found["norm"] == pytest.approx(float(norms.mean()), rel=1e-4)
    assert found["clipped"] == pytest.approx(float((norms > 1).float().mean()), rel=1e-4)


def test_they_are_published_with_noise_and_charged_with_the_steps(tmp_path):
    runs = [fit(tmp_path / str(i), max_epochs=2) for i in range(2)]
    (one, _), strategy, _, _ = runs[0]
    assert len({round(run[0][e]["nll"], 6) for run in runs for e in (0, 1)}) == 4
    # Four steps an epoch: noise of 20 half widths over 16 rows, and its mean over four.
    assert abs(one["norm"] - 2) < 6 * 50 * 20 / 16 / 2
    assert set(one) >= {"nll", "clipped", "norm"}
    noise = joint_noise(1.0, 20.0, 20.0, 20.0)
    assert strategy.ledger.releases == [Release(pytest.approx(noise), 0.25, 8)]


def test_what_a_row_says_of_other_rows_is_refused(tmp_path):
    class Mixing(Model):
        def told(self, losses):
            return losses - losses.mean()

    with pytest.raises(UnsupportedModelError, match="under 'nll' for one row changes"):
        fit(tmp_path, Mixing())


def test_a_name_is_public_or_released():
    with pytest.raises(ConfigError, match=r"\['nll'\] are both public_metrics and released"):
        PrivateStrategy(
            DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0),
            public_metrics=["nll"],
            released_metrics=METRICS,
        )


def test_a_run_goes_on_with_other_metrics_and_is_charged_for_them(tmp_path):
    *_, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    _, strategy, _, _ = fit(tmp_path, metrics={}, ckpt=tmp_path / "run.ckpt", max_epochs=2)
    noise = pytest.approx(joint_noise(1.0, 20.0, 20.0, 20.0))
    assert strategy.ledger.releases == [Release(noise, 0.25, 4), Release(1.0, 0.25, 4)]


def test_a_release_of_once_is_charged_and_entered_in_the_journal(tmp_path):
    dp = {"target_epsilon": 20.0, "accountant": "rdp"}
    _, strategy, _, _ = fit(tmp_path, metrics={}, dp=dp)
    spent = strategy.ledger.epsilon()
    # After the fit: the journal is opened for it.
    found = strategy.release(
        torch.full((ROWS,), 3.0), bounds=(0, 4), noise_multiplier=8.0, public_rows=ROWS
    )
    assert abs(found - 3.0) < 6 * 8 * 2 / ROWS
    assert strategy.ledger.releases[-1] == Release(8.0, 1.0, 1)
    assert strategy.ledger.epsilon() > spent
    assert Release(8.0, 1.0, 1) in known_releases(strategy.ledger, tmp_path / "privacy_journal")
    with pytest.raises(BudgetExhaustedError, match="Nothing was released"):
        strategy.release(torch.ones(ROWS), bounds=(0, 4), noise_multiplier=0.2)
    assert strategy.ledger.releases[-1] == Release(8.0, 1.0, 1)
    strategy.ledger.journal_directory = None
    with pytest.raises(LedgerError, match="does not know where"):
        strategy.release(torch.ones(ROWS), bounds=(0, 4), noise_multiplier=8.0)


def test_nothing_is_released_before_there_is_an_account():
    strategy = PrivateStrategy(DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0))
    with pytest.raises(PrivacyError):
        strategy.release(torch.ones(ROWS), bounds=(0, 4), noise_multiplier=8.0)
    model = Model(PrivateAccuracy(noise_multiplier=30.0))
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", logger=False)
    with pytest.raises(LedgerError, match="no account before the first fit"):
        trainer.validate(model, verbose=False)


def test_nothing_is_released_in_a_trial(tmp_path):
    class Releasing(Model):
        def training_step(self, batch, batch_idx):
            self.trainer.strategy.release(batch[0][:, 0], bounds=(0, 4), noise_multiplier=8.0)
            return super().training_step(batch, batch_idx)

    model = Releasing()
    with pytest.raises(PrivacyError, match="only being tried out"):
        fit(tmp_path, model, metrics={})
    assert ledger_of(model) is None, "nothing was charged either"


def test_a_modules_own_metric_charges_the_run(tmp_path):
    model = Model(PrivateAccuracy(noise_multiplier=5.0, public_rows=ROWS))
    (one, two), strategy, _, trainer = fit(tmp_path, model, metrics={}, max_epochs=2)
    assert one["val_accuracy"] != two["val_accuracy"], "the weights stay, the noise does not"
    accuracy = Release(5.0, 1.0, 1)
    assert strategy.ledger.releases == [
        Release(1.0, 0.25, 4),
        accuracy,
        Release(1.0, 0.25, 4),
        accuracy,
    ]
    trainer.validate(model, verbose=False)
    assert strategy.ledger.releases[-1] == Release(5.0, 1.0, 2)


def test_metrics_of_the_module_leave_less_for_steps(tmp_path):
    plan = {"delta": 1e-5, "noise_multiplier": 1.0, "sample_rate": 0.25}
    most = affordable_steps(target_epsilon=8.0, accountant="rdp", **plan)
    model = Model(PrivateAccuracy(noise_multiplier=1.5, public_rows=ROWS))
    dp = {"target_epsilon": 8.0, "accountant": "rdp"}
    _, strategy, _, _ = fit(tmp_path, model, metrics={}, dp=dp, max_epochs=1 + most // 4)
    account = strategy.ledger
    steps = sum(release.steps for release in account.releases if release.sample_rate == 0.25)
    assert 0 < steps < most
    assert account.epsilon() <= 8.0
