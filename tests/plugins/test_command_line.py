"""LightningCLI with ``--ckpt_path`` of a checkpoint that this package wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn

from lightning_secure import EncryptedCheckpointIO, RedactingCheckpointIO
from lightning_secure.errors import CheckpointCorruptedError, ConfigError
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


# ---------------------------------------------------------------- planted in the clear

RAN: list[object] = []


def attack(*values: Any, **named: Any) -> nn.Module:
    """What an attacker would like to have called."""
    RAN.append((values, named))
    return nn.Linear(1, 1)


class Victim(BoringModel):
    def __init__(
        self,
        backbone: nn.Module | None = None,
        act: Callable[..., Any] | None = None,
        either: str | nn.Module | None = None,
        parts: list[nn.Module] | None = None,
        anything: Any = None,
        table: dict[str, float] | None = None,
        name: str = "",
    ):
        super().__init__()
        self.got = vars().copy()


class Below(Victim):
    def __init__(self, depth: int = 1, **kwargs: Any):
        super().__init__(**kwargs)


SPEC = {"class_path": f"{__name__}.attack"}
NAMING = {
    "backbone": SPEC,
    "act": f"{__name__}.attack",
    "either": f"{__name__}.attack",
    "parts": [SPEC],
    "anything": f"{{class_path: {__name__}.attack}}",
}


def planted(path, **values):
    state = {
        "state_dict": BoringModel().state_dict(), "global_step": 1, "epoch": 0,
        "pytorch-lightning_version": L.__version__,
        "hyper_parameters": {**values, "_instantiator": "lightning.pytorch.cli.instantiate_module"},
    }  # fmt: skip
    torch.save(state, path)
    return f"--ckpt_path={path}"


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    RAN.clear()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)

    def start(*args, model=Victim, **trainer):
        return LightningCLI(
            model,
            save_config_callback=None,
            args=["test", *args],
            trainer_defaults={
                "logger": False, "accelerator": "cpu", "limit_test_batches": 1,
                "enable_progress_bar": False, "enable_model_summary": False, **trainer,
            },
        )  # fmt: skip

    return start


def test_the_attack_is_real(evaluate, tmp_path):
    evaluate(planted(tmp_path / "x.ckpt", backbone=SPEC), plugins=[TorchCheckpointIO()])
    assert RAN


@pytest.mark.parametrize("how", ["plain", "redacting", "async", "by name"])
def test_where_checkpoints_are_encrypted_a_planted_one_makes_nothing(how, evaluate, tmp_path, keys):
    path = planted(tmp_path / "x.ckpt", backbone=SPEC)
    files = EncryptedCheckpointIO(keys)
    given: dict[str, Any] = {
        "plain": {"plugins": [files]},
        "redacting": {"plugins": [RedactingCheckpointIO(files)]},
        "async": {"plugins": [AsyncCheckpointIO(RedactingCheckpointIO(files))]},
        "by name": {},
    }[how]
    args = [path]
    if how == "by name":
        key = {"class_path": "lightning_secure.LocalKeyProvider", "init_args": {"path": "key.kek"}}
        inner = {"class_path": "lightning_secure.EncryptedCheckpointIO", "init_args": {"keys": key}}
        outer = {
            "class_path": "lightning_secure.RedactingCheckpointIO",
            "init_args": {"checkpoint_io": inner},
        }
        type(keys).generate(tmp_path / "key.kek")
        args.append(f"--trainer.plugins={json.dumps([outer])}")
    with pytest.raises(CheckpointCorruptedError, match="plaintext ones are refused"):
        evaluate(*args, **given)
    assert RAN == []


@pytest.mark.parametrize("model", [Victim, Below])
@pytest.mark.parametrize("name", NAMING)
def test_where_checkpoints_are_redacted_one_in_the_clear_names_nothing(
    name, model, evaluate, tmp_path
):
    path = planted(tmp_path / "x.ckpt", **{name: NAMING[name]})
    files = RedactingCheckpointIO()
    with pytest.raises(ConfigError, match=name):
        evaluate(path, model=model, plugins=[files])
    given = "torch.nn.ReLU" if name != "parts" else "[torch.nn.ReLU]"
    evaluate(path, f"--model.{name}={given}", model=model, plugins=[files])
    assert RAN == []


def test_a_checkpoint_in_the_clear_does_not_choose_the_class(evaluate, tmp_path):
    path = planted(tmp_path / "x.ckpt", _class_path=f"{__name__}.Below", name="a")
    own = f"--model={__name__}.Victim"
    with pytest.raises(ConfigError, match="another class"):
        evaluate(path, own, model=None, plugins=[RedactingCheckpointIO()])
    own = f"--model={__name__}.Below"
    cli = evaluate(path, own, model=None, plugins=[RedactingCheckpointIO()])
    assert cli.model.got["name"] == "a"


def test_plain_values_of_one_in_the_clear_are_used(evaluate, tmp_path):
    path = planted(tmp_path / "x.ckpt", name="a.b", table={"x": 0.5}, anything=["a", {"b": 1}])
    got = evaluate(path, plugins=[RedactingCheckpointIO()]).model.got
    assert (got["name"], got["table"], got["anything"]) == ("a.b", {"x": 0.5}, ["a", {"b": 1}])
