from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_secure.audit.log import AuditLog
from lightning_secure.callbacks.audit_trail import AuditTrail
from lightning_secure.callbacks.budget import PrivacyBudget
from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import AuditWriteError, BudgetExhaustedError, ConfigError
from lightning_secure.plugins.checkpoint import EncryptedCheckpointIO
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.private import PrivateStrategy
from lightning_secure.util import events

X = np.random.default_rng(3).normal(size=(64, 32)).astype("float32")


class Model(BoringModel):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch[0], batch_idx)


@pytest.fixture
def sealed(tmp_path, keys):
    for split in ("train", "val"):
        with EncryptedShardWriter(tmp_path / "d", split=split, keys=keys) as writer:
            writer.write_batch({"x": X})
    return tmp_path / "d"


def trainer(root, keys, callbacks, **options):
    dp = options.pop("dp", {"noise_multiplier": 1.0})
    strategy = PrivateStrategy(DPConfig(delta=1e-5, max_grad_norm=1.0, **dp))
    return L.Trainer(
        **{
            "strategy": strategy,
            "callbacks": callbacks,
            "plugins": [EncryptedCheckpointIO(keys)],
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            **options,
        }
    )


def data(sealed, keys):
    return EncryptedDataModule(sealed, keys=keys, batch_size=16)


def actions(folder):
    return [record["action"] for record in AuditLog(folder / "audit.jsonl").records()]


# ---------------------------------------------------------------- AuditTrail


def test_a_run_is_recorded_from_its_first_key_to_its_end(tmp_path, sealed, keys):
    trail = AuditTrail(tmp_path / "audit")
    run = trainer(tmp_path, keys, [trail])
    run.fit(Model(), datamodule=data(sealed, keys))
    assert actions(tmp_path / "audit") == [
        "key.unwrap", "data.open", "key.unwrap", "data.open",
        "run.start",
        "key.wrap", "checkpoint.save", "key.wrap", "checkpoint.save", "checkpoint.remove",
        "run.end",
    ]  # fmt: skip
    assert trail.log_file.verify().records == 11
    records = {record["action"]: record["details"] for record in trail.log_file.records()}
    assert records["run.start"]["strategy"] == "PrivateStrategy"
    assert records["run.start"]["module"] == "Model"
    assert records["run.end"]["privacy_steps"] == 8
    assert float(records["run.end"]["epsilon"]) == run.strategy.ledger.epsilon()
    assert records["run.end"]["run"] == records["run.start"]["run"] != ""
    assert records["checkpoint.save"]["step"] == 8


def test_an_exception_is_recorded_by_type_and_not_by_text(tmp_path, sealed, keys):
    class Fails(Model):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("patient Mary Quant")

    with pytest.raises(RuntimeError):
        trainer(tmp_path, keys, [AuditTrail(tmp_path / "audit")]).fit(
            Fails(), datamodule=data(sealed, keys)
        )
    text = (tmp_path / "audit" / "audit.jsonl").read_text()
    last = json.loads(text.splitlines()[-1])
    assert (last["action"], last["outcome"]) == ("run.exception", "failure")
    assert last["details"]["exception"] == "builtins.RuntimeError"
    assert "Mary" not in text


def test_an_end_that_cannot_be_recorded_is_told_without_the_text_of_the_exception(
    tmp_path, sealed, keys, caplog
):
    file = tmp_path / "audit" / "audit.jsonl"

    class Fails(Model):
        def validation_step(self, batch, batch_idx):
            with file.open("ab") as log:
                log.write(b'{"action"')  # nothing can be appended to half a record
            raise RuntimeError("patient Mary Quant")

    with pytest.raises(RuntimeError, match="Mary Quant"):
        trainer(tmp_path, keys, [AuditTrail(tmp_path / "audit")]).fit(
            Fails(), datamodule=data(sealed, keys)
        )
    assert "the end of the run could not be recorded" in caplog.text
    assert "Mary" not in caplog.text


def test_a_refused_key_is_recorded(tmp_path, sealed, keys, other_keys):
    AuditTrail(tmp_path / "audit")
    run = trainer(tmp_path, keys, [AuditTrail(tmp_path / "audit")])
    run.fit(Model(), datamodule=data(sealed, keys))
    path = run.checkpoint_callback.best_model_path
    with pytest.raises(Exception, match=keys.key_id):
        EncryptedCheckpointIO(other_keys).load_checkpoint(path)
    *_, last = AuditLog(tmp_path / "audit" / "audit.jsonl").records()
    assert (last["action"], last["outcome"]) == ("key.unwrap", "failure")


