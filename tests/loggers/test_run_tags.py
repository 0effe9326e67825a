"""What the tags of a run say of its privacy, its data and its checkpoints, and that it is true."""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from pathlib import Path

import lightning as L
import mlflow
import numpy as np
import pytest
import torch
from launch import launch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from tracked import WARNINGS_OF_OTHERS

from lightning_secure import (
    DPConfig,
    EncryptedCheckpointIO,
    EncryptedDataModule,
    EncryptedShardWriter,
    PrivacyBudget,
    PrivateStrategy,
    RedactingMLFlowLogger,
    Redactor,
    RowMean,
)
from lightning_secure.redaction.mlflow_store.values import Policy

pytestmark = WARNINGS_OF_OTHERS


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        losses = ((self.layer(x).squeeze(-1) - y) ** 2).clamp(max=4)
        self.log("rate", 0.5, on_step=True, on_epoch=True)
        return {"loss": losses.mean(), "row_loss": losses}

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("tags") / "shards"
    rng = np.random.default_rng(0)
    for split, rows in (("train", 64), ("val", 8)):
        with EncryptedShardWriter(folder, split=split, keys=keys) as writer:
            for _ in range(rows):
                writer.write({"x": rng.normal(size=3).astype("float32"), "y": np.float32(1)})
    return folder


def private(**options):
    options = {"target_epsilon": None, "noise_multiplier": 1.0, "delta": 1e-3, **options}
    return PrivateStrategy(
        DPConfig(max_grad_norm=1.0, expected_batch_size=16, **options),
        public_metrics=["rate"],
        released_metrics={
            "train_loss": RowMean(entry="row_loss", bounds=(0, 4), noise_multiplier=5)
        },
    )


def trainer_for(store, shards, keys, logger, **options):
    callback = ModelCheckpoint(store.parent / "checkpoints", filename="{epoch}-{step}")
    return L.Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 2, "logger": logger,
            "strategy": private(), "callbacks": [callback],
            "plugins": [EncryptedCheckpointIO(keys)], "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": store.parent,
            **options,
        }
    )  # fmt: skip


def data(shards, keys):
    return EncryptedDataModule(shards, keys=keys, batch_size=16, columns=("x", "y"))


def logger_at(store, **options):
    return RedactingMLFlowLogger("tagged", save_dir=store, **options)


def run_of(logger):
    return logger.experiment.get_run(logger.run_id).data


def tags_of(logger):
    prefix = "lightning_secure."
    tags = run_of(logger).tags
    return {name.removeprefix(prefix): tags[name] for name in tags if name.startswith(prefix)}


def found(logger, query):
    client = logger.experiment
    return [run.info.run_id for run in client.search_runs([logger.experiment_id], query)]


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_run_is_found_by_what_it_has_spent_read_and_written(store, shards, keys):
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger)
    module, rows = data(shards, keys), Model()
    trainer.fit(rows, datamodule=module)
    ledger, path = trainer.strategy.ledger, trainer.checkpoint_callback.best_model_path
    epsilon = ledger.epsilon()
    tags = tags_of(logger)
    assert tags == {
        "private": "true",
        "epsilon": str(epsilon),
        "delta": "0.001",
        "privacy_steps": "4",
        "privacy_run": ledger.run_id,
        "manifest_digest": module.manifest_digest,
        f"checkpoint.{sha256(path)}": "epoch=0-step=4.ckpt",
        "metric.train_loss": str(epsilon),
        "metric.rate_step": "public",
        "metric.rate_epoch": "public",
    }
    assert run_of(logger).metrics["privacy/epsilon"] == epsilon
    assert pickle.loads(pickle.dumps(logger._run_tags)).release({"a": 1.0}, 0) == (
        {},
        {"a": 1.0},
    )
    other = logger_at(store)
    other.log_metrics({"a": 1.0})

    run = [logger.run_id]
    assert found(logger, "metrics.`privacy/epsilon` <= 9") == run
    assert found(logger, "metrics.`privacy/epsilon` < 0.001") == []
    assert found(logger, "tags.`lightning_secure.private` = 'true'") == run
    assert found(logger, f"tags.`lightning_secure.epsilon` = '{epsilon}'") == run
    assert (
        found(logger, f"tags.`lightning_secure.manifest_digest` = '{module.manifest_digest}'")
        == run
    )
    assert found(logger, f"tags.`lightning_secure.checkpoint.{sha256(path)}` LIKE '%'") == run
    assert found(logger, f"tags.`lightning_secure.checkpoint.{'0' * 64}` LIKE '%'") == []
    query = f"tags.`lightning_secure.privacy_run` = '{ledger.run_id}'"
    assert list(mlflow.search_runs([logger.experiment_id], query)["run_id"]) == run


