"""What ``save_hyperparameters`` leaves in checkpoints, and what of it is taken out."""

from __future__ import annotations

import collections
import dataclasses
import enum
from argparse import Namespace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_secure import (
    CanarySearch,
    EncryptedCheckpointIO,
    RedactingCheckpointIO,
    Redactor,
    load_encrypted_checkpoint,
)
from lightning_secure.redaction.redactor import REDACTED

PASSWORD, ADDRESS = "Wintergreen-90210", "mary.q@clinic.example"
CANARIES = {"password": PASSWORD, "address": ADDRESS}


class Silent:
    """Shows nothing of itself as text, and everything to pickle."""

    def __init__(self):
        self.key = PASSWORD


class Colour(enum.Enum):
    RED = 1


class Place(enum.Enum):
    HERE = Silent()


class Owner(enum.StrEnum):
    MARY = ADDRESS
    NOBODY = "nobody"


@dataclasses.dataclass
class Database:
    host: str = "db"
    password: str = PASSWORD

    def __post_init__(self):
        self.connection = f"postgres://u:{self.password}@{self.host}"  # no field, but pickled


@dataclasses.dataclass(frozen=True)
class Clean:
    size: int = 3
    names: tuple[str, ...] = ("a", "b")


class Login(NamedTuple):
    user: str
    word: str


class Float(float): ...


class Text(str): ...


class Bytes(bytes): ...


@dataclasses.dataclass(frozen=True)
class Key:
    name: str = "k"

    def __str__(self):
        return "k"


class Unreadable(list):
    def __iter__(self):
        raise RuntimeError(ADDRESS)

    def __reduce__(self):
        return list, ((ADDRESS,),)


def with_note(value):
    """Attach what a value does not show, and pickle writes."""
    vars(value)["note"] = ADDRESS
    return value


class Settings(dict):
    """As other libraries' containers: with more than its items."""

    def __init__(self, **items):
        super().__init__(items)
        self.parent = {"password": PASSWORD}


DIRTY = {
    "db_password": PASSWORD,
    "pin_password": 90210,
    "url": f"postgresql://u:{PASSWORD}@db/x",
    "contact": [ADDRESS, {"mail": (ADDRESS,)}],
    f"by {ADDRESS}": 1,
    "database": Database(),
    "login": Login("u", f"pwd={PASSWORD}"),
    "namespace": Namespace(a=SimpleNamespace(urls={1: f"https://u:{PASSWORD}@h"})),
    "path": Path(f"/data/{ADDRESS}"),
    "owner": Owner.MARY,
    "bytes": f"password={PASSWORD}".encode(),
    "argv": ["--db-password", PASSWORD],
    "silent": Silent(),
    "settings": Settings(lr=3),
    "deque": collections.deque([ADDRESS]),
    "tensor": with_note(torch.zeros(2)),
    "parameter": with_note(torch.nn.Parameter(torch.zeros(2))),
    "float": with_note(Float(0.5)),
    "text": with_note(Text("adam")),
    "raw": with_note(Bytes(b"raw")),
    "keys": {with_note(Text("a")): 1},
    "objects": {Key(ADDRESS): 1},
    "unreadable": Unreadable(),
    "view": torch.frombuffer(bytearray(f"\0\0{ADDRESS}".encode()), dtype=torch.uint8)[:2],
    "member": Place.HERE,
    "method": {"password": PASSWORD}.get,
    "dtype": np.zeros(2, np.dtype("f8", metadata={"by": ADDRESS})),
}
CLEAN = {
    "lr": 0.1,
    "steps": 3,
    "none": None,
    "flag": True,
    "name": "adam",
    "layers": [1, (2, 3), {4}],
    "by number": {1: "a", None: "b"},
    "tensor": torch.arange(3),
    "number": np.float32(2.5),
    "array": np.arange(3.0),
    "dtype": torch.bfloat16,
    "shape": torch.Size([2, 3]),
    "module": torch.nn.Linear,
    "function": torch.nn.functional.relu,
    "builtin": [len, torch.relu, torch.nn.functional.gelu, dict.fromkeys],
    "colour": Colour.RED,
    "nobody": Owner.NOBODY,
    "path": PurePosixPath("/data"),
    "bytes": b"abc",
    "range": range(3),
    "clean": Clean(),
    "complex": 1j,
    "nested": Namespace(a=SimpleNamespace(b=1)),
    "login": Login("u", "v"),
    "deque": collections.deque([1]),
}  # fmt: skip


ARRAYS = ("tensor", "array")