def test_a_log_that_cannot_be_written_refuses_the_key(tmp_path, sealed, keys):
    (tmp_path / "audit").touch()  # where the folder should be
    with pytest.raises(AuditWriteError, match=r"key\.unwrap"):
        trainer(tmp_path, keys, [AuditTrail(tmp_path / "audit")]).fit(
            Model(), datamodule=data(sealed, keys)
        )


def test_two_trails_in_one_folder_are_one_log(tmp_path, keys, heard):
    first = AuditTrail(tmp_path / "audit")
    second = AuditTrail(tmp_path / "x" / ".." / "audit")
    keys.derive("test")
    assert len(actions(tmp_path / "audit")) == len(heard) == 1
    assert first.log_file.verify() == second.log_file.verify()


def test_a_run_without_privacy_is_recorded_too(tmp_path, sealed, keys):
    run = trainer(tmp_path, keys, [AuditTrail(tmp_path / "audit")], strategy="auto")
    run.fit(Model(), datamodule=data(sealed, keys))
    *_, last = AuditLog(tmp_path / "audit" / "audit.jsonl").records()
    assert "epsilon" not in last["details"]


# ---------------------------------------------------------------- PrivacyBudget


def test_epsilon_is_shown_logged_and_announced(tmp_path, sealed, keys, caplog):
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, keys, [PrivacyBudget()], logger=logger)
    with caplog.at_level(logging.INFO):
        run.fit(Model(), datamodule=data(sealed, keys))
    epsilon = run.strategy.ledger.epsilon()
    assert float(run.callback_metrics["privacy/epsilon"]) == pytest.approx(epsilon)
    assert run.progress_bar_metrics["privacy/epsilon"] == pytest.approx(epsilon)
    assert float(run.callback_metrics["privacy/steps"]) == 8
    assert f"epsilon {epsilon:.4g}" in caplog.text
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "privacy/epsilon" in logged.splitlines()[0]


def test_epsilon_is_computed_no_more_often_than_asked(tmp_path, sealed, keys):
    seen = []

    class Counting(PrivacyBudget):
        def on_train_epoch_end(self, trainer, module):
            before = dict(trainer.callback_metrics)
            super().on_train_epoch_end(trainer, module)
            if trainer.callback_metrics.keys() != before.keys() or (
                trainer.callback_metrics.get("privacy/steps") != before.get("privacy/steps")
            ):
                seen.append(trainer.current_epoch)

    run = trainer(tmp_path, keys, [Counting(every_n_epochs=3)], max_epochs=5)
    run.fit(Model(), datamodule=data(sealed, keys))
    assert seen == [2, 4]  # every third, and the last


def test_a_run_is_stopped_gracefully_at_an_epsilon(tmp_path, sealed, keys):
    save = ModelCheckpoint(tmp_path / "c")
    run = trainer(tmp_path, keys, [PrivacyBudget(max_epsilon=4.0), save], max_epochs=100)
    run.fit(Model(), datamodule=data(sealed, keys))
    account = run.strategy.ledger
    assert 0 < account.steps < 400
    assert account.epsilon() <= 4.0 < account.epsilon(more_steps=1)
    state = EncryptedCheckpointIO(keys).load_checkpoint(save.best_model_path)
    assert state["global_step"] == account.steps


@pytest.mark.parametrize("minimum", [{"min_epochs": 20}, {"min_steps": 80}])
def test_a_minimum_of_the_trainers_does_not_outlast_the_budget(tmp_path, sealed, keys, minimum):
    """Lightning passes over should_stop until its minimum is met."""
    options = {"max_epochs": 20, "limit_val_batches": 0, **minimum}
    run = trainer(tmp_path, keys, [PrivacyBudget(max_epsilon=4.0)], **options)
    run.fit(Model(), datamodule=data(sealed, keys))
    account = run.strategy.ledger
    assert account.steps < 80
    assert account.epsilon() <= 4.0 < account.epsilon(more_steps=1)


def test_a_stop_that_somebody_else_asked_for_in_vain_does_not_hide_the_budget(
    tmp_path, sealed, keys
):
    class StopsEarly(L.Callback):
        def on_train_batch_start(self, trainer, *rest):
            trainer.should_stop = True

    run = trainer(
        tmp_path, keys, [StopsEarly(), PrivacyBudget(max_epsilon=4.0)], max_epochs=20,
        min_epochs=20, limit_val_batches=0,
    )  # fmt: skip
    run.fit(Model(), datamodule=data(sealed, keys))
    assert run.strategy.ledger.epsilon() <= 4.0