def test_each_release_is_logged_with_what_it_has_cost(store, shards, keys):
    """Epsilon stands at the step at which a metric was released, and is no smaller than it was."""
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger, callbacks=[], max_epochs=2)
    trainer.fit(Model(), datamodule=data(shards, keys))
    history = logger.experiment.get_metric_history
    spent = {point.step: point.value for point in history(logger.run_id, "privacy/epsilon")}
    losses = [point.step for point in history(logger.run_id, "train_loss")]
    assert losses == [3, 7]
    ledger = trainer.strategy.ledger
    (release,) = ledger.releases
    for step in losses:
        ledger.releases = [release._replace(steps=step + 1)]
        assert spent[step] == ledger.epsilon()


def batches_of(logger, monkeypatch):
    """Names of the tags and metrics of each call that a logger's client is going to get."""
    batches = []
    client = logger.experiment._client
    log_batch = client.log_batch

    def recording(run_id, metrics=(), params=(), tags=(), **kwargs):
        batches.append([entity.key for entity in (*tags, *metrics)])
        return log_batch(run_id, metrics=metrics, params=params, tags=tags, **kwargs)

    # Between the logger and the real client, which gets every call.
    monkeypatch.setattr(client, "log_batch", recording)
    return batches


class Chatty(Model):
    """Logs many metrics, under names that MLflow does not take as they are."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        for number in range(120):
            self.log(f"rate[{number}]", 1.0)
        self.log("r" * 240, 1.0)


def test_many_metrics_with_odd_names_are_tagged(store, shards, keys, monkeypatch):
    names = [f"rate[{number}]" for number in range(120)]
    strategy = PrivateStrategy(
        DPConfig(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0),
        public_metrics=["rate", "r" * 240, *names],
    )
    logger = logger_at(store)
    batches = batches_of(logger, monkeypatch)
    trainer = trainer_for(store, shards, keys, logger, strategy=strategy, log_every_n_steps=1)
    with pytest.warns(RuntimeWarning, match="MLFlow only allows"):  # of Lightning's
        trainer.fit(Chatty(), datamodule=data(shards, keys))
    tags = tags_of(logger)
    assert all(tags[f"metric.rate{number}"] == "public" for number in range(120))
    assert sum(len(name) > 200 for name in tags) == 1
    tagging = [len(batch) for batch in batches if batch[0].startswith("lightning_secure.")]
    assert max(tagging) == 100  # what a server takes at once


def test_nothing_is_visible_that_the_tags_do_not_cover(store, shards, keys, monkeypatch):
    logger = logger_at(store)
    batches = batches_of(logger, monkeypatch)
    trainer = trainer_for(store, shards, keys, logger, callbacks=[], log_every_n_steps=1)
    trainer.fit(Model(), datamodule=data(shards, keys))
    written = [name for batch in batches for name in batch]
    first = written.index("train_loss")
    assert written.index("lightning_secure.epsilon") < first
    assert written.index("lightning_secure.metric.train_loss") < first


def test_a_run_that_goes_on_says_what_it_has_come_to(store, shards, keys):
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger)
    trainer.fit(Model(), datamodule=data(shards, keys))
    first, path = tags_of(logger), trainer.checkpoint_callback.best_model_path
    again = logger_at(store, run_id=logger.run_id)
    trainer = trainer_for(store, shards, keys, again, max_epochs=2)
    trainer.fit(Model(), datamodule=data(shards, keys), ckpt_path=path)
    second = tags_of(again)
    assert second["privacy_steps"] == "8"
    assert second["privacy_run"] == first["privacy_run"]
    assert float(second["epsilon"]) == trainer.strategy.ledger.epsilon() > float(first["epsilon"])
    names = {tag: name for tag, name in second.items() if tag.startswith("checkpoint.")}
    assert sorted(names.values()) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]

    fresh = logger_at(store)  # another run of MLflow's goes on with it
    trainer = trainer_for(store, shards, keys, fresh, max_epochs=3)
    path = store.parent / "checkpoints" / "epoch=1-step=8.ckpt"
    trainer.fit(Model(), datamodule=data(shards, keys), ckpt_path=path)
    third = tags_of(fresh)
    assert third["privacy_steps"] == "12"
    names = [name for tag, name in third.items() if tag.startswith("checkpoint.")]
    assert names == ["epoch=2-step=12.ckpt"]  # not those that it has found

    plain = logger_at(store, run_id=fresh.run_id)  # and goes on without noise
    trainer_for(store, shards, keys, plain, strategy="auto").fit(
        Model(), datamodule=data(shards, keys)
    )
    last = tags_of(plain)
    assert (last["private"], last["epsilon"]) == ("false", "inf")


def test_a_run_without_privacy_claims_none(store, shards, keys):
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger, strategy="auto", plugins=[])
    module = data(shards, keys)
    trainer.fit(Model(), datamodule=module)
    path = trainer.checkpoint_callback.best_model_path
    assert tags_of(logger) == {
        "private": "false",
        "epsilon": "inf",
        "manifest_digest": module.manifest_digest,
        f"checkpoint.{sha256(path)}": "epoch=0-step=4.ckpt",
    }
    assert "privacy/epsilon" not in run_of(logger).metrics
    assert data(shards, keys).manifest_digest is None


def test_a_run_without_noise_is_not_called_private(store, shards, keys):
    logger = logger_at(store)
    strategy = private(noise_multiplier=None, insecure_noise_off=True)
    trainer_for(store, shards, keys, logger, strategy=strategy).fit(
        Model(), datamodule=data(shards, keys)
    )
    tags = tags_of(logger)
    assert (tags["private"], tags["epsilon"], tags["metric.train_loss"]) == ("false", "inf", "inf")
    assert run_of(logger).metrics["privacy/epsilon"] > 1e300
    assert found(logger, "metrics.`privacy/epsilon` < 1e300") == []


def test_the_budgets_own_metric_is_not_logged_twice(store, shards, keys):
    logger = logger_at(store)
    # Of each epoch, metrics of validation are logged, and then those of training.
    trainer = trainer_for(
        store, shards, keys, logger, callbacks=[PrivacyBudget()], max_epochs=2, log_every_n_steps=9
    )
    trainer.fit(Model(), datamodule=data(shards, keys))
    points = logger.experiment.get_metric_history(logger.run_id, "privacy/epsilon")
    assert len({point.step for point in points}) == len(points) == 2
    # To the last bit: Lightning rounds what the callback logs to single precision.
    assert points[-1].value == trainer.strategy.ledger.epsilon()


class Slow(TorchCheckpointIO):
    """Is still writing when saving has returned."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"half of it")
        time.sleep(0.2)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_checkpoint_that_is_still_being_written_is_tagged_when_it_is_whole(store, shards, keys):
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger, plugins=[AsyncCheckpointIO(Slow())])
    trainer.fit(Model(), datamodule=data(shards, keys))
    path = trainer.checkpoint_callback.best_model_path
    digests = [tag for tag in tags_of(logger) if tag.startswith("checkpoint.")]
    assert digests == [f"checkpoint.{sha256(path)}"]


