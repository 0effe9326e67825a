"""Forks, roll-backs and crashes of whole runs: whatever somebody does, no step is forgotten."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lightning_secure.errors import BudgetExhaustedError, ConfigError, LedgerError
from lightning_secure.privacy.accounting.ledger import (
    Ledger,
    journal_path,
    known_releases,
    restore_journal,
)
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.private import PrivateStrategy

CONFIG = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0}


class Model(BoringModel):
    def train_dataloader(self):
        return DataLoader(RandomDataset(32, 64), batch_size=16)  # four steps an epoch


def trainer(folder, *callbacks, epochs=2, journal=None, validate=0, **config):
    return L.Trainer(
        strategy=PrivateStrategy(DPConfig(**{**CONFIG, **config}), journal=journal),
        callbacks=[
            ModelCheckpoint(folder / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1),
            *callbacks,
        ],
        max_epochs=epochs, limit_val_batches=validate, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of eight steps, with a checkpoint after each."""
    first = trainer(tmp_path)
    first.fit(Model())
    return first


def resume(folder, step, *callbacks, epochs=3, **options):
    again = trainer(folder, *callbacks, epochs=epochs, **options)
    again.fit(Model(), ckpt_path=folder / "c" / f"step={step}.ckpt", weights_only=True)
    return again.strategy.ledger


def test_a_run_that_goes_on_from_its_end_is_charged_nothing_more(tmp_path, run):
    ledger = resume(tmp_path, 8)
    assert (ledger.steps, ledger.abandoned) == (12, 0)


def test_a_rolled_back_run_pays_for_what_it_abandons(tmp_path, run, caplog):
    ledger = resume(tmp_path, 3)
    assert (ledger.steps, ledger.abandoned) == (12 + 5, 5)
    assert ledger.epsilon() == run.strategy.ledger.epsilon(more_steps=9)
    assert "took 5 steps that this checkpoint does not contain" in caplog.text
    saved = torch.load(tmp_path / "c" / "step=12.ckpt", weights_only=True)
    assert Ledger.from_checkpoint(saved).steps == 17


def test_every_branch_pays_for_every_other(tmp_path, run):
    resume(tmp_path, 8)
    second = resume(tmp_path, 8)
    assert (second.steps, second.abandoned) == (16, 4)
    third = resume(tmp_path, 5)
    assert (third.steps, third.abandoned) == (8 + 4 + 4 + 7, 3 + 4 + 4)


def test_two_branches_at_once_are_refused(tmp_path, run):
    said = []

    class Meddler(Callback):
        def on_train_batch_end(self, trainer, *_):
            if not said:
                with pytest.raises(LedgerError, match="in use") as info:
                    resume(tmp_path, 8)
                said.append(str(info.value))

    ledger = resume(tmp_path, 8, Meddler())
    assert len(said) == 1
    assert (ledger.steps, ledger.abandoned) == (12, 0)


def test_the_step_is_in_the_journal_before_anybody_sees_its_gradient(tmp_path):
    seen = []

    class Look(Callback):
        def on_after_backward(self, trainer, module):
            ledger = trainer.strategy.ledger
            (known,) = known_releases(ledger, tmp_path / "privacy_journal")
            seen.append((known.steps, trainer.global_step + 1))

    trainer(tmp_path, Look()).fit(Model())
    assert len(seen) == 8
    assert all(known >= taken for known, taken in seen)


