"""What loggers of Lightning's write by themselves, and what they write behind RedactingLogger."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
import pickle
from argparse import Namespace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tracked import ADDRESS, CANARIES, PASSWORD, TOKEN, WARNINGS_OF_OTHERS

from lightning_secure import CanarySearch, EncryptedCheckpointIO, RedactingLogger, Redactor
from lightning_secure.errors import AuditWriteError, ConfigError, RedactionError
from lightning_secure.loggers.experiments import RedactingExperiment
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.redactor import REDACTED
from lightning_secure.util import events

pytestmark = WARNINGS_OF_OTHERS


@dataclasses.dataclass
class Database:
    host: str = "db"
    password: str = PASSWORD


DIRTY = {
    "db_password": PASSWORD,
    "database": Database(),
    "nested": {"list": [{"api_keys": {"prod": PASSWORD}}], "namespace": Namespace(pwd=PASSWORD)},
    "url": f"postgresql://u:{PASSWORD}@db/x",
    "contact": ADDRESS,
    f"by {ADDRESS}": 1,
    "text": f"password={PASSWORD}",
    "lr": 0.1,
    "layers": [3, 4],
}


class Model(BoringModel):
    """Logs through its logger, and through what that hands out."""

    def __init__(self, **hyperparameters):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log(f"loss of {ADDRESS}", loss["loss"])
        self.logger.log_metrics({"note": f"mail {ADDRESS}", "tensor": torch.tensor(2.0)}, step=1)
        experiment = self.logger.experiment
        if isinstance(self.logger, TensorBoardLogger):
            experiment.add_text(f"by {ADDRESS}", f"password={PASSWORD}", batch_idx)
            experiment.add_scalar(f"s {ADDRESS}", loss["loss"], global_step=batch_idx)
            experiment.add_scalars(f"s {ADDRESS}", {TOKEN: np.float32(1)}, batch_idx)
            experiment.add_hparams({"api_key": TOKEN}, {f"m {ADDRESS}": 1.0}, run_name=ADDRESS)
        else:
            experiment.log_hparams({"api_key": TOKEN})
            experiment.log_metrics({f"m {ADDRESS}": 1.0}, 3)
            experiment.save()
        return loss


def trained(folder, logger, hyperparameters=DIRTY, **options):
    trainer = L.Trainer(
        **{
            "max_epochs": 1,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "logger": logger,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            **options,
        }
    )
    trainer.fit(Model(**hyperparameters))
    return trainer


def found(folder):
    return {hit.label for hit in CanarySearch(CANARIES).search([folder])}


class TextLessTensorBoard(TensorBoardLogger):
    """Drops what TensorBoard's own logger raises for, an error that repeats the text."""

    def log_metrics(self, metrics, step=None):
        super().log_metrics({k: v for k, v in metrics.items() if not isinstance(v, str)}, step)


LOGGERS = [CSVLogger, TextLessTensorBoard]


@pytest.mark.parametrize("kind", LOGGERS)
def test_nothing_secret_is_in_what_a_logger_writes(tmp_path, kind):
    trained(tmp_path, kind(tmp_path / "plain"))
    assert found(tmp_path / "plain") == set(CANARIES)

    logger = RedactingLogger(kind(tmp_path / "redacted"))
    trainer = trained(tmp_path, logger)
    assert found(tmp_path / "redacted") == set()
    folder = tmp_path / "redacted" / "lightning_logs" / "version_0"
    assert trainer.log_dir == str(folder)  # as without RedactingLogger
    kept = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert kept["db_password"] == kept["contact"] == kept["database"]["password"] == REDACTED
    assert (kept["lr"], kept["layers"], kept["database"]["host"]) == (0.1, [3, 4], "db")
    assert kept["url"] == f"postgresql://{REDACTED}@db/x"
    assert logger.redactor.counts["secret-name"] > 0
    if kind is CSVLogger:
        header, *lines = (folder / "metrics.csv").read_text().splitlines()
        assert f"loss of {REDACTED}" in header
        assert any(f"mail {REDACTED}" in line for line in lines)
        rows = csv.DictReader([header, *lines])
        assert {row["tensor"] for row in rows} >= {"2.0"}


