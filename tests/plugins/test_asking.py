"""Strategies that write and read checkpoints past their CheckpointIO."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from torch import distributed
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import (
    DPConfig,
    EncryptedCheckpointIO,
    EncryptedDataModule,
    PrivateDDPStrategy,
    PrivateFSDPStrategy,
    PrivateStrategy,
    RedactingCheckpointIO,
    load_encrypted_checkpoint,
    seal,
)
from lightning_secure.errors import ConfigError
from lightning_secure.plugins import entry_point
from lightning_secure.util.strategy_check import introduce

ROOT = Path(__file__).parent.parent.parent
CANARY = "pw-Zx81-canary"
WEIGHT = 0.7315082  # so that its bytes can be looked for
SPLITS = ("train", "val", "test", "predict")


class Model(L.LightningModule):
    """Shards itself, and has a secret among its hyperparameters."""

    def __init__(self, db_password=CANARY):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(self.net.weight, WEIGHT)
        self.steps = 0

    def configure_model(self):
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.steps += 1

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # Lightning sets them, for each Trainer anew
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def installed(monkeypatch, tmp_path_factory):
    """Make the entry points be there as pyproject.toml has them, whatever was installed when."""
    folder = tmp_path_factory.mktemp("site")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    metadata = folder / "lightning_secure-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-secure\n")
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)


def trainer(folder, strategy, *plugins, epochs=1):
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, strategy=strategy, plugins=[*plugins],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True)], default_root_dir=folder,
    )  # fmt: skip


def rows():
    return DataLoader(TensorDataset(torch.rand(4, 4)), batch_size=4)


def found(folder):
    """Return which secrets lie in a folder's files."""
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    weight = np.float32(WEIGHT).tobytes() * 4
    return {
        name
        for name, value in (("canary", CANARY.encode()), ("weights", weight))
        if value in everything
    }


class OnCpu(FSDPStrategy):
    """The Trainer takes Lightning's own on GPUs only, and torch's FSDP does so later."""


PROTECTING = {
    "encrypted": EncryptedCheckpointIO,
    "redacted": lambda keys: RedactingCheckpointIO(),
    "encrypted in the background": lambda keys: AsyncCheckpointIO(EncryptedCheckpointIO(keys)),
    "redacted and encrypted": lambda keys: RedactingCheckpointIO(EncryptedCheckpointIO(keys)),
}


@pytest.mark.parametrize("kind", PROTECTING)
def test_nothing_is_written_past_a_checkpoint_io(kind, tmp_path, keys, installed):
    if kind == "encrypted":
        trainer(tmp_path / "plain", ModelParallelStrategy()).fit(Model(), rows())
        assert found(tmp_path / "plain") == {"canary", "weights"}

    files = PROTECTING[kind](keys)
    run, model = trainer(tmp_path / "run", ModelParallelStrategy(), files), Model()
    with pytest.raises(ConfigError, match="save_distributed_checkpoint=False"):
        run.fit(model, rows())
    with pytest.raises(ConfigError, match="Nothing was written"):
        run.validate(model, rows())
    assert model.steps == 0
    assert found(tmp_path / "run") == set()


def test_fsdp_writes_nothing_past_it(tmp_path, keys, installed):
    run = trainer(tmp_path, OnCpu(state_dict_type="sharded"), EncryptedCheckpointIO(keys))
    with pytest.raises(ConfigError, match='state_dict_type="full"'):
        run.fit(Model(), rows())
    assert found(tmp_path) == set()


def without_entry_point(run):
    run.callbacks = [one for one in run.callbacks if type(one) is not entry_point.Introduction]
    return run


@pytest.fixture
def sealed(tmp_path, keys):
    for split in SPLITS:
        seal({"x": np.ones((4, 4), dtype=np.float32)}, tmp_path / "d", split=split, keys=keys)
    return EncryptedDataModule(tmp_path / "d", keys=keys, batch_size=4)


def test_a_datamodule_looks_by_itself(tmp_path, keys, sealed):
    run = trainer(tmp_path / "run", ModelParallelStrategy(), EncryptedCheckpointIO(keys))
    with pytest.raises(ConfigError, match="Nothing was written"):
        without_entry_point(run).fit(Model(), datamodule=sealed)
    assert sealed.manifest_digest is None  # it was not even opened
    assert found(tmp_path / "run") == set()


@pytest.mark.parametrize("by", ["entry point", "datamodule"])
def test_a_refusal_makes_nobody_save_a_checkpoint(by, tmp_path, keys, sealed, installed):
    run = trainer(tmp_path / "run", ModelParallelStrategy(), EncryptedCheckpointIO(keys))
    data = {"train_dataloaders": rows()}
    if by == "datamodule":
        run, data = without_entry_point(run), {"datamodule": sealed}
    run.callbacks.append(OnExceptionCheckpoint(tmp_path / "run"))
    with pytest.raises(ConfigError, match="Nothing was written"):
        run.fit(Model(), **data)
    for weights_only in (False, True) if by == "datamodule" else (False,):
        with pytest.raises(ConfigError, match="Nothing was written"):
            run.save_checkpoint(tmp_path / "run" / "own.ckpt", weights_only=weights_only)
    assert found(tmp_path / "run") == set()


def whole():
    return ModelParallelStrategy(save_distributed_checkpoint=False)