class Kept(TorchCheckpointIO):
    """Keeps what it is given to write."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.checkpoint = checkpoint
        super().save_checkpoint(checkpoint, path, storage_options)


def written(folder, hyperparameters, redactor=None):
    inner = Kept()
    checkpoint = {"state_dict": {}, "hyper_parameters": hyperparameters}
    RedactingCheckpointIO(inner, redactor=redactor).save_checkpoint(checkpoint, folder / "a.ckpt")
    assert checkpoint["hyper_parameters"] is hyperparameters
    return inner.checkpoint["hyper_parameters"]


@pytest.mark.parametrize("name", DIRTY)
def test_nothing_is_found_in_a_checkpoint(tmp_path, name):
    value = DIRTY[name]
    search = CanarySearch({**CANARIES, "pin": "90210"})
    TorchCheckpointIO().save_checkpoint({"hyper_parameters": {name: value}}, tmp_path / "a.ckpt")
    # A short number is no text for pickle.
    assert search.search([tmp_path]) or value == 90210
    written(tmp_path, {name: value})
    assert search.search([tmp_path]) == []


def test_what_is_clean_keeps_its_type(tmp_path):
    after = written(tmp_path, CLEAN)
    assert list(after) == list(CLEAN)
    for name, value in CLEAN.items():
        assert type(after[name]) is type(value), name
        assert np.array_equal(after[name], value) if name in ARRAYS else after[name] == value, name


def test_what_is_taken_out_leaves_the_rest(tmp_path):
    after = written(tmp_path, DIRTY)
    assert after["database"].__dict__ == {"host": "db", "password": REDACTED}
    assert after["login"] == Login("u", f"pwd={REDACTED}")
    assert after["namespace"].a.urls == {1: f"https://{REDACTED}@h"}
    assert after["contact"] == [REDACTED, {"mail": (REDACTED,)}]
    assert after["path"] == Path(f"/data/{REDACTED}")
    assert after["argv"] == ["--db-password", REDACTED]
    assert after["pin_password"] == after["owner"] == REDACTED
    assert after["settings"] == {"lr": 3}
    assert [type(after[name]) for name in ("float", "text", "raw")] == [float, str, bytes]
    assert torch.equal(after["tensor"], torch.zeros(2))
    assert type(after["settings"]) is dict
    assert after["view"].tolist() == [0, 0]
    assert after["member"] == "HERE"
    assert after["dtype"].tolist() == [0, 0]
    assert after[f"by {REDACTED}"] == 1


class Model(BoringModel):
    def __init__(self, lr=0.1, db_password="", contact=""):
        super().__init__()
        self.save_hyperparameters()


class Data(BoringDataModule):
    def __init__(self, source=""):
        super().__init__()
        self.save_hyperparameters()


def trained(folder, plugins, ckpt_path=None, epochs=1):
    trainer = L.Trainer(
        max_epochs=epochs, limit_train_batches=1, limit_val_batches=0, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, plugins=plugins,
        callbacks=[ModelCheckpoint(folder, save_last=True)], default_root_dir=folder,
    )  # fmt: skip
    model = Model(0.5, db_password=PASSWORD, contact=ADDRESS)
    trainer.fit(model, datamodule=Data(f"postgres://u:{PASSWORD}@h"), ckpt_path=ckpt_path)
    assert model.hparams.db_password == PASSWORD  # the run's own are as they were
    return folder / "last.ckpt"


def test_a_trainers_checkpoints_hold_no_secrets(tmp_path):
    trained(tmp_path / "plain", [])
    found = CanarySearch(CANARIES).search([tmp_path / "plain"])
    assert {hit.label for hit in found} == set(CANARIES)

    redacting = RedactingCheckpointIO()  # around what the Trainer would use
    path = trained(tmp_path / "redacted", [redacting])
    assert CanarySearch(CANARIES).search([tmp_path / "redacted"]) == []
    assert redacting.redactor.counts["e-mail"] > 0
    model = Model.load_from_checkpoint(path)
    assert dict(model.hparams) == {"lr": 0.5, "db_password": REDACTED, "contact": REDACTED}
    model = Model.load_from_checkpoint(path, db_password=PASSWORD)
    assert model.hparams.db_password == PASSWORD
    assert Data.load_from_checkpoint(path).hparams.source == f"postgres://{REDACTED}@h"
    trained(tmp_path / "redacted", [redacting], ckpt_path=path, epochs=2)


def test_whoever_has_the_key_finds_no_secrets_either(tmp_path, keys):
    files = EncryptedCheckpointIO(keys)
    path = trained(tmp_path / "a", [files])
    assert load_encrypted_checkpoint(Model, path, keys=keys).hparams.db_password == PASSWORD
    path = trained(tmp_path / "b", [RedactingCheckpointIO(files)])
    assert path.read_bytes().startswith(b"LSECCKPT")
    model = load_encrypted_checkpoint(Model, path, keys=keys)
    assert dict(model.hparams) == {"lr": 0.5, "db_password": REDACTED, "contact": REDACTED}
    trained(tmp_path / "b", [RedactingCheckpointIO(files)], ckpt_path=path, epochs=2)


def test_it_goes_with_writing_in_the_background(tmp_path):
    trained(tmp_path, [AsyncCheckpointIO(RedactingCheckpointIO(TorchCheckpointIO()))])
    trained(tmp_path / "other", [RedactingCheckpointIO(AsyncCheckpointIO(TorchCheckpointIO()))])
    assert CanarySearch(CANARIES).search([tmp_path]) == []


def test_a_redactor_of_the_users_own_is_used(tmp_path):
    redactor = Redactor(extra_patterns=[r"MRN-\d+"])
    assert written(tmp_path, {"patient": "MRN-123"}, redactor) == {"patient": REDACTED}
    assert redactor.counts["extra-0"] == 1