def logged(logger):
    """Log by all ways that there are, each with one thing to take out."""
    yield "params", lambda: logger.log_hyperparams({"api_key": TOKEN})
    yield "metrics", lambda: logger.log_metrics({f"loss of {ADDRESS}": 1.0}, 1)
    experiment = logger.experiment
    if isinstance(logger, TensorBoardLogger):
        yield "metrics", lambda: logger.log_hyperparams({}, {f"m {ADDRESS}": 1.0})
        yield "metrics", lambda: experiment.add_scalar(f"s {ADDRESS}", 1.0)
        yield "texts", lambda: experiment.add_text("note", ADDRESS)
    else:
        yield "params", lambda: experiment.log_hparams({"owner": ADDRESS})
        yield "metrics", lambda: experiment.log_metrics({f"m {ADDRESS}": 1.0}, 1)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_what_is_taken_out_is_told_and_else_nothing_is_logged(tmp_path, heard, kind):
    for sink, log in logged(RedactingLogger(kind(tmp_path / "logs"))):
        heard.clear()
        log()
        finding_counts.announce_all()
        told = [event.details for event in heard if event.action == "redaction"]
        assert [(of["sink"], of["count"]) for of in told] == [(sink, 1)]
    assert found(tmp_path) == set()
    assert not any(canary in repr(heard) for canary in CANARIES.values())

    def full(event):
        raise AuditWriteError("no space left")

    # By another logger's method, which nothing must reach.
    class Reached(kind):
        def log_hyperparams(self, *args, **kwargs):
            raise AssertionError("it was reached")

        log_metrics = log_hyperparams

    inner = Reached(tmp_path / "none")
    ways = list(logged(RedactingLogger(inner)))
    events.subscribe("full", full)
    for _, log in ways:
        with pytest.raises(AuditWriteError):
            log()
    events.unsubscribe("full")
    inner.finalize("success")
    assert REDACTED.encode() not in b"".join(
        path.read_bytes() for path in (tmp_path / "none").rglob("*") if path.is_file()
    )


class Unreadable(dict):
    def items(self):
        raise RuntimeError(ADDRESS)


class Text(str):
    """A text that carries something along, which YAML writes."""


class Rate(float): ...


def test_what_a_value_carries_along_is_not_written(tmp_path):
    values = {"optimizer": Text("adam"), "rates": [Rate(0.5)], "number": np.float64(2.5)}
    for value in (values["optimizer"], values["rates"][0]):
        vars(value)["note"] = ADDRESS
    CSVLogger(tmp_path / "plain").log_hyperparams(values)
    assert found(tmp_path / "plain") == {"address"}
    logger = RedactingLogger(CSVLogger(tmp_path / "redacted"))
    logger.log_hyperparams(values)
    logger.experiment.log_hparams({"again": values["optimizer"]})
    assert found(tmp_path / "redacted") == set()
    text = Path(logger.log_dir, "hparams.yaml").read_text()
    assert yaml.safe_load(text) == {
        "optimizer": "adam", "rates": [0.5], "number": 2.5, "again": "adam",
    }  # fmt: skip


def test_config_and_checkpoints_lie_where_they_would(tmp_path, keys):
    logger = RedactingLogger(CSVLogger(tmp_path))
    trainer = trained(
        tmp_path, logger, {"lr": 1}, enable_checkpointing=True,
        plugins=[EncryptedCheckpointIO(keys)],
    )  # fmt: skip
    (path,) = tmp_path.rglob("*.ckpt")
    assert path.parent == tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert isinstance(logger, CSVLogger)
    assert isinstance(logger, RedactingLogger)
    assert not isinstance(logger, TensorBoardLogger)
    assert trainer.logger is logger


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_every_other_way_to_write_is_refused(tmp_path, kind):
    """Also one of a newer version, and every method of an experiment that nobody has looked at."""
    logger = RedactingLogger(kind(tmp_path))
    experiment = logger.experiment
    assert type(experiment) is RedactingExperiment
    looked_at = {
        "log_metrics", "log_hparams", "save", "add_scalar", "add_scalars", "add_text",
        "add_hparams", "flush", "close", "get_logdir",
    }  # fmt: skip
    refused = 0
    for name in dir(logger._logger.experiment):
        if name.startswith("_") or name in looked_at:
            continue
        with pytest.raises(RedactionError, match=name):
            getattr(experiment, name)
        refused += 1
    assert refused > 3
    for name in ("_get_file_writer", "_experiment_", "metrics_"):
        with pytest.raises(AttributeError):
            getattr(experiment, name)


def test_an_argument_that_nobody_has_looked_at_is_refused(tmp_path):
    class ExperimentWriter:
        def log_hparams(self, params, note=None):
            raise AssertionError("it was reached")

    # As a newer version of Lightning's could have it.
    ExperimentWriter.__module__ = "lightning.pytorch.loggers.csv_logs"
    ExperimentWriter.__qualname__ = "ExperimentWriter"
    experiment = RedactingExperiment(ExperimentWriter(), Redactor())
    with pytest.raises(RedactionError, match="note"):
        experiment.log_hparams({"lr": 1}, note=ADDRESS)
    with pytest.raises(RedactionError, match="str"):
        experiment.log_hparams(ADDRESS)


