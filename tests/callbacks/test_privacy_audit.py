from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.callbacks.budget import PrivacyBudget
from lightning_secure.callbacks.privacy_audit import PrivacyAudit
from lightning_secure.errors import ConfigError
from lightning_secure.privacy.auditing import OneRunAudit, canary_audit
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients import clipped_sums
from lightning_secure.strategies.private import PrivateStrategy

CANARIES = 1000
MANY = 20_000


class Model(L.LightningModule):
    """A weight for each canary, whose input is 1 there and 0 elsewhere."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(CANARIES, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def losses(self, batch):
        return -100 * self.layer(batch[0]).squeeze(1)

    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def canaries(chosen=None):
    rows = torch.eye(CANARIES)
    return TensorDataset(rows if chosen is None else rows[torch.from_numpy(chosen)])


def strategy(tmp_path, **settings):
    settings = {
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "max_grad_norm": 1.0,
        # All rows take part, and the public numbers do not depend on which canaries do.
        "public_dataset_size": CANARIES,
        "expected_batch_size": CANARIES,
        "max_physical_batch_size": 300,
        **settings,
    }
    return PrivateStrategy(DPConfig(**settings), journal=tmp_path / "journal")


class Tokens(Model):
    """The same for many more of them, by their numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Embedding(MANY, 1, _weight=torch.zeros(MANY, 1))


def fit(tmp_path, rows, callbacks=(), *, module=None, **options):
    module = module or Model()
    trainer = L.Trainer(
        **{
            "strategy": strategy(tmp_path),
            "accelerator": "cpu",
            "callbacks": list(callbacks),
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )
    trainer.fit(module, DataLoader(rows, batch_size=CANARIES))
    return trainer, module


def test_a_whole_private_run_comes_close_to_its_claim_and_not_above(tmp_path):
    claims = []

    everybody = {"public_dataset_size": MANY, "expected_batch_size": MANY}

    def run(included):
        rows = TensorDataset(torch.from_numpy(included).nonzero().squeeze(1))
        private = strategy(tmp_path, **everybody, max_physical_batch_size=4000)
        trainer, module = fit(tmp_path, rows, module=Tokens(), strategy=private)
        claims.append(trainer.strategy.ledger.epsilon())
        return module.layer.weight.detach().flatten().numpy() * MANY

    report = canary_audit(
        run,
        canaries=MANY,
        claimed=lambda: claims[-1],
        delta=1e-5,
        runs=4,
        # One in a million, for the coins and the noise are the operating system's.
        confidence=1 - 1e-6,
        gaussian=True,
    )
    assert report.claimed == pytest.approx(4.3772, rel=1e-4)
    assert 3.0 <= report.lower_bound_gaussian <= 4.38
    assert 1.0 < report.lower_bound <= 4.38
    report.require()


def audited(tmp_path, **options):
    audit = OneRunAudit(canaries())
    found = PrivacyAudit(
        audit, losses=lambda module, batch: module.losses(batch), canaries=5000, most_steps=2
    )
    rows = audit.among(TensorDataset(torch.eye(CANARIES)[:0]))
    trainer, _ = fit(tmp_path, rows, [PrivacyBudget(), found], **options)
    return trainer, found.reports


def test_both_lower_bounds_are_logged_beside_epsilon(tmp_path, caplog):
    trainer, (canary, one_run) = audited(tmp_path)
    metrics = trainer.callback_metrics
    assert metrics["privacy/epsilon_lower_bound_canary"] == pytest.approx(canary.lower_bound)
    assert metrics["privacy/epsilon_lower_bound_one_run"] == pytest.approx(one_run.lower_bound)
    assert 0.5 < canary.lower_bound <= metrics["privacy/epsilon"]
    assert 0.3 < one_run.lower_bound <= metrics["privacy/epsilon"]
    assert canary.claimed == one_run.claimed == pytest.approx(float(metrics["privacy/epsilon"]))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_run_that_does_not_clip_is_found_out(tmp_path, caplog, monkeypatch):
    # The weakness itself, put in.
    monkeypatch.setattr(
        clipped_sums, "clip_factor", lambda norms, max_grad_norm: torch.ones_like(norms)
    )
    _, reports = audited(tmp_path, max_epochs=-1, max_steps=1)
    assert [report.holds for report in reports] == [False, False]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2


def test_the_module_is_left_in_the_modes_it_had(tmp_path):
    found = PrivacyAudit(OneRunAudit(canaries()), losses=lambda module, batch: module.losses(batch))
    module = Model()
    module.layer.eval()
    trainer = L.Trainer(strategy=strategy(tmp_path), accelerator="cpu", logger=False)
    trainer.strategy.connect(module)
    found._scores(found._one_run, trainer, module)
    assert module.training
    assert not module.layer.training


def test_a_run_without_noise_is_not_replayed(tmp_path):
    loud = strategy(tmp_path, noise_multiplier=None, insecure_noise_off=True)
    found = PrivacyAudit()
    fit(tmp_path, canaries(), [found], strategy=loud)
    assert found.reports == []


def test_what_cannot_be_audited_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        PrivacyAudit(OneRunAudit(canaries()))
    with pytest.raises(ConfigError, match="claims nothing"):
        fit(tmp_path, canaries(), [PrivacyAudit()], strategy=SingleDeviceStrategy("cpu"))
    audit = OneRunAudit(canaries())
    found = PrivacyAudit(audit, losses=lambda module, batch: module.losses(batch))
    trainer = L.Trainer(strategy=strategy(tmp_path), accelerator="cpu", logger=False)

    class Several:
        world_size, strategy = 2, trainer.strategy

    with pytest.raises(ConfigError, match="tossed its own coins"):
        found.setup(Several, Model(), "fit")
    shared = OneRunAudit(canaries(), included=np.ones(CANARIES, bool))
    PrivacyAudit(shared, losses=lambda m, b: m.losses(b)).setup(Several, Model(), "fit")
