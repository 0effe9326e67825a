from __future__ import annotations

import contextlib
import copy
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.loader.loader import EncryptedLoader
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, ManifestMismatchError

ROWS = 240
# Lightning's remarks that a resumed run saves its checkpoints elsewhere and at other times.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def seal(root, keys, *, split="train", rows=ROWS, offset=0.0):
    x = np.random.default_rng(1).normal(size=(rows, 4)).astype("float32") + np.float32(offset)
    with EncryptedShardWriter(
        root, split=split, keys=keys, segment_bytes=96, shard_bytes=1000, replace=True
    ) as writer:
        writer.write_batch({"x": x, "y": np.arange(rows)})
    return root


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, keys):
    root = seal(tmp_path_factory.mktemp("sealed"), keys)
    return seal(root, keys, split="val", rows=20)


def loaders(root, keys, world_size, *, batch_size=10, **options):
    data = EncryptedShardDataset(root, split="train", keys=keys)
    return [
        EncryptedLoader(data, batch_size=batch_size, shuffle=True, window_bytes=500, threads=1,
                        rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]  # fmt: skip


def take(group, steps):
    """Let each rank take some batches; return their rows, and the state of rank 0."""
    passes = [iter(loader) for loader in group]
    rows = [int(y) for _ in range(steps) for batches in passes for y in next(batches)[1]]
    states = [loader.state_dict() for loader in group]
    assert all(state == states[0] for state in states)
    return rows, json.loads(json.dumps(states[0]))


# ---------------------------------------------------------------- the loader by itself


def test_what_is_left_is_read_by_any_number_of_processes(sealed, keys):
    seen, state = take(loaders(sealed, keys, 2), 3)
    for world_size, batch_size, steps in ((3, 10, 2), (1, 7, 4), (4, 5, None)):
        group = loaders(sealed, keys, world_size, batch_size=batch_size)
        for loader in group:
            loader.load_state_dict(state)
        if steps is not None:
            rows, state = take(group, steps)
        else:
            rows = [int(y) for loader in group for batch in loader for y in batch[1]]
        seen += rows
    assert sorted(seen) == list(range(ROWS))


def test_the_next_epoch_is_whole_again(sealed, keys):
    _, state = take(loaders(sealed, keys, 1), 3)
    (loader,) = loaders(sealed, keys, 1)
    loader.load_state_dict(state)
    assert len(loader) == 24
    assert len(list(loader)) == 21
    whole = [int(y) for batch in loader for y in batch[1]]
    assert sorted(whole) == list(range(ROWS))
    (fresh,) = loaders(sealed, keys, 1)
    fresh.set_epoch(1)
    assert [int(y) for batch in fresh for y in batch[1]] == whole


def test_a_state_of_another_epoch_is_not_used(sealed, keys):
    _, state = take(loaders(sealed, keys, 1), 3)
    (loader,) = loaders(sealed, keys, 1)
    loader.load_state_dict(state)
    loader.set_epoch(1)
    assert len(list(loader)) == 24


def test_the_order_of_the_run_is_kept(sealed, keys):
    """Whoever resumes with another seed or window goes on with the order that was begun."""
    rows, state = take(loaders(sealed, keys, 1, seed=7), 3)
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    loader = EncryptedLoader(data, batch_size=10, seed=8, window_bytes=10**6)
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    rows += [int(y) for batch in loader for y in batch[1]]
    assert sorted(rows) == list(range(ROWS))


def test_a_state_before_the_first_batch(sealed, keys):
    (loader,) = loaders(sealed, keys, 1)
    state = loader.state_dict()
    assert state["left"] == [[0, ROWS]]
    assert not loader.begun
    loader.load_state_dict({})
    loader.load_state_dict(state)
    assert len(list(loader)) == 24


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(version=2),
        lambda s: s.update(content="0" * 64),
        lambda s: s.update(order="0" * 64),
        lambda s: s.update(seed=s["seed"] + 1),
        lambda s: s.update(seed=-1),
        lambda s: s.update(epoch=s["epoch"] + 1),
        lambda s: s.update(epoch="one"),
        lambda s: s.update(window_bytes=0),
        lambda s: s.update(left=[[0, ROWS + 1]]),
        lambda s: s.update(left=[[5, 4]]),
        lambda s: s.update(left=[[0, 9], [8, 20]]),
        lambda s: s.update(left=[[0]]),
        lambda s: s.update(left=None),
        lambda s: s.pop("left"),
        lambda s: s.pop("version"),
    ],
)
def test_a_state_that_was_changed_is_refused(sealed, keys, change):
    _, state = take(loaders(sealed, keys, 1), 2)
    (loader,) = loaders(sealed, keys, 1)
    change(state)
    with pytest.raises(ManifestMismatchError, match="Nothing was read"):
        loader.load_state_dict(state)