def test_an_experiment_of_another_kind_is_refused(tmp_path):
    class Run:
        def save(self, pattern):
            raise AssertionError("it was reached")

    with pytest.raises(RedactionError, match=r"Run\.save"):
        RedactingExperiment(Run(), Redactor()).save("*")


def test_a_step_that_is_text_is_refused(tmp_path):
    logger = RedactingLogger(CSVLogger(tmp_path))
    with pytest.raises(RedactionError) as caught:
        logger.experiment.log_metrics({"a": 1.0}, step=ADDRESS)
    assert ADDRESS not in str(caught.value)
    assert caught.value.__context__ is None


def test_what_a_logger_can_besides_is_refused(tmp_path):
    class Watching(CSVLogger):
        prefix = "p"

        def watch(self, model):
            raise AssertionError("it was reached")

    logger = RedactingLogger(Watching(tmp_path))
    with pytest.raises(RedactionError, match=r"Watching\.watch"):
        logger.watch(None)
    assert logger.prefix == "p"
    with pytest.raises(AttributeError):
        logger.no_such_thing  # noqa: B018
    with pytest.raises(AttributeError):
        logger._private  # noqa: B018


@pytest.mark.parametrize(
    "options",
    [
        {"name": f"run of {ADDRESS}"},
        {"version": f"password={PASSWORD}"},
        {"prefix": ADDRESS},
        {"save_dir": Path(f"/tmp/{ADDRESS}")},
    ],
)
def test_a_logger_that_was_given_a_secret_itself_is_refused(tmp_path, options):
    logger = CSVLogger(**{"save_dir": tmp_path, **options})
    with pytest.raises(ConfigError, match="was given a secret") as caught:
        RedactingLogger(logger)
    assert ADDRESS not in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_tags_count_as_well(tmp_path):
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/m.db", tags={"password": PASSWORD})
    with pytest.raises(ConfigError, match="tags"):
        RedactingLogger(logger)
    with pytest.raises(ConfigError, match="wraps a logger"):
        RedactingLogger(object())


class Uploading(CSVLogger):
    """Sends checkpoints as loggers of services do: when they are saved, or at the end."""

    def __init__(self, folder, *, at_the_end=False):
        super().__init__(folder)
        self.sent = []
        self._at_the_end = at_the_end
        self._callback = None

    def after_save_checkpoint(self, checkpoint_callback):
        self._callback = checkpoint_callback
        if not self._at_the_end:
            self.sent.append(Path(checkpoint_callback.best_model_path).read_bytes())

    def finalize(self, status):
        super().finalize(status)
        if self._at_the_end and self._callback:
            self.sent.append(Path(self._callback.best_model_path).read_bytes())


def test_checkpoints_are_handed_over_only_if_they_are_encrypted(tmp_path, keys, caplog):
    def sent_by(wrap, plugins, filename=None):
        inner = Uploading(tmp_path / "logs")
        callback = ModelCheckpoint(tmp_path / "checkpoints", filename=filename)
        trained(
            tmp_path, wrap(inner), {"db_password": PASSWORD},
            enable_checkpointing=True, callbacks=[callback], plugins=plugins,
        )  # fmt: skip
        return inner.sent

    encrypted = EncryptedCheckpointIO(keys)
    (plain,) = sent_by(lambda inner: inner, [])
    assert PASSWORD.encode() in plain
    with caplog.at_level(logging.WARNING):
        assert sent_by(RedactingLogger, []) == []
    assert "withheld from the logger" in caplog.text
    (sealed,) = sent_by(RedactingLogger, [encrypted])
    assert sealed.startswith(b"LSECCKPT")
    assert sent_by(RedactingLogger, [encrypted], f"for {ADDRESS}") == []


def test_checkpoints_elsewhere_are_withheld(tmp_path):
    """Where they cannot be looked at: behind a URL, in a folder, or still being written."""
    (tmp_path / "sharded").mkdir()
    for path in ("memory://bucket/a.ckpt", tmp_path / "sharded", tmp_path / "not yet.ckpt"):
        inner, callback = Uploading(tmp_path), ModelCheckpoint(tmp_path)
        callback.best_model_path = str(path)
        RedactingLogger(inner).after_save_checkpoint(callback)
        assert inner._callback is None


class Exchanging(L.Callback):
    """Puts something else in the place of an encrypted checkpoint, before the run ends."""

    def on_fit_end(self, trainer, pl_module):
        Path(trainer.checkpoint_callback.best_model_path).write_text(ADDRESS)


