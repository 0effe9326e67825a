"""LightningCLI with ``--ckpt_path`` of a checkpoint that this package wrote."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_secure import EncryptedCheckpointIO, RedactingCheckpointIO
from lightning_secure.redaction.redactor import REDACTED

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No seed found"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Net(BoringModel):
    def __init__(self, db_password: str = "", width: int = 16, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.got = (db_password, width, lr)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)

    def start(plugin, *args):
        return LightningCLI(
            Net,
            save_config_callback=None,
            args=list(args),
            trainer_defaults={
                "plugins": [plugin], "logger": False, "accelerator": "cpu", "max_steps": 1,
                "enable_progress_bar": False, "enable_model_summary": False,
                "limit_val_batches": 0, "limit_test_batches": 1,
            },
        )  # fmt: skip

    return start


def saved(run, plugin, *args):
    cli = run(plugin, "fit", *args)
    cli.trainer.save_checkpoint("x.ckpt")
    return cli.model


def test_an_encrypted_checkpoint_is_opened(run, keys):
    files = EncryptedCheckpointIO(keys)
    trained = saved(run, files, "--model.lr=0.5")
    cli = run(files, "test", "--ckpt_path=x.ckpt", "--model.width=3")
    assert torch.equal(cli.model.layer.weight, trained.layer.weight)
    assert cli.model.got == ("", 3, 0.1)  # of the checkpoint, nothing but weights and states


def test_what_is_given_wins_over_what_was_redacted(run):
    files = RedactingCheckpointIO()
    saved(run, files, "--model.db_password=hunter2-abc", "--model.width=3", "--model.lr=0.2")
    stored = torch.load("x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["db_password"] == REDACTED
    args = ("test", "--ckpt_path=x.ckpt", "--model.db_password=hunter2-abc", "--model.lr=0.01")
    assert run(files, *args).model.got == ("hunter2-abc", 3, 0.01)
    assert run(files, "test", "--ckpt_path=x.ckpt").model.got == (REDACTED, 3, 0.2)


def test_other_checkpoints_are_read_as_lightning_does(run):
    files = TorchCheckpointIO()
    saved(run, files, "--model.width=3", "--model.lr=0.2")
    assert run(files, "test", "--ckpt_path=x.ckpt", "--model.lr=0.01").model.got == ("", 3, 0.2)
