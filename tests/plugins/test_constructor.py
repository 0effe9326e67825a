"""What a checkpoint names is neither imported nor called, by any way its content is read."""

from __future__ import annotations

import dataclasses
import enum
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NewType, TypedDict

import lightning as L
import pytest
import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode
from torch import nn

from lightning_secure import EncryptedCheckpointIO, load_encrypted_checkpoint
from lightning_secure.errors import CheckpointCorruptedError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No seed found"),
]
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
RAN: list[object] = []


def run(*values, **named) -> nn.Module:
    """What an attacker would like to have called."""
    RAN.append((values, named))
    return nn.Linear(1, 1)


class Victim(BoringModel):
    def __init__(
        self,
        backbone: nn.Module | None = None,
        parts: list[nn.Module] | None = None,
        table: dict[str, nn.Module] | None = None,
        act: Callable[..., object] | None = None,
        kind: type[nn.Module] | None = None,
        width: int = 2,
        options: dict | None = None,
    ):
        super().__init__()
        self.width = width
        self.act = act


class Child(Victim):
    pass


@pytest.fixture
def files(keys):
    RAN.clear()
    return EncryptedCheckpointIO(keys)


@pytest.fixture
def attack(monkeypatch):
    """A function in a module that is found by name, and another module that is not imported yet."""
    module = types.ModuleType("lsec_attack")
    module.run = run
    monkeypatch.setitem(sys.modules, "lsec_attack", module)
    monkeypatch.setattr(run, "__module__", "lsec_attack")
    return "lsec_attack.run"


def written(files, path, saved, **more):
    state = {
        "state_dict": BoringModel().state_dict(),
        "global_step": 1,
        "epoch": 0,
        "loops": {},
        "pytorch-lightning_version": L.__version__,
        "hyper_parameters": saved,
        **more,
    }
    files.save_checkpoint(state, path)
    return path


def spec(name, **more):
    return {"class_path": name, "init_args": {}, **more}