def test_a_run_that_is_killed_is_charged_at_least_what_it_took(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_journal import *\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder = Path(sys.argv[1]); trainer(folder, Kill()).fit(Model())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    ledger = resume(tmp_path, 4)
    assert ledger.abandoned >= 2
    assert ledger.steps == 12 + ledger.abandoned


def test_a_run_that_fails_is_charged_exactly_what_it_took(tmp_path):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise KeyError("a bug of the user's")

    with pytest.raises(KeyError):
        trainer(tmp_path, Fail()).fit(Model())
    assert resume(tmp_path, 4).abandoned == 2


def test_the_budget_holds_over_all_branches(tmp_path):
    target = {"target_epsilon": 6.0}
    first = trainer(tmp_path, epochs=100, **target)
    first.fit(Model())
    total = first.strategy.ledger.steps
    assert 8 < total < 60
    model = Model()
    before = model.layer.weight.detach().clone()
    again = trainer(tmp_path, epochs=100, **target)
    with pytest.raises(BudgetExhaustedError):
        again.fit(model, ckpt_path=tmp_path / "c" / "step=2.ckpt", weights_only=True)
    ledger = again.strategy.ledger
    assert (ledger.steps, ledger.abandoned) == (total, total - 2)
    assert ledger.epsilon() <= 6.0
    assert not torch.equal(model.layer.weight, before)  # the checkpoint's, and nothing after it
    saved = torch.load(tmp_path / "c" / "step=2.ckpt", weights_only=True)
    assert torch.equal(model.layer.weight, saved["state_dict"]["layer.weight"])


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_checkpoint_without_its_journal_is_not_resumed(tmp_path, run):
    """Elsewhere, nobody knows whether it is the run's last."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "c", elsewhere / "c")
    with pytest.raises(LedgerError, match="nothing was resumed"):
        resume(elsewhere, 8)
    ledger = resume(elsewhere, 7, journal=tmp_path / "privacy_journal")
    assert (ledger.steps, ledger.abandoned) == (13, 1)
    restore_journal(ledger, elsewhere / "mine", steps=40)
    ledger = resume(elsewhere, 8, journal=elsewhere / "mine")
    assert (ledger.steps, ledger.abandoned) == (44, 32)


def test_a_journal_that_was_put_back_is_seen(tmp_path, run):
    path = journal_path(run.strategy.ledger, tmp_path / "privacy_journal")
    old = path.read_bytes()
    resume(tmp_path, 8)
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="4 steps fewer"):
        resume(tmp_path, 12, epochs=4)


def test_a_module_is_refused_while_its_run_goes_on_in_a_copy(tmp_path):
    model = Model()
    trainer(tmp_path).fit(model)
    again = trainer(tmp_path / "other")  # the module knows where its journal is
    again.fit(model)
    assert again.strategy.ledger.steps == 16
    assert not (tmp_path / "other" / "privacy_journal").exists()


@pytest.mark.parametrize("change", [{"max_grad_norm": 2.0}, {"journal": "elsewhere"}])
def test_weights_of_a_refused_resume_do_not_get_a_fresh_account(tmp_path, run, change):
    model = Model()
    path = tmp_path / "c" / "step=8.ckpt"
    if "journal" in change:
        shutil.move(tmp_path / "privacy_journal", tmp_path / "kept")
        change = {"journal": tmp_path / "elsewhere"}
    with pytest.raises(LedgerError):
        trainer(tmp_path, epochs=3, **change).fit(model, ckpt_path=path, weights_only=True)
    if "journal" in change:
        shutil.move(tmp_path / "kept", tmp_path / "privacy_journal")
    again = trainer(tmp_path)
    again.fit(model)
    assert again.strategy.ledger.run_id == run.strategy.ledger.run_id
    assert again.strategy.ledger.steps == 16


def test_weights_that_were_only_validated_bring_their_account(tmp_path, run):
    model = Model()
    path = tmp_path / "c" / "step=8.ckpt"
    both = trainer(tmp_path, validate=1)
    both.validate(model, ckpt_path=path, weights_only=True, verbose=False)
    both.fit(model)
    assert both.strategy.ledger.steps == 16


def test_a_journal_is_a_local_file(tmp_path):
    with pytest.raises(ConfigError, match="must be flushed and locked"):
        trainer(tmp_path, journal="s3://bucket/journal").fit(Model())
    other = trainer(tmp_path)
    other._default_root_dir = "memory://run"
    with pytest.raises(ConfigError, match="memory://run"):
        other.fit(Model())


def test_a_validation_needs_no_journal(tmp_path, run):
    shutil.rmtree(tmp_path / "privacy_journal")
    path = tmp_path / "c" / "step=8.ckpt"
    trainer(tmp_path, validate=1).validate(
        Model(), ckpt_path=path, weights_only=True, verbose=False
    )


def test_another_accountant_keeps_the_budget(tmp_path):
    """Rényi DP is looser, so the same budget lasts for fewer steps."""
    spent = {}
    for name in ("pld", "rdp"):
        run = trainer(tmp_path / name, epochs=100, target_epsilon=5.0, accountant=name)
        run.fit(Model())
        ledger = run.strategy.ledger
        spent[name] = ledger.steps
        assert ledger.epsilon() == ledger.epsilon(accountant=name) <= 5.0
        assert ledger.epsilon(more_steps=1) > 5.0
    assert spent["rdp"] < spent["pld"]
    with pytest.raises(LedgerError, match="accountant was rdp and is pld"):
        resume(tmp_path / "rdp", spent["rdp"], target_epsilon=5.0)
