"""Ways around the account and the noise that a whole run offers; each succeeded once."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.tuner import Tuner
from private_run import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_secure import AuditTrail, EncryptedCheckpointIO
from lightning_secure.errors import (
    LedgerError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.carried_ledger import ledger_of
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.randomness import FreshRandomness, WorkerInit


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.lr = 0.1

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def loader(**options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, **options)


def plain_trainer(tmp_path, **options):
    return trainer(tmp_path, strategy="auto", **options)


# ---------------------------------------------------------------- randomness inside the step


class Dropped(Model):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(200, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.draws = []

    def training_step(self, batch, batch_idx):
        self.draws.append((torch.rand(()).item(), random.random(), np.random.random()))
        return self.layer(F.dropout(batch[0], 0.5)).mean() * 10

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def dropped_sum(tmp_path, x, **dp):
    """Return the un-noised sum of one step that draws every row, under the user's seed."""
    L.seed_everything(42)
    dp = {
        "noise_multiplier": None,
        "insecure_noise_off": True,
        "expected_batch_size": 400,
        "public_dataset_size": 400,
        **dp,
    }
    model = Dropped()
    rows = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=400)
    trainer(tmp_path, dp=dp).fit(model, rows)
    return model, (torch.rand(()).item(), random.random(), np.random.random())


def test_dropout_does_not_come_from_the_users_seed(tmp_path):
    """Masks of a known seed move by one more row, and the sum by many times the clipping norm."""
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(3))
    (one, after), (two, again) = (dropped_sum(tmp_path, x) for _ in range(2))
    assert not torch.equal(one.layer.weight, two.layer.weight)
    assert all(a != b for a, b in zip(one.draws[-1], two.draws[-1], strict=True))
    # What comes after the step goes on as if the step had drawn nothing.
    assert after == again


def test_what_follows_a_step_does_not_depend_on_how_many_rows_it_drew(tmp_path):
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(3))
    small = {"max_physical_batch_size": 40}  # ten times as many draws
    assert dropped_sum(tmp_path, x)[1] == dropped_sum(tmp_path, x[1:], **small)[1]


def test_an_insecure_seed_repeats_the_randomness_of_the_steps(tmp_path):
    x = torch.randn(400, 200, generator=torch.Generator().manual_seed(3))
    one, two = (dropped_sum(tmp_path, x, insecure_seed=7)[0] for _ in range(2))
    assert one.draws == two.draws
    assert torch.equal(one.layer.weight, two.layer.weight)


class Augmented(Dataset):
    """Notes how each row was augmented."""

    def __init__(self):
        self.drawn = []

    def __len__(self):
        return 64

    def __getitem__(self, row):
        self.drawn.append(torch.rand(()).item() + random.random() + np.random.random())
        return torch.full((4,), float(row)), torch.tensor(self.drawn[-1])


class Sees(Model):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[1].detach().clone())
        return self.layer(batch[0] / 64).mean()


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_does_not_come_from_the_users_seed(tmp_path, workers):
    seen = []
    for _ in range(2):
        L.seed_everything(42, workers=True)
        model = Sees()
        rows = DataLoader(
            Augmented(), batch_size=64, num_workers=workers, multiprocessing_context="fork"
        ) if workers else DataLoader(Augmented(), batch_size=64)  # fmt: skip
        dp = {"noise_multiplier": None, "insecure_noise_off": True, "expected_batch_size": 64}
        trainer(tmp_path, dp=dp).fit(model, rows)
        seen.append(model.seen[-1])
    assert len(seen[0]) == len(seen[1]) == 64
    assert not set(seen[0].tolist()) & set(seen[1].tolist())


def test_a_workers_own_function_cannot_bring_a_seed_back():
    def user(worker):
        torch.manual_seed(worker)
        random.seed(worker)
        np.random.seed(worker)

    drawn = []
    with FreshRandomness().apart():  # so that this test changes nothing for the others
        for _ in range(2):
            WorkerInit(user)(3)
            drawn.append((torch.rand(()).item(), random.random(), np.random.random()))
    assert all(a != b for a, b in zip(*drawn, strict=True))


