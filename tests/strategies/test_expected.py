"""Hooks, callbacks and what measures a step cannot tell how many rows the step drew."""

from __future__ import annotations

import copy
import csv
import logging
import pickle
import shutil
from pathlib import Path

import lightning as L
import mlflow
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from mlflow.tracking import fluent
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_secure.errors import PrivacyError, UnsupportedTrainerOptionError
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.sampling import Chunk
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.strategies.private import PrivateStrategy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return {"loss": F.cross_entropy(self.net(x), y), "temperature": 2.0}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Named(Model):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


class NamedRows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((5,), float(index % 3)), "y": index % 2}


def rows():
    return TensorDataset(torch.randn(64, 5), torch.arange(64) % 2)


def trainer(tmp_path, *callbacks, steps=24, batch=None, **options):
    """A run whose draws differ; steps without a row are as many as others if ``batch`` is 1."""
    dp = DPConfig(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0,
        expected_batch_size=batch, max_physical_batch_size=2,
    )  # fmt: skip
    return L.Trainer(
        **{
            "strategy": PrivateStrategy(dp, public_metrics=["temperature"]), "accelerator": "cpu",
            "max_steps": steps, "logger": False, "callbacks": list(callbacks),
            "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "log_every_n_steps": 1,
            "default_root_dir": tmp_path, **options,
        }
    )  # fmt: skip


def told(function, batch):
    """Return what a hook learns from a batch by a function, also if it fails."""
    try:
        return repr(function(batch))
    except Exception as error:  # noqa: BLE001 # an error's text tells something, too
        return f"{type(error).__name__}: {error}"


QUESTIONS = [
    repr, len, bool, vars, dir, list, sum, iter, hash, lambda b: b.size, lambda b: b.size(),
    lambda b: b.size(0), lambda b: b.shape, lambda b: b.shape[0], lambda b: b.shape[1],
    lambda b: b.chunks, lambda b: b[0], lambda b: b[0].size(0), lambda b: len(b["x"]),
    lambda b: b["x"]["y"].shape[0], lambda b: b[0][0], lambda b: b[:100], lambda b: b[0].shape[-1],
    lambda b: b[0].numel(), lambda b: 1 in b, lambda b: b.x, lambda b: list(b.shape),
    lambda b: tuple(b), lambda b: b[0].mean(), lambda b: len(b.shape),
]  # fmt: skip