def test_what_goes_on_after_the_budget_is_refused_its_step(tmp_path, sealed, keys):
    class GoesOn(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            trainer.should_stop = False

    run = trainer(
        tmp_path, keys, [PrivacyBudget(max_epsilon=4.0), GoesOn()], max_epochs=20,
        limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises(BudgetExhaustedError, match="was not taken"):
        run.fit(Model(), datamodule=data(sealed, keys))
    assert run.strategy.ledger.epsilon() <= 4.0


def test_a_fit_that_begins_with_nothing_left_takes_no_step(tmp_path, sealed, keys):
    module = Model()
    trainer(tmp_path, keys, [], max_epochs=2, limit_val_batches=0).fit(
        module, datamodule=data(sealed, keys)
    )
    budget = PrivacyBudget(max_epsilon=0.5)
    run = trainer(tmp_path, keys, [budget], min_epochs=3, max_epochs=4, limit_val_batches=0)
    run.fit(module, datamodule=data(sealed, keys))
    assert run.strategy.ledger.epsilon() > 0.5
    assert run.strategy.ledger.steps == 8


def test_the_strategys_own_budget_ends_a_run_before_its_minimum(tmp_path, sealed, keys):
    """Gracefully, so with a checkpoint, and not by the error that guards the next step."""
    save = ModelCheckpoint(tmp_path / "c")
    dp = {"target_epsilon": 4.0, "planned_epochs": 3}
    run = trainer(tmp_path, keys, [save], dp=dp, min_epochs=6, max_epochs=6)
    run.fit(Model(), datamodule=data(sealed, keys))
    account = run.strategy.ledger
    assert account.epsilon() <= 4.0 < account.epsilon(more_steps=1)
    assert EncryptedCheckpointIO(keys).load_checkpoint(save.best_model_path)["global_step"] >= 12


def test_a_run_that_is_not_private_is_called_so(tmp_path, sealed, keys, caplog):
    dp = {"noise_multiplier": 1.0, "insecure_seed": 1}
    trainer(tmp_path, keys, [PrivacyBudget()], dp=dp).fit(Model(), datamodule=data(sealed, keys))
    assert "NOT PRIVATE: insecure_seed" in caplog.text


def test_a_budget_needs_a_strategy_that_keeps_one(tmp_path, sealed, keys):
    run = trainer(tmp_path, keys, [PrivacyBudget()], strategy="auto")
    with pytest.raises(ConfigError, match="PrivateStrategy"):
        run.fit(Model(), datamodule=data(sealed, keys))
    with pytest.raises(ConfigError, match="not opened"):
        PrivacyBudget().on_fit_end(trainer(tmp_path, keys, []), Model())


@pytest.mark.parametrize("options", [{"max_epsilon": 0.0}, {"every_n_epochs": 0}])
def test_wrong_arguments_are_refused(options):
    with pytest.raises(ConfigError):
        PrivacyBudget(**options)


def test_validation_alone_needs_no_budget(tmp_path, sealed, keys):
    run = trainer(tmp_path, keys, [PrivacyBudget()], strategy="auto")
    run.validate(Model(), datamodule=data(sealed, keys), verbose=False)


_WORKER = """
import pickle, sys
keys, dataset = pickle.load(open(sys.argv[1], "rb"))
keys.derive("in a worker")
dataset[0]
"""


def test_a_process_that_is_sent_the_keys_writes_to_the_same_log(tmp_path, keys):
    """As a spawned worker is, and one of Ray; what it is sent of the log imports no Lightning."""
    with EncryptedShardWriter(tmp_path / "s", split="train", keys=keys) as writer:
        writer.write({"x": np.ones(3), "y": 1})
    trail = AuditTrail(tmp_path / "audit")
    dataset = EncryptedShardDataset(tmp_path / "s", split="train", keys=keys)
    (tmp_path / "sent").write_bytes(pickle.dumps((keys, dataset)))
    subprocess.run(
        [sys.executable, "-c", _WORKER, tmp_path / "sent"],
        check=True, cwd="/", env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    records = [record for record in trail.log_file.records() if record["pid"] != os.getpid()]
    assert {record["action"] for record in records} == {"key.derive", "key.unwrap", "data.open"}
    assert b"lightning_secure.callbacks" not in (tmp_path / "sent").read_bytes()


def test_what_is_not_to_follow_the_keys_does_not(keys):
    events.subscribe("here", lambda _: None)
    assert pickle.loads(pickle.dumps(keys)).key_id == keys.key_id
    assert events.following() == {}


def test_a_log_that_is_subscribed_already_is_not_told_twice(tmp_path, keys):
    trail = AuditTrail(tmp_path / "audit")
    pickle.loads(pickle.dumps(keys)).derive("once")
    assert [record["action"] for record in trail.log_file.records()] == ["key.derive"]