def test_checkpoints_are_looked_at_again_at_the_end(tmp_path, keys):
    inner = Uploading(tmp_path / "a", at_the_end=True)
    with pytest.raises(RedactionError, match="not told to end"):
        trained(
            tmp_path,
            RedactingLogger(inner),
            {"db_password": PASSWORD},
            enable_checkpointing=True,
            plugins=[EncryptedCheckpointIO(keys)],
            callbacks=[ModelCheckpoint(tmp_path / "c"), Exchanging()],
        )
    assert inner.sent == []


def test_a_graph_is_withheld(tmp_path, caplog):
    class Drawn(BoringModel):
        example_input_array = torch.ones(1, 32)

        def forward(self, x):
            return self.layer(x) + 90210.5

    def drawn(logger):
        logger.log_graph(Drawn())
        logger.log_graph(Drawn())
        logger.finalize("success")

    drawn(TensorBoardLogger(tmp_path / "plain", log_graph=True))
    drawn(RedactingLogger(TensorBoardLogger(tmp_path / "redacted", log_graph=True)))
    with caplog.at_level(logging.WARNING):
        drawn(RedactingLogger(TensorBoardLogger(tmp_path / "none")))
    plain, redacted = (
        b"".join(path.read_bytes() for path in (tmp_path / name).rglob("events*"))
        for name in ("plain", "redacted")
    )
    assert b"90210.5" in plain
    assert b"aten::" not in redacted
    assert caplog.text.count("graph") == 1


@pytest.fixture
def _no_address_left(monkeypatch):
    """MLflow leaves a logger's address in the environment, for the loggers of the next test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


@pytest.mark.usefixtures("_no_address_left")
def test_mlflows_client_is_handed_out_redacting(tmp_path, mlflow_database):
    (tmp_path / "m.db").write_bytes(Path(mlflow_database).read_bytes())
    inner = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/m.db", artifact_location=(tmp_path / "a").as_uri()
    )
    logger = RedactingLogger(inner)
    logger.experiment.set_tag(logger.run_id, "owner", ADDRESS)
    logger.log_hyperparams(DIRTY)
    logger.log_metrics({f"loss of {ADDRESS}": 1.0}, 1)
    with pytest.raises(RedactionError, match="log_figure"):
        logger.experiment.log_figure  # noqa: B018
    logger.finalize("success")
    assert inner.experiment.get_run(inner.run_id).data.tags["owner"] == REDACTED
    assert found(tmp_path) == set()


def test_other_processes_than_the_first_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = RedactingLogger(CSVLogger(tmp_path / "logs"))
    assert isinstance(logger.experiment, _DummyExperiment)
    logger.log_metrics({"a": 1.0})
    logger.log_hyperparams({"b": 1})
    logger.save()
    assert not (tmp_path / "logs").exists()


def test_a_copy_in_another_process_redacts_too(tmp_path):
    logger = RedactingLogger(
        CSVLogger(tmp_path, version=3), redactor=Redactor(extra_patterns=[r"MRN-\d+"])
    )
    again = pickle.loads(pickle.dumps(logger))
    again.log_hyperparams({"patient": "MRN-123", "owner": ADDRESS})
    text = Path(again.log_dir, "hparams.yaml").read_text()
    assert yaml.safe_load(text) == {"patient": REDACTED, "owner": REDACTED}
    assert (again.name, again.version, again.save_dir) == ("lightning_logs", 3, str(tmp_path))
    assert again.root_dir == os.path.dirname(again.log_dir)
    assert again.group_separator == "/"


def test_numbers_are_numbers_and_nothing_else(tmp_path):
    experiment = RedactingLogger(TensorBoardLogger(tmp_path)).experiment
    experiment.add_scalar("a", torch.tensor(2.0, requires_grad=True), global_step=None)
    with pytest.raises(RedactionError) as caught:
        experiment.add_scalar("a", ADDRESS)
    assert ADDRESS not in str(caught.value)


def test_hyperparameters_with_metrics_are_redacted_too(tmp_path):
    logger = RedactingLogger(TensorBoardLogger(tmp_path))
    logger.log_hyperparams(Namespace(owner=ADDRESS), {f"m {ADDRESS}": 1.0}, 2)
    logger.log_hyperparams(None)
    logger.finalize("success")
    assert found(tmp_path) == set()
    with pytest.raises(RedactionError, match="list"):
        logger.log_hyperparams([ADDRESS])
    with pytest.raises(RedactionError, match="Unreadable") as caught:
        logger.log_hyperparams(Unreadable(a=1))
    assert caught.value.__context__ is None


def test_a_logger_without_an_experiment_has_none():
    class Silent(Logger):
        name = version = ""

        def log_metrics(self, metrics, step=None): ...

        def log_hyperparams(self, params): ...

    assert RedactingLogger(Silent()).experiment is None