def test_other_bytes_are_refused(tmp_path, keys):
    _, state = take(loaders(seal(tmp_path, keys), keys, 1), 2)
    seal(tmp_path, keys, offset=1.0)
    (loader,) = loaders(tmp_path, keys, 1)
    with pytest.raises(ManifestMismatchError, match="over other rows"):
        loader.load_state_dict(state)


# ---------------------------------------------------------------- in a Trainer


class Model(BoringModel):
    """Notes the rows of each epoch, and when it is validated."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.rows, self.validated, self.fail_at = [], [], fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at == self.global_step:
            raise InterruptedError
        self.rows.append((self.current_epoch, batch_idx, batch[1].tolist()))
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.current_epoch, self.global_step))

    def of_epoch(self, epoch):
        return [row for e, _, rows in self.rows if e == epoch for row in rows]


def fit(folder, root, keys, model, *, batch_size=10, ckpt_path=None, checkpoint=None, **options):
    checkpoint = checkpoint or ModelCheckpoint(folder, every_n_train_steps=7, save_top_k=-1)
    trainer = L.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": [checkpoint],
            "default_root_dir": folder,
            **options,
        }
    )
    data = EncryptedDataModule(root, keys=keys, batch_size=batch_size, seed=2, window_bytes=500)
    with contextlib.suppress(InterruptedError):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_a_resumed_run_sees_what_an_unbroken_one_sees(tmp_path, sealed, keys):
    whole = Model()
    fit(tmp_path / "whole", sealed, keys, whole)
    assert len({tuple(whole.of_epoch(epoch)) for epoch in range(3)}) == 3
    broken = Model(fail_at=33)
    fit(tmp_path / "a", sealed, keys, broken)
    (last,) = (tmp_path / "a").glob("*step=28.ckpt")
    resumed = Model()
    fit(tmp_path / "b", sealed, keys, resumed, ckpt_path=last)
    assert broken.rows[:28] + resumed.rows == whole.rows
    assert resumed.validated == [pair for pair in whole.validated if pair[1] > 28]


@pytest.mark.parametrize("batch_size", [5, 20])
def test_epochs_and_validations_are_whole_after_a_change_of_batches(
    tmp_path, sealed, keys, batch_size
):
    """To the Trainer another number of processes is the same: another number of batches."""
    broken = Model(fail_at=33)
    fit(tmp_path / "a", sealed, keys, broken)
    (last,) = (tmp_path / "a").glob("*step=28.ckpt")
    resumed = Model()
    fit(tmp_path / "b", sealed, keys, resumed, ckpt_path=last, batch_size=batch_size)
    first = [row for _, _, rows in broken.rows[24:28] for row in rows]
    assert sorted(first + resumed.of_epoch(1)) == list(range(ROWS))
    assert sorted(resumed.of_epoch(2)) == list(range(ROWS))
    left = 200 // batch_size
    ends = [28 + left, 28 + left + ROWS // batch_size]
    assert sorted(Counter(resumed.validated)) == [(1, ends[0]), (2, ends[1])]
    assert [index for epoch, index, _ in resumed.rows if epoch == 1] == list(
        range(40 // batch_size, ROWS // batch_size)
    )


def test_a_step_that_was_not_finished_is_taken_again(tmp_path, sealed, keys):
    class SaveOnError(Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

    broken = Model(fail_at=9)
    fit(tmp_path, sealed, keys, broken, checkpoint=SaveOnError())
    resumed = Model()
    fit(tmp_path / "b", sealed, keys, resumed, ckpt_path=tmp_path / "on_exception.ckpt",
        max_epochs=1)  # fmt: skip
    assert sorted(broken.of_epoch(0) + resumed.of_epoch(0)) == list(range(ROWS))


@pytest.mark.parametrize("when", ["last batch", "epoch end"])
def test_a_checkpoint_at_the_end_of_an_epoch_begins_the_next(tmp_path, sealed, keys, when):
    whole, first, resumed = Model(), Model(), Model()
    fit(tmp_path / "whole", sealed, keys, whole, max_epochs=2)
    how = {"every_n_train_steps": 24} if when == "last batch" else {"every_n_epochs": 1}
    checkpoint = ModelCheckpoint(tmp_path / "a", save_on_train_epoch_end=True, **how)
    fit(tmp_path / "a", sealed, keys, first, max_epochs=1, checkpoint=checkpoint)
    fit(tmp_path / "b", sealed, keys, resumed, max_epochs=2, ckpt_path=checkpoint.best_model_path)
    assert resumed.rows == whole.rows[24:]


def test_overfitting_takes_the_same_rows(tmp_path, sealed, keys):
    model = Model()
    fit(tmp_path, sealed, keys, model, overfit_batches=2, max_epochs=2)
    assert model.of_epoch(0) == model.of_epoch(1) == list(range(20))


def test_reloading_loaders_does_not_resume_again(tmp_path, sealed, keys):
    fit(tmp_path, sealed, keys, Model(), max_steps=7)
    (last,) = tmp_path.glob("*step=7.ckpt")
    resumed = Model()
    fit(tmp_path / "b", sealed, keys, resumed, ckpt_path=last, max_epochs=2,
        reload_dataloaders_every_n_epochs=1)  # fmt: skip
    assert len(resumed.of_epoch(0)) == 170
    assert sorted(resumed.of_epoch(1)) == list(range(ROWS))


def test_a_transform_for_one_split(sealed, keys):
    data = EncryptedDataModule(
        sealed, keys=keys, batch_size=10, transform={"train": lambda batch: "changed"}
    )
    data.setup("fit")
    assert next(iter(data.train_dataloader())) == "changed"
    assert len(next(iter(data.val_dataloader()))) == 2


def test_a_checkpoint_holds_the_position_and_nothing_of_the_rows(tmp_path, sealed, keys):
    data = EncryptedDataModule(sealed, keys=keys, batch_size=10)
    data.setup("fit")
    assert "position" not in data.state_dict()["train"]
    next(iter(data.train_dataloader()))
    state = copy.deepcopy(data.state_dict()["train"]["position"])
    assert state["left"] == [[10, ROWS]]
    assert {type(value) for value in state.values()} <= {int, str, bool, list}


@pytest.mark.parametrize("size", [10**30, 2**63, 2**50, 2**31, 0, -1, float("inf"), float("nan")])
def test_a_checkpoint_does_not_choose_how_much_memory_is_used(sealed, keys, size):
    _, state = take(loaders(sealed, keys, 1), 1)
    (loader,) = loaders(sealed, keys, 1)
    with pytest.raises((ManifestMismatchError, ConfigError), match="Nothing was read"):
        loader.load_state_dict({**state, "window_bytes": size})
    assert not loader.begun


def test_a_large_window_is_believed_from_who_made_the_loader(sealed, keys):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    options = {"batch_size": 10, "shuffle": True, "threads": 1}
    with pytest.raises(ConfigError, match="window_bytes"):
        EncryptedLoader(data, **options, window_bytes=10**30)
    first, again, small = (
        EncryptedLoader(data, **options, window_bytes=size) for size in (2**31, 2**31, 500)
    )
    _, state = take([first], 1)
    again.load_state_dict(state)
    with pytest.raises(ConfigError, match="the same window_bytes"):
        small.load_state_dict(state)


# ---------------------------------------------------------------- kill -9


def test_a_killed_run_is_resumed_by_other_numbers_of_ranks(tmp_path, sealed, keys):
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(sealed), str(keys._path), str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, three = (json.loads(row) for row in done.stdout.splitlines())
    assert one["codes"] == [-signal.SIGKILL]
    assert two["codes"] == [-signal.SIGKILL] * 2
    assert three["codes"] == [0, 0, 0]
    # Saved after 4 batches of one rank and 2 of two; what was trained on later died with them.
    for life, rows in ((one, 40), (two, 40 + 40)):
        assert life["epoch"] == 0
        assert sum(life["seen"]) == ROWS - life["left"] == rows
        assert max(life["seen"]) == 1
    assert three["seen"] == [2] * ROWS


@pytest.mark.parametrize("how", ["by hand", "epoch end", "last"])
def test_the_other_rows_of_an_epoch_that_was_cut_are_seen(tmp_path, sealed, keys, how):
    """Lightning counts an epoch that `max_steps` has cut as done."""
    whole, first, resumed = Model(), Model(), Model()
    fit(tmp_path / "whole", sealed, keys, whole, max_epochs=2)
    checkpoint = ModelCheckpoint(tmp_path / "c", save_last=how == "last")
    trainer = fit(
        tmp_path / "a", sealed, keys, first, max_epochs=-1, max_steps=5, checkpoint=checkpoint
    )
    path = checkpoint.last_model_path if how == "last" else checkpoint.best_model_path
    if how == "by hand":
        path = tmp_path / "hand.ckpt"
        trainer.save_checkpoint(path)
    fit(tmp_path / "b", sealed, keys, resumed, max_epochs=2, ckpt_path=path)
    assert first.rows + resumed.rows == whole.rows
    assert resumed.validated == whole.validated


def test_an_epoch_that_was_limited_is_done(tmp_path, sealed, keys):
    first, resumed = Model(), Model()
    checkpoint = ModelCheckpoint(tmp_path / "c", save_on_train_epoch_end=True)
    options = {"limit_train_batches": 5}
    fit(tmp_path / "a", sealed, keys, first, max_epochs=1, checkpoint=checkpoint, **options)
    path = checkpoint.best_model_path
    fit(tmp_path / "b", sealed, keys, resumed, max_epochs=2, ckpt_path=path, **options)
    assert {epoch for epoch, _, _ in resumed.rows} == {1}
    assert len(resumed.rows) == 5
