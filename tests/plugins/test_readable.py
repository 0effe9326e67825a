"""What could not be read back is refused by name, before the first step and before writing."""

from __future__ import annotations

import collections
import dataclasses
import enum
import pathlib
import threading
import time

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, EncryptedCheckpointIO, PrivateStrategy, RedactingCheckpointIO
from lightning_secure.errors import ConfigError
from lightning_secure.plugins.readable import with_plain_numbers


class Mode(enum.Enum):
    A = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    lr: float = 0.1


@dataclasses.dataclass(slots=True)
class Slots:
    lr: float = 0.1


class Talks:
    def __str__(self):
        return "talks"


UNSAFE = {
    "range": range(3),
    "frozen dataclass": Frozen(),
    "slots": Slots(),
    "enum": Mode.A,
    "path": pathlib.Path("a"),
    "deque": collections.deque([1]),
    "defaultdict": collections.defaultdict(int, a=1),
    "array": np.arange(3.0),
    "generator": torch.Generator(),
    "numpy generator": np.random.default_rng(0),
    "ellipsis": ...,
    "not implemented": NotImplemented,
    "local class": type("S", (str,), {})("hunter2"),
    "lambda": lambda: 1,
    "module": torch.nn.MSELoss(),
    "long double": np.longdouble("0.1"),
    "date": np.datetime64("2026-01-01"),
    "duration": np.timedelta64(5, "ns"),  # which equals 5
    "text that numpy cuts": np.str_("a\0"),
    "lock": threading.Lock(),
}


class Model(BoringModel):
    def __init__(self, thing=None):
        super().__init__()
        self.save_hyperparameters()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


def trainer(root, plugin, **options):
    return L.Trainer(
        **{
            "plugins": [plugin],
            "max_epochs": 1,
            "limit_train_batches": 2,
            "limit_val_batches": 0,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            **options,
        }
    )


@pytest.mark.parametrize("name", UNSAFE)
def test_it_is_refused_by_name_before_it_is_written(name, tmp_path, keys):
    files = EncryptedCheckpointIO(keys)
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "callbacks"):
        state = {"a": 1, key: {"b": 2, "thing": UNSAFE[name]}}
        with pytest.raises(ConfigError, match=r"'thing'") as caught:
            files.save_checkpoint(state, tmp_path / "x.ckpt")
        assert "hunter2" not in str(caught.value)
        assert caught.value.__context__ is None
    with pytest.raises(ConfigError, match=r"entry 'thing'"):
        files.save_checkpoint({"thing": [{"a": UNSAFE[name]}]}, tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrap", [lambda io: io, AsyncCheckpointIO], ids=["plain", "async"])
@pytest.mark.parametrize("name", ["range", "frozen dataclass", "enum", "deque"])
def test_it_is_refused_before_the_first_step(name, wrap, tmp_path, keys):
    model = Model(UNSAFE[name])
    run = trainer(tmp_path, wrap(EncryptedCheckpointIO(keys)))
    with pytest.raises(ConfigError, match=r"hyperparameter 'thing'"):
        run.fit(model)
    assert model.steps == 0
    trainer(tmp_path, wrap(EncryptedCheckpointIO(keys))).validate(model, verbose=False)


def test_a_private_fit_spends_nothing_on_it(tmp_path, keys):
    strategy = PrivateStrategy(DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0))
    run = trainer(tmp_path, EncryptedCheckpointIO(keys), strategy=strategy)
    with pytest.raises(ConfigError, match=r"hyperparameter 'thing'"):
        run.fit(Model(range(3)), DataLoader(TensorDataset(torch.randn(8, 32)), batch_size=4))
    assert run.global_step == 0
    assert not (tmp_path / "privacy_journal").exists()


def test_what_the_redactor_makes_text_of_is_not_refused(tmp_path, keys):
    redacting = RedactingCheckpointIO(EncryptedCheckpointIO(keys))
    run = trainer(tmp_path, redacting)
    run.fit(Model(Talks()))
    path = run.checkpoint_callback.best_model_path
    assert "talks" in redacting.load_checkpoint(path)["hyper_parameters"]["thing"]