class Failing(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("it failed")


def test_a_run_that_fails_says_what_it_has_spent(store, shards, keys):
    logger = logger_at(store)
    trainer = trainer_for(store, shards, keys, logger, callbacks=[Failing()])
    with pytest.raises(RuntimeError, match="it failed"):
        trainer.fit(Model(), datamodule=data(shards, keys))
    assert tags_of(logger)["epsilon"] == str(trainer.strategy.ledger.epsilon())
    assert logger.experiment.get_run(logger.run_id).info.status == "FAILED"


def test_of_several_processes_the_first_tags(store):
    """Two real ones, which have one account."""
    folder = store.parent
    first, second = launch(Path(__file__).with_name("tagged_run.py"), folder, "tags")["tags"]
    assert first["epsilon"] == second["epsilon"]
    assert second["run"] is None
    logger = logger_at(store, run_id=first["run"])
    assert found(logger, "") == [first["run"]]
    tags = tags_of(logger)
    assert tags["epsilon"] == str(first["epsilon"])
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    assert tags[f"checkpoint.{sha256(path)}"] == path.name
    points = logger.experiment.get_metric_history(first["run"], "privacy/epsilon")
    assert [point.value for point in points] == [first["epsilon"]]


def test_what_is_trained_without_a_trainer_is_not_tagged(store):
    logger = logger_at(store)
    logger.log_graph(nn.Linear(1, 1))
    logger.log_graph(Model())
    logger.log_metrics({"train_loss": 1.0, "text": "x"}, 1)
    logger.finalize("success")
    assert tags_of(logger) == {}
    logger_at(store).finalize("success")  # without having logged anything


def test_tags_pass_redaction():
    """Digests, long numbers and the tags' names are nothing to take out."""
    numbers, policy = random.Random(0), Policy(Redactor())
    for _ in range(300):
        digest = f"{numbers.getrandbits(256):064x}"
        entries = {
            "epsilon": str(numbers.uniform(0, 20)),
            "delta": str(10 ** numbers.uniform(-9, -1)),
            "privacy_steps": str(numbers.randrange(10**9)),
            "privacy_run": digest[:32],
            "manifest_digest": digest,
            f"checkpoint.{digest}": "epoch=3-step=40.ckpt",
        }
        for name, value in entries.items():
            key = f"lightning_secure.{name}"
            assert policy.text(key) == key
            assert policy.stored(value, name=key) == value
            query = f"tags.`{key}` = '{value}'"
            assert policy.query(query) == query
