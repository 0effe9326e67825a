from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.key_rotation.rotate import rotate_partition
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, ManifestMismatchError

X = np.random.default_rng(3).normal(size=(60, 32)).astype("float32")


class Model(BoringModel):
    """The boring model on batches that are tuples."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch[0]))
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch[0], batch_idx)

    def test_step(self, batch, batch_idx):
        return super().test_step(batch[0], batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def seal(root, keys, **splits):
    for split, rows in splits.items():
        with EncryptedShardWriter(root, split=split, keys=keys, replace=True) as writer:
            writer.write_batch({"x": rows})
    return root


def trainer(root, **options):
    return L.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": root,
            **options,
        }
    )


def module(root, keys, **options):
    return EncryptedDataModule(root, keys=keys, **{"batch_size": 16, **options})


def test_lightning_reads_every_split(tmp_path, keys):
    root = seal(tmp_path / "d", keys, train=X, val=X[:20], test=X[:10], predict=X[:5])
    model, fit = Model(), trainer(tmp_path)
    fit.fit(model, datamodule=module(root, keys))
    assert sorted(model.seen) == [12, 16, 16, 16]
    fit.validate(model, datamodule=module(root, keys), verbose=False)
    fit.test(model, datamodule=module(root, keys), verbose=False)
    (predicted,) = fit.predict(model, datamodule=module(root, keys))
    assert torch.allclose(predicted, model(torch.from_numpy(X[:5])))


def test_without_a_val_split_there_is_no_validation(tmp_path, keys):
    model = Model()
    trainer(tmp_path).fit(model, datamodule=module(seal(tmp_path / "d", keys, train=X), keys))
    assert sum(model.seen) == 60


def test_training_rows_are_shuffled_and_others_are_not(tmp_path, keys):
    data = module(seal(tmp_path / "d", keys, train=X, val=X), keys, batch_size=60)
    data.setup("fit")
    ((train,),) = data.train_dataloader()
    ((val,),) = data.val_dataloader()
    assert np.array_equal(val.numpy(), X)
    assert not np.array_equal(train.numpy(), X)
    assert np.array_equal(np.sort(train.numpy(), 0), np.sort(X, 0))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_missing_split_is_named(tmp_path, keys, stage):
    data = module(seal(tmp_path / "d", keys, train=X), keys)
    with pytest.raises(ConfigError, match="no split"):
        data.setup(stage)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_wrong_arguments_are_refused(tmp_path, keys, options):
    with pytest.raises(ConfigError):
        module(tmp_path, keys, **options)


def test_a_run_resumes_on_the_rows_that_it_was_trained_on(tmp_path, keys):
    root = seal(tmp_path / "d", keys, train=X)
    fit = trainer(tmp_path)
    fit.fit(Model(), datamodule=module(root, keys))
    checkpoint = fit.checkpoint_callback.best_model_path

    trainer(tmp_path, max_epochs=2).fit(
        Model(), datamodule=module(root, keys), ckpt_path=checkpoint, weights_only=True
    )
    seal(root, keys, val=X)  # a later generation over the same training rows
    trainer(tmp_path, max_epochs=2).fit(
        Model(), datamodule=module(root, keys), ckpt_path=checkpoint, weights_only=True
    )
    seal(root, keys, train=X[:50])
    with pytest.raises(ManifestMismatchError, match="other rows"):
        trainer(tmp_path, max_epochs=2).fit(
            Model(), datamodule=module(root, keys), ckpt_path=checkpoint, weights_only=True
        )


def test_a_run_does_not_resume_on_a_rolled_back_dataset(tmp_path, keys):
    root = seal(tmp_path / "d", keys, train=X)
    old = (root / "manifest.json").read_bytes()
    seal(root, keys, val=X)
    data = module(root, keys)
    data.setup("fit")
    state = data.state_dict()
    (root / "manifest.json").write_bytes(old)
    data = module(root, keys)
    data.setup("fit")
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        data.load_state_dict(state)


def test_a_state_without_training_says_nothing(tmp_path, keys):
    data = module(seal(tmp_path / "d", keys, train=X, test=X), keys)
    data.setup("test")
    data.load_state_dict({})
    data.load_state_dict({"train": {"content": "other"}})
    assert list(data.state_dict()) == ["test"]


def test_pins_are_passed_on(tmp_path, keys):
    root = seal(tmp_path / "d", keys, train=X)
    with pytest.raises(ManifestMismatchError, match="pinned"):
        module(root, keys, min_generation=9).setup("fit")
    with pytest.raises(ManifestMismatchError, match="pinned"):
        module(root, keys, manifest_digest="00" * 32).setup("fit")


def test_a_later_stage_accepts_no_older_generation_than_an_earlier_one(folder, keys):
    for split in ("train", "val", "test"):
        with EncryptedShardWriter(folder, split=split, keys=keys) as writer:
            writer.write_batch({"x": np.arange(8)})
    old = (folder / "manifest.json").read_bytes()
    rotate_partition(folder, "train", keys=keys)
    module = EncryptedDataModule(folder, keys=keys, batch_size=4)
    module.setup("fit")
    state = module.state_dict()
    (folder / "manifest.json").write_bytes(old)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        module.setup("test")
    fresh = EncryptedDataModule(folder, keys=keys, batch_size=4)
    fresh.setup("test")
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        fresh.load_state_dict(state)