@pytest.mark.parametrize("named", [range, Frozen])
def test_what_lightning_cannot_copy_is_refused_before_the_first_step(named, tmp_path, keys):
    thing = named(3) if named is range else named()
    files = EncryptedCheckpointIO(keys, safe_globals=[named])
    run = trainer(tmp_path, files)
    run.fit(Model(thing))
    path = run.checkpoint_callback.best_model_path
    assert files.load_checkpoint(path)["hyper_parameters"]["thing"] == thing
    model = Model(thing)
    with pytest.raises(ConfigError, match=r"'thing'.*AsyncCheckpointIO"):
        trainer(tmp_path, AsyncCheckpointIO(files)).fit(model)
    assert model.steps == 0


def test_the_error_names_what_is_missing_until_nothing_is(tmp_path, keys):
    """Array by array, the names that the error gives are enough in the end."""
    named = []
    for _ in range(6):
        files = EncryptedCheckpointIO(keys, safe_globals=named)
        try:
            files.save_checkpoint({"x": np.arange(3.0)}, tmp_path / "x.ckpt")
            break
        except ConfigError as error:
            missing = str(error).removeprefix("the checkpoint would hold ").split(", which")[0]
            for name in missing.split(", "):
                module, _, attribute = name.rpartition(".")
                named.append(getattr(__import__(module, fromlist=["_"]), attribute))
    assert np.array_equal(files.load_checkpoint(tmp_path / "x.ckpt")["x"], np.arange(3.0))


def test_what_comes_back_as_something_else_is_refused(tmp_path, keys):
    files = EncryptedCheckpointIO(keys, safe_globals=[Forgets])
    with pytest.raises(ConfigError, match=r"Forgets, of which safe loading would make something"):
        files.save_checkpoint({"x": Forgets()}, tmp_path / "x.ckpt")


class Odd(collections.OrderedDict):
    def __reduce__(self):
        return (collections.OrderedDict, ([("a", 1)],))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 10, 20, 40])
def test_entries_before_it_hide_nothing(count, tmp_path, keys):
    state = {**{f"k{i}": {"x": i} for i in range(count)}, "callbacks": {"thing": Odd(a=1)}}
    with pytest.raises(ConfigError, match=r"'thing'"):
        EncryptedCheckpointIO(keys).save_checkpoint(state, tmp_path / "x.ckpt")


class Schedule:
    def __init__(self, step=1):
        self.step = step


@dataclasses.dataclass
class Config:
    schedule: object = dataclasses.field(default_factory=Schedule)
    weights: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones(()))
    table: dict[str, object] = dataclasses.field(default_factory=lambda: {"a": [Schedule(2)]})


class Changes(Schedule):
    def __setstate__(self, state):
        self.step = 7


def test_objects_that_know_no_equality_are_compared_by_their_fields(tmp_path, keys):
    files = EncryptedCheckpointIO(keys, safe_globals=[Config, Schedule, Changes])
    files.save_checkpoint({"x": Config()}, tmp_path / "x.ckpt")
    loaded = files.load_checkpoint(tmp_path / "x.ckpt")["x"]
    assert loaded.schedule.step == 1
    assert loaded.table["a"][0].step == 2
    with pytest.raises(ConfigError, match="would make something else"):
        files.save_checkpoint({"x": Config(Changes())}, tmp_path / "y.ckpt")


class Tidy(Model):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["hyper_parameters"] = {"thing": "a"}


class Tidies(L.Callback):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["hyper_parameters"] = {"thing": "a"}


@pytest.mark.parametrize("wrap", [lambda io: io, AsyncCheckpointIO], ids=["plain", "async"])
@pytest.mark.parametrize("how", ["module", "callback"])
def test_what_a_hook_makes_plain_is_not_refused(how, wrap, tmp_path, keys):
    files = EncryptedCheckpointIO(keys)
    hooks = [Tidies()] if how == "callback" else []
    run = trainer(tmp_path, wrap(files), callbacks=hooks)
    run.fit((Tidy if how == "module" else Model)(pathlib.Path("a")))
    path = run.checkpoint_callback.best_model_path
    assert files.load_checkpoint(path)["hyper_parameters"] == {"thing": "a"}


def test_where_no_checkpoint_is_written_nothing_is_refused(tmp_path, keys):
    model = Model(range(3))
    run = trainer(tmp_path, EncryptedCheckpointIO(keys), enable_checkpointing=False)
    run.fit(model)
    assert model.steps == 2
    with pytest.raises(ConfigError, match=r"'thing'"):
        run.save_checkpoint(tmp_path / "x.ckpt")


class Forgets:
    def __init__(self):
        self.value = 3

    def __reduce__(self):
        return (Forgets, (), {"value": 4})