HIDDEN = {
    "alone": lambda name: {"backbone": spec(name)},
    "in a list": lambda name: {"parts": [spec(name)]},
    "under a key": lambda name: {"table": {"a": spec(name)}},
    "dict_kwargs": lambda name: {"backbone": {"class_path": name, "dict_kwargs": {"body": {}}}},
    "for a function": lambda name: {"act": name},
    "for a class": lambda name: {"kind": name},
    "deep": lambda name: {"options": {"a": [{"b": (1, spec(name))}]}},
    "instead of a module": lambda name: {"backbone": name},
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("key", ["hyper_parameters", "hparams", "module_arguments"])
def test_nothing_that_a_checkpoint_names_is_called(how, key, tmp_path, files, attack):
    hparams = {"_instantiator": INSTANTIATOR, **HIDDEN[how](attack)}
    more = {key: hparams} if key != "hyper_parameters" else {}
    path = written(files, tmp_path / "x.ckpt", {} if more else hparams, **more)
    with pytest.raises(ConfigError, match="neither imported nor called"):
        load_encrypted_checkpoint(Victim, path, keys=files.keys)
    assert RAN == []
    if key == "hyper_parameters" and how == "for a function":  # so the attack is real
        torch.save(files.load_checkpoint(path), tmp_path / "plain.ckpt")
        module = Victim.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
        assert module.act is run


def test_a_class_path_is_refused_without_an_instantiator_too(tmp_path, files, attack):
    path = written(files, tmp_path / "x.ckpt", {"backbone": spec(attack)})
    with pytest.raises(ConfigError, match="'backbone'"):
        load_encrypted_checkpoint(Victim, path, keys=files.keys)


def test_what_is_given_takes_the_place_of_a_name(tmp_path, files, attack):
    hparams = {"_instantiator": INSTANTIATOR, "act": attack, "backbone": spec(attack), "width": 5}
    path = written(files, tmp_path / "x.ckpt", hparams)
    module = load_encrypted_checkpoint(
        Victim, path, keys=files.keys, act=torch.relu, backbone=nn.Linear(1, 1)
    )
    assert (module.width, module.act, RAN) == (5, torch.relu, [])


@pytest.mark.parametrize("made", [run, torch.nn.Linear, dict])
def test_the_type_of_hyperparameters_is_not_called(made, tmp_path, keys, attack):
    RAN.clear()
    files = EncryptedCheckpointIO(keys, safe_globals=[made])
    path = written(files, tmp_path / "x.ckpt", {"width": 3}, hparams_type=made)
    with pytest.raises(CheckpointCorruptedError, match="hparams_type"):
        load_encrypted_checkpoint(Victim, path, keys=keys, safe_globals=[made])
    assert RAN == []


@pytest.mark.parametrize("made", [None, "Namespace", "os.system"])
def test_the_name_of_a_type_is_harmless(made, tmp_path, files):
    path = written(files, tmp_path / "x.ckpt", {"width": 3}, hparams_type=made)
    assert load_encrypted_checkpoint(Victim, path, keys=files.keys).width == 3


class Configured(BoringModel):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg


_OMEGACONF = [
    DictConfig, ContainerMetadata, Metadata, AnyNode, defaultdict, dict, list, int, Any,
]  # fmt: skip


@pytest.mark.parametrize("text", ["${lsec_run:1}", "a ${lsec_run:1} b", "${${name}:1}"])
@pytest.mark.parametrize("nested", [False, True])
def test_no_resolver_of_omegaconf_is_called(text, nested, tmp_path, keys):
    RAN.clear()
    register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
    register("lsec_run", run, replace=True)
    config = OmegaConf.create({"a": {"b": text}, "name": "lsec_run"})
    hparams = {"cfg": config} if nested else config
    more = {} if nested else {"hparams_name": "cfg", "hparams_type": DictConfig}
    files = EncryptedCheckpointIO(keys, safe_globals=_OMEGACONF)
    path = written(files, tmp_path / "x.ckpt", hparams, **more)
    RAN.clear()
    with pytest.raises(CheckpointCorruptedError, match=r"OmegaConf\.resolve"):
        load_encrypted_checkpoint(Configured, path, keys=keys, safe_globals=_OMEGACONF)
    assert RAN == []
    plain = OmegaConf.create({"a": 1, "b": "${a}"})  # what lies beside it calls nothing
    more = {"hparams_name": "cfg", "hparams_type": DictConfig}
    path = written(files, tmp_path / "x.ckpt", plain, **more)
    module = load_encrypted_checkpoint(Configured, path, keys=keys, safe_globals=_OMEGACONF)
    assert module.cfg.b == 1


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"hyper_parameters": [("_instantiator", INSTANTIATOR)]}, "no mapping"),
        ({"hparams": [("_instantiator", INSTANTIATOR)]}, "no mapping"),
        ({"pytorch-lightning_version": "hunter2"}, "version"),
        ({"pytorch-lightning_version": None}, "version"),
        ({"pytorch-lightning_version": 7}, "version"),
    ],
)
def test_what_is_no_checkpoint_of_a_trainer_is_refused(more, match, tmp_path, files):
    path = written(files, tmp_path / "x.ckpt", {}, **more)
    with pytest.raises(CheckpointCorruptedError, match=match) as caught:
        load_encrypted_checkpoint(Victim, path, keys=files.keys)
    assert "hunter2" not in str(caught.value)


# ---------------------------------------------------------------- honest ones


class Mode(enum.Enum):
    FAST = "f"


@dataclasses.dataclass
class Inner:
    rate: float = 0.1
    modes: tuple[Mode, ...] = ()