def test_every_step_looks_the_same_to_every_hook(tmp_path):
    seen, drawn = [], []

    class Spy(Callback):
        def look(self, trainer, batch):
            results = trainer.fit_loop.epoch_loop._results
            seen.extend(
                tuple(told(question, thing) for question in QUESTIONS)
                for thing in (batch, results.batch)
            )
            assert results.batch_size is None

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            drawn.append(sum(chunk.size for chunk in trainer.strategy._step.drawn.chunks))
            self.look(trainer, batch)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.look(trainer, batch)
            assert trainer.strategy._step.drawn is None

    class Hooks(Model):
        def on_train_batch_start(self, batch, batch_idx):
            Spy.look(None, self.trainer, batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            Spy.look(None, self.trainer, batch)

    run = trainer(tmp_path, Spy(), batch=2)
    run.fit(Hooks(), DataLoader(rows(), batch_size=8))
    assert len(set(drawn)) > 1
    assert len(seen) == 8 * 24
    assert len(set(seen)) == 1
    answers = seen[0]
    assert "2 rows" in answers[0]
    assert answers[QUESTIONS.index(len)] == "2"
    for answer in answers[-10:]:
        assert answer.startswith(
            "_RowsWithheldError: hooks and callbacks get an ExpectedBatch of 2"
        )


def test_what_is_asked_of_an_expected_batch():
    batch = ExpectedBatch(7)
    assert len(batch) == batch.size(0) == batch.shape[0] == batch.size()[0] == 7
    assert len(batch[0]) == batch["x"].shape[0] == batch[1]["y"].size(0) == len(batch["x"]) == 7
    assert not hasattr(batch, "chunks")
    for question in (lambda: batch[0][0], lambda: batch[1:], lambda: batch.size(1), batch.__iter__):
        with pytest.raises(PrivacyError, match="7 rows, the public expected size"):
            question()
    with pytest.raises(AttributeError):
        batch.chunks = ()
    for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert len(copied[0]) == 7


def test_a_hook_that_reads_rows_fails_before_anything_is_spent(tmp_path):
    class Reads(Model):
        def on_train_batch_start(self, batch, batch_idx):
            self.first = batch[0].mean()

    run = trainer(tmp_path)
    with pytest.raises(PrivacyError, match="training_step and the batch-transfer hooks only"):
        run.fit(Reads(), DataLoader(rows(), batch_size=8))
    assert run.strategy.ledger.steps == 0


WORKING = {
    "len": (len, Model, rows),
    "of the first tensor": (lambda b: b[0].size(0), Model, rows),
    "shape": (lambda b: b[1].shape[0], Model, rows),
    "as in Lightning's documentation": (lambda b: b.size(0), Model, rows),
    "by name": (lambda b: b["x"].shape[0], Named, NamedRows),
    "len by name": (lambda b: len(b["y"]), Named, NamedRows),
    "a constant": (lambda b: 8, Model, rows),
}


@pytest.mark.parametrize("name", WORKING)
def test_throughput_counts_the_expected_rows(tmp_path, name):
    size, model, dataset = WORKING[name]
    monitor = ThroughputMonitor(batch_size_fn=size, length_fn=lambda b: 5 * size(b), window_size=2)
    run = trainer(tmp_path, monitor, steps=6, logger=CSVLogger(tmp_path))
    with pytest.warns(UserWarning, match="flops_per_batch"):
        run.fit(model(), DataLoader(dataset(), batch_size=8))
    (file,) = Path(tmp_path).glob("**/metrics.csv")
    with file.open() as lines:
        published = list(csv.DictReader(lines))
    assert [row["train/samples"] for row in published] == [str(8 * n) for n in range(1, 7)]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size_fn": lambda b: b.size},
        {"batch_size_fn": lambda b: sum(chunk.size for chunk in b.chunks)},
        {"batch_size_fn": lambda b: sum(len(x) for x in b)},
        {"batch_size_fn": lambda b: b.images.shape[0]},
        {"batch_size_fn": lambda b: {}["rows"]},
        {"batch_size_fn": len, "length_fn": lambda b: b[0].numel()},
        {"batch_size_fn": len, "length_fn": lambda b: b[0].shape[1]},
    ],
)
def test_throughput_that_would_fail_is_refused_before_the_first_step(tmp_path, options):
    run = trainer(tmp_path, ThroughputMonitor(**options))
    with pytest.raises(UnsupportedTrainerOptionError, match=r"ThroughputMonitor.*lambda batch: 8"):
        run.fit(Model(), DataLoader(rows(), batch_size=8))
    assert run.strategy.ledger.steps == 0


def test_the_profiler_counts_steps_and_not_chunks(tmp_path):
    class Transfers(Model):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

        def training_step(self, batch, batch_idx):
            with self.trainer.profiler.profile("mine"):
                return super().training_step(batch, batch_idx)

    profiler = SimpleProfiler()
    run = trainer(tmp_path, profiler=profiler)
    run.fit(Transfers(), DataLoader(rows(), batch_size=8))
    assert run.profiler is profiler
    counts = {name: len(times) for name, times in profiler.recorded_durations.items()}
    assert counts["run_training_batch"] == 24
    assert set(counts.values()) <= {1, 3, 24, 25, 27}, counts  # a fit, its epochs, its steps
    assert not any("mine" in name or "on_after_batch_transfer" in name for name in counts)


def test_a_step_without_rows_returns_what_others_do(tmp_path):
    seen, drawn = [], []

    class Spy(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rows = trainer.strategy._step.drawn
            if not drawn:  # something to repeat
                rows.chunks = (Chunk(2, (torch.randn(2, 5), torch.arange(2))),)
            drawn.append(len(rows.chunks))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(str(outputs))

    trainer(tmp_path, Spy(), batch=1).fit(Model(), DataLoader(rows(), batch_size=8))
    assert 0 in drawn
    assert set(seen) == {"{'loss': tensor(nan), 'temperature': 2.0}"}


# SQLAlchemy 2.1 on what MLflow does.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_system_metrics_of_mlflow_are_stopped(tmp_path, monkeypatch, caplog, mlflow_database):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    shutil.copy(mlflow_database, tmp_path / "m.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/m.db")
    try:
        with mlflow.start_run(experiment_id="0", log_system_metrics=True) as active:
            (monitor,) = fluent.run_id_to_system_metrics_monitor.values()
            running = []

            class Spy(Callback):
                def on_train_start(self, trainer, module):
                    running.append(monitor._process)

            with caplog.at_level(logging.WARNING, "lightning_secure"):
                trainer(tmp_path, Spy(), steps=3).fit(Model(), DataLoader(rows(), batch_size=8))
        assert running == [None]
        assert "system metrics of this process were stopped" in caplog.text
        assert mlflow.get_run(active.info.run_id).info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(None)