def test_numbers_of_numpy_are_written_as_numbers_that_equal_them(tmp_path, keys):
    files = EncryptedCheckpointIO(keys)
    shared = [np.int64(1)]
    state = {
        "hyper_parameters": {
            "a": np.float64(0.1), "b": np.float32(0.1), "c": np.bool_(True), "d": np.str_("x"),
            "e": {np.int64(1): (np.uint8(2), [np.complex128(1j)])}, "f": np.float64("nan"),
        },
        "one": shared,
        "two": shared,
    }  # fmt: skip
    files.save_checkpoint(state, tmp_path / "x.ckpt")
    loaded = files.load_checkpoint(tmp_path / "x.ckpt")
    values = loaded["hyper_parameters"]
    assert values.pop("f") != values
    assert values == {
        "a": 0.1, "b": float(np.float32(0.1)), "c": True, "d": "x", "e": {1: (2, [1j])},
    }  # fmt: skip
    assert type(values["a"]) is float
    assert type(values["c"]) is bool
    assert loaded["one"] is loaded["two"]
    assert type(state["one"][0]) is np.int64  # the caller's stay what they are


def test_only_what_holds_such_a_number_is_copied():
    weights = collections.OrderedDict(a=1)
    weights._metadata = {"version": 1}
    inner = [weights]
    assert with_plain_numbers(inner) is inner
    weights["b"] = np.float32(1)
    inner.append(inner)
    made = with_plain_numbers(inner)
    assert made[1] is made
    assert made[0]._metadata == {"version": 1}
    assert type(made[0]["b"]) is float


@pytest.mark.parametrize("kind", ["many", "large"])
def test_large_tensors_are_tried_without_their_data(kind, tmp_path, keys, monkeypatch):
    sizes = []
    real = torch.load

    def load(file, **options):
        sizes.append(file.getbuffer().nbytes)
        return real(file, **options)

    monkeypatch.setattr("lightning_secure.plugins.readable.torch.load", load)
    state = {"w": torch.zeros(10_000_000)} if kind == "large" else {
        str(i): torch.nn.Parameter(torch.zeros(200_000)) for i in range(50)
    }  # fmt: skip
    EncryptedCheckpointIO(keys).save_checkpoint(state, tmp_path / "x.ckpt")
    assert max(sizes) < 100_000


# ---------------------------------------------------------------- nested plugins


class Slow(EncryptedCheckpointIO):
    """Writes late, and fails if it is told to."""

    error: Exception | None = None

    def save_checkpoint(self, *args, **options):
        time.sleep(0.3)
        if self.error is not None:
            raise self.error
        super().save_checkpoint(*args, **options)


NESTED = {
    "async(enc)": lambda io: AsyncCheckpointIO(io),
    "redacting(async(enc))": lambda io: RedactingCheckpointIO(AsyncCheckpointIO(io)),
    "async(redacting(enc))": lambda io: AsyncCheckpointIO(RedactingCheckpointIO(io)),
    "redacting(redacting(async(enc)))": lambda io: RedactingCheckpointIO(
        RedactingCheckpointIO(AsyncCheckpointIO(io))
    ),
    "async(redacting(async(enc)))": lambda io: AsyncCheckpointIO(
        RedactingCheckpointIO(AsyncCheckpointIO(io))
    ),
}


@pytest.mark.parametrize("how", NESTED)
@pytest.mark.parametrize("fails", [False, True])
def test_the_last_checkpoint_is_there_when_fit_returns_or_its_error_is_raised(
    how, fails, tmp_path, keys
):
    slow = Slow(keys)
    slow.error = OSError(28, "No space left on device") if fails else None
    saving = ModelCheckpoint(tmp_path / "c")
    run = trainer(tmp_path, NESTED[how](slow), callbacks=[saving])
    if fails:
        with pytest.raises(OSError, match="No space left"):
            run.fit(Model())
    else:
        run.fit(Model())
        assert slow.load_checkpoint(saving.best_model_path)["global_step"] == 2


@pytest.mark.parametrize("wrap", [lambda io: io, RedactingCheckpointIO], ids=["plain", "redacting"])
def test_an_asynchronous_one_around_another_is_refused(wrap, tmp_path, keys):
    nested = wrap(AsyncCheckpointIO(AsyncCheckpointIO(EncryptedCheckpointIO(keys))))
    with pytest.raises(ConfigError, match="AsyncCheckpointIO around AsyncCheckpointIO"):
        trainer(tmp_path, nested).fit(Model())