@pytest.fixture
def forged(tmp_path, keys):
    """A checkpoint in the clear that somebody has put into an encrypted one's place."""
    files = EncryptedCheckpointIO(keys)
    trainer(tmp_path / "run", whole(), files).fit(Model(), rows())
    path = tmp_path / "run" / "last.ckpt"
    assert found(tmp_path / "run") == set()
    model = load_encrypted_checkpoint(Model, path, keys=keys)
    assert model.hparams.db_password == CANARY
    TorchCheckpointIO().save_checkpoint(files.load_checkpoint(path), tmp_path / "forged.ckpt")
    return tmp_path / "forged.ckpt"


WAYS = ("fit", "validate", "test", "predict")


def test_nothing_is_made_of_a_checkpoint_that_was_read_past_it(
    tmp_path, keys, forged, sealed, installed
):
    model = Model()
    trainer(tmp_path / "run", whole(), epochs=2).fit(model, rows(), ckpt_path=forged)
    assert model.steps > 0

    model = Model()
    for way in WAYS:
        run = trainer(tmp_path / "run", whole(), EncryptedCheckpointIO(keys), epochs=2)
        run.callbacks.append(OnExceptionCheckpoint(tmp_path / "run", "forged"))
        with pytest.raises(ConfigError, match="has read a checkpoint itself"):
            getattr(run, way)(model, rows(), ckpt_path=forged)
        alone = without_entry_point(
            trainer(tmp_path / "run", whole(), EncryptedCheckpointIO(keys), epochs=2)
        )
        with pytest.raises(ConfigError, match="has read a checkpoint itself"):
            getattr(alone, way)(model, datamodule=sealed, ckpt_path=forged)
    assert model.steps == 0
    assert not (tmp_path / "run" / "forged.ckpt").exists()  # under our key now


def test_a_run_without_a_checkpoint_goes_on_after_one_with_it(tmp_path, keys, forged, installed):
    run, model = trainer(tmp_path / "run", whole(), EncryptedCheckpointIO(keys)), Model()
    with pytest.raises(ConfigError):
        run.test(model, rows(), ckpt_path=forged)
    run.test(model, rows())
    assert model.steps == 1


# ---------------------------------------------------------------- which strategies ask


class PassesOn(DDPStrategy):
    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path, weights_only=None):
        return super().load_checkpoint(checkpoint_path, weights_only)


class SaysSo(PassesOn):
    asks_checkpoint_io = True
    save_checkpoint = PassesOn.save_checkpoint
    load_checkpoint = PassesOn.load_checkpoint


class SaidElsewhere(SaysSo):
    """Something that nobody has spoken for."""

    def save_checkpoint(self, checkpoint, filepath, storage_options=None):
        torch.save(checkpoint, filepath)

    load_checkpoint = DeepSpeedStrategy.load_checkpoint


class Inherits(SaysSo):
    pass


def bare(kind):
    """Return one whose library is not installed here; its class is all that is looked at."""
    strategy = kind.__new__(kind)
    strategy._checkpoint_io = None
    return strategy


CONFIG = DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0)
#: A strategy, whether it writes through its CheckpointIO, and whether it reads so.
STRATEGIES = [
    (lambda: SingleDeviceStrategy("cpu"), True, True),
    (DDPStrategy, True, True),
    (lambda: bare(XLAStrategy), True, True),
    (lambda: FSDPStrategy(state_dict_type="full"), True, False),
    (lambda: FSDPStrategy(state_dict_type="sharded"), False, False),
    (lambda: OnCpu(state_dict_type="sharded"), False, False),
    (whole, True, False),
    (ModelParallelStrategy, False, False),
    (lambda: bare(DeepSpeedStrategy), False, False),
    (lambda: PrivateStrategy(CONFIG), True, True),
    (lambda: PrivateDDPStrategy(CONFIG), True, True),
    (lambda: PrivateFSDPStrategy(CONFIG), True, True),
    (PassesOn, False, False),
    (SaysSo, True, True),
    (Inherits, True, True),
    (SaidElsewhere, False, False),
]


@pytest.mark.parametrize(("make", "writes", "reads"), STRATEGIES)
def test_it_is_known_which_strategies_ask(make, writes, reads, keys):
    files, strategy = EncryptedCheckpointIO(keys), make()
    for what, asks in (("writes", writes), ("has read", reads and writes)):
        if asks:
            files.meet(strategy, loaded=what == "has read")
        else:
            match = "writes" if not writes else what
            with pytest.raises(ConfigError, match=f"^{type(strategy).__name__} {match} "):
                files.meet(strategy, loaded=what == "has read")


def test_an_error_says_what_to_do(keys):
    files = RedactingCheckpointIO()
    for strategy, instead in (
        (bare(DeepSpeedStrategy), '"ddp" and "private_fsdp" write and read through it'),
        (PassesOn(), "say asks_checkpoint_io = True in the class that defines save_checkpoint"),
    ):
        with pytest.raises(ConfigError, match=re.escape(instead)):
            files.meet(strategy, loaded=False)
    files.meet(whole(), loaded=True)  # nothing is redacted in what is read


def test_what_is_not_ours_is_not_asked_about():
    strategy = ModelParallelStrategy()
    for files in (TorchCheckpointIO(), AsyncCheckpointIO(TorchCheckpointIO())):
        strategy.checkpoint_io = files
        introduce(strategy, loaded=True)


def test_trainers_that_cannot_have_one_are_left_as_they_are(monkeypatch):
    assert [type(one) for one in entry_point.callbacks()] == [entry_point.Introduction]
    for name in ("plugins.checkpoint", "plugins.hyperparameters", "privacy.accounting.ledger"):
        monkeypatch.delitem(sys.modules, f"lightning_secure.{name}")
    assert entry_point.callbacks() == []