class Typed(BoringModel):
    def __init__(
        self,
        width: int = 2,
        mode: Mode = Mode.FAST,
        where: Path | None = None,
        inner: Inner | None = None,
        pair: tuple[int, float] = (1, 2.0),
        names: list[str] | None = None,
        table: dict[str, float] | None = None,
        rate: float = 1.0,
        act: Callable[..., object] = nn.functional.relu,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.got = (width, mode, where, inner, pair, names, table, rate, act)


@pytest.mark.parametrize("subclass", [False, True])
def test_a_checkpoint_of_lightningcli_opens_with_the_callers_class(
    subclass, tmp_path, keys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    name = f"{Typed.__module__}.Typed"
    monkeypatch.setitem(sys.modules, Typed.__module__, sys.modules[__name__])
    args = [
        "--width=3", "--mode=FAST", f"--where={tmp_path}", "--inner.rate=2",
        "--inner.modes=[FAST]", "--pair=[3, 4]", "--names=[a, b]", "--table={a: 1}", "--rate=3",
    ]  # fmt: skip
    prefix = "--model.init_args." if subclass else "--model."
    args = [one.replace("--", prefix, 1) for one in args]
    if subclass:
        args.insert(0, f"--model={name}")
    files = EncryptedCheckpointIO(keys)
    cli = LightningCLI(
        BoringModel if subclass else Typed,
        subclass_mode_model=subclass,
        run=False,
        args=args,
        save_config_callback=None,
        trainer_defaults={"logger": False, "max_steps": 1, "accelerator": "cpu",
                          "enable_progress_bar": False, "enable_model_summary": False,
                          "default_root_dir": str(tmp_path), "limit_val_batches": 0},
    )  # fmt: skip
    cli.trainer.strategy.checkpoint_io = files
    cli.trainer.fit(cli.model)
    path = cli.trainer.checkpoint_callback.best_model_path
    stored = files.load_checkpoint(path)["hyper_parameters"]
    assert stored["_instantiator"] == INSTANTIATOR
    assert ("_class_path" in stored) == subclass
    module = load_encrypted_checkpoint(Typed, path, keys=keys)
    assert module.got == cli.model.got
    assert module.got[3] == Inner(2.0, (Mode.FAST,))
    if subclass:
        with pytest.raises(ConfigError, match="give that class"):
            load_encrypted_checkpoint(BoringModel, path, keys=keys)


def test_a_checkpoint_does_not_choose_the_class(tmp_path, files):
    hparams = {"_instantiator": INSTANTIATOR, "_class_path": f"{Child.__module__}.Child"}
    path = written(files, tmp_path / "x.ckpt", hparams)
    with pytest.raises(ConfigError, match=r"Child.*give that class"):
        load_encrypted_checkpoint(Victim, path, keys=files.keys)
    assert type(load_encrypted_checkpoint(Child, path, keys=files.keys)) is Child


def test_no_environment_is_read(tmp_path, files, monkeypatch):
    monkeypatch.setitem(os.environ, "LSEC_SECRET", "hunter2")
    path = written(files, tmp_path / "x.ckpt", {"width": "${oc.env:LSEC_SECRET}"})
    module = load_encrypted_checkpoint(Victim, path, keys=files.keys)
    assert module.width == "${oc.env:LSEC_SECRET}"  # a text like any other


Uid = NewType("Uid", int)


class Table(TypedDict):
    a: int
    where: Path


@dataclasses.dataclass
class Checked:
    rate: float = 0.1

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError(f"hunter2 {self.rate}")
        torch.ones(1).item()  # is not possible with a tensor that has no data


class Restricted(BoringModel):
    def __init__(
        self,
        uid: Uid = Uid(1),
        table: Table | None = None,
        count: PositiveInt = 1,
        share: NonNegativeFloat = 0.5,
        checked: Checked | None = None,
    ):
        super().__init__()
        self.got = (uid, table, count, share, checked)


def test_types_that_restrict_plain_values_get_them(tmp_path, files):
    saved = {
        "uid": 4, "table": {"a": 2, "where": "x"}, "count": 3, "share": 2, "checked": {"rate": 1},
    }  # fmt: skip
    path = written(files, tmp_path / "x.ckpt", {"_instantiator": INSTANTIATOR, **saved})
    got = load_encrypted_checkpoint(Restricted, path, keys=files.keys).got
    assert got == (4, {"a": 2, "where": Path("x")}, 3, 2, Checked(1.0))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"count": -1}, "refused the values"),
        ({"count": "os.system"}, "neither imported nor called"),
        ({"uid": "os.system"}, "neither imported nor called"),
        ({"table": "os.system"}, "neither imported nor called"),
        ({"checked": {"rate": 2.0}}, "refused the values"),
        ({"checked": {"other": 2.0}}, "refused the values"),
    ],
)
def test_values_that_their_own_class_refuses_are_named(saved, words, tmp_path, files):
    path = written(files, tmp_path / "x.ckpt", {"_instantiator": INSTANTIATOR, **saved})
    with pytest.raises(ConfigError, match=words) as caught:
        load_encrypted_checkpoint(Restricted, path, keys=files.keys)
    assert caught.value.__context__ is None
    assert "hunter2" not in str(caught.value)