def test_masks_cannot_be_found_by_trying_32_bits():
    """torch's own seeding keeps 32 bits; what sets the generator's words differs in all of them."""
    fresh = FreshRandomness()
    seeds = []
    with fresh.apart():
        for _ in range(2):
            fresh.seed_all()
            seed, drawn = torch.initial_seed(), torch.rand(100)
            torch.manual_seed(seed)
            assert not torch.equal(torch.rand(100), drawn)
            seeds.append(seed)
    assert seeds[0] != seeds[1]


def test_randomness_is_put_back_after_an_error():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(()).item(), random.random(), np.random.random())
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    with pytest.raises(ZeroDivisionError), FreshRandomness().apart():
        (torch.rand(3) + random.random() + np.random.random()) / (1 // 0)
    assert (torch.rand(()).item(), random.random(), np.random.random()) == expected


# ---------------------------------------------------------------- the un-noised loss


class Watch(Callback):
    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, module, loss):
        self.seen.append(loss)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.extend(outputs.values())


class Tells(Model):
    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "largest": batch[0].max()}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        def closure():
            self.seen.append(optimizer_closure())
            return self.seen[-1]

        optimizer.step(closure=closure)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.extend(outputs.values())


def test_nobody_is_told_the_loss_without_noise(tmp_path):
    watch, model = Watch(), Tells()
    run = trainer(tmp_path, callbacks=[watch])
    run.fit(model, loader())
    assert len(watch.seen) == 2 * len(model.seen) // 2 == 16
    assert all(torch.isnan(value) for value in [*watch.seen, *model.seen])
    assert "train_loss" not in run.progress_bar_metrics
    assert not run.callback_metrics


@pytest.mark.parametrize("decides", ["callback", "scheduler"])
def test_who_decides_by_the_training_loss_is_told_that_there_is_none(tmp_path, decides, caplog):
    class Plateau(Tells):
        optimizer_step = L.LightningModule.optimizer_step

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            if decides == "callback":
                return optimizer
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": schedule, "monitor": "train_loss"}]

    stop = [EarlyStopping("train_loss", check_on_train_epoch_end=True)]
    run = trainer(tmp_path, callbacks=stop if decides == "callback" else [])
    with pytest.raises(Exception, match=r"conditioned on metric.*train_loss.*not available"):
        run.fit(Plateau(), loader())
    assert "withheld" in caplog.text


# ---------------------------------------------------------------- the account


def steps_in(path):
    ledger = Ledger.from_checkpoint(torch.load(path, weights_only=True))
    return None if ledger is None else ledger.steps


def test_a_checkpoint_has_the_account_of_its_own_weights(tmp_path):
    """A Trainer that fitted one module and saves another wrote the first one's account."""
    first, second, public = Model(), Model(), Model()
    one, two = trainer(tmp_path), trainer(tmp_path, max_epochs=3)
    one.fit(first, loader())
    two.fit(second, loader())
    for module, steps in ((second, 24), (public, None), (first, 8)):
        one.validate(module, loader(), verbose=False)
        one.save_checkpoint(tmp_path / "saved.ckpt")
        assert steps_in(tmp_path / "saved.ckpt") == steps
        assert (one.strategy.ledger and one.strategy.ledger.steps) == steps


def test_weights_of_a_tested_checkpoint_bring_their_account(tmp_path):
    run = trainer(tmp_path, max_epochs=3)
    run.fit(Model(), loader())
    run.save_checkpoint(tmp_path / "long.ckpt")
    module = Model()
    module.test_step = module.validation_step
    again = trainer(tmp_path)
    again.test(module, loader(), ckpt_path=tmp_path / "long.ckpt", verbose=False, weights_only=True)
    assert again.strategy.ledger.steps == 24
    again.fit(module, loader())
    assert again.strategy.ledger.steps == 32


def test_training_without_noise_in_between_is_noticed(tmp_path):
    module = Model()
    trainer(tmp_path).fit(module, loader())
    trainer(tmp_path).fit(module, loader())  # nothing in between
    assert ledger_of(module).steps == 16
    plain_trainer(tmp_path).fit(module, loader())
    run = trainer(tmp_path)
    for _ in range(2):  # the refusal does not settle it
        with pytest.raises(LedgerError, match=r"2 weights, 'layer.weight' first, have changed"):
            run.fit(module, loader())
    assert ledger_of(module).steps == 16


def test_a_new_head_and_a_resume_are_not_taken_for_training(tmp_path):
    module = Model()
    run = trainer(tmp_path)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        module.layer.weight.add_(1)
    again = trainer(tmp_path, max_epochs=2)
    again.fit(module, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    module.layer = nn.Linear(4, 5)
    trainer(tmp_path).fit(module, loader())
    assert ledger_of(module).steps == 24


class Sum(Model):
    bad = True

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * len(batch[0]) if self.bad else loss


def test_an_account_without_a_step_binds_nobody(tmp_path):
    module = Sum()
    with pytest.raises(UnsupportedModelError):
        trainer(tmp_path).fit(module, loader())
    assert ledger_of(module) is None
    module.bad = False
    trainer(tmp_path, dp={"max_grad_norm": 0.5}).fit(module, loader())
    assert ledger_of(module).steps == 8


# ---------------------------------------------------------------- options of the Trainer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"callbacks": [GradientAccumulationScheduler({2: 2})]}, "GradientAccumulationScheduler"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder"),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder"),
        ({"callbacks": [SpikeDetection()]}, "SpikeDetection"),
        ({"callbacks": [DeviceStatsMonitor()], "logger": DummyLogger()}, "DeviceStatsMonitor"),
        ({"detect_anomaly": True}, "detect_anomaly"),
        ({"profiler": PyTorchProfiler(record_shapes=True)}, "record_shapes"),
        ({"profiler": PyTorchProfiler(profile_memory=True)}, "record_shapes"),
        (
            {"fast_dev_run": True, "dp": {"noise_multiplier": None, "target_epsilon": 3.0}},
            "fast_dev_run",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_looks_at_un_noised_values_is_refused_by_name(tmp_path, options, named):
    module = Model()
    module.batch_size = 8
    module.train_dataloader = loader
    with pytest.raises(UnsupportedTrainerOptionError, match=named):
        trainer(tmp_path, **options).fit(module)
    assert ledger_of(module) is None


def test_a_tuner_is_refused_before_its_first_step(tmp_path):
    for fitted in (False, True):
        module = Model()
        run = trainer(tmp_path)
        if fitted:
            run.fit(module, loader())
        before = module.layer.weight.detach().clone()
        with pytest.raises(UnsupportedTrainerOptionError, match="LearningRateFinder"):
            Tuner(run).lr_find(module, loader(), num_training=20)
        assert torch.equal(before, module.layer.weight)


def test_accumulation_that_begins_later_is_refused_there(tmp_path):
    class Later(Callback):
        def on_train_epoch_start(self, trainer, module):
            trainer.accumulate_grad_batches = 1 + trainer.current_epoch

    run = trainer(tmp_path, max_epochs=2, callbacks=[Later()])
    with pytest.raises(UnsupportedTrainerOptionError, match="several draws one step"):
        run.fit(Model(), loader())
    assert run.strategy.ledger.steps == 8


def test_a_plain_fast_dev_run_and_a_calibrated_one_with_a_plan_pass(tmp_path):
    trainer(tmp_path, fast_dev_run=True).fit(Model(), loader())
    module, dp = Model(), {"noise_multiplier": None, "target_epsilon": 3.0, "planned_epochs": 2}
    trainer(tmp_path, fast_dev_run=True, dp=dp).fit(module, loader())
    trainer(tmp_path, dp=dp).fit(module, loader())
    assert ledger_of(module).steps == 9


# ---------------------------------------------------------------- the audit log


@pytest.mark.parametrize("encrypted", [False, True])
def test_plain_checkpoints_are_recorded_too(tmp_path, keys, encrypted):
    trail = AuditTrail(tmp_path / "audit")
    trainer(
        tmp_path,
        enable_checkpointing=True,
        callbacks=[trail, ModelCheckpoint(tmp_path / "c", save_weights_only=True)],
        plugins=[EncryptedCheckpointIO(keys)] if encrypted else [],
    ).fit(Model(), loader())
    saved = [r["details"] for r in trail.log_file.records() if r["action"] == "checkpoint.save"]
    assert [("encrypted" in one, one["step"]) for one in saved] == [(not encrypted, 8)]
