"""``fit(datamodule=)``: encrypted splits as Lightning reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.data.dataset import EncryptedShardDataset
from lightning_secure.data.samples import Output, collate
from lightning_secure.data.storage import CiphertextCache, Storage, open_storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.errors import ConfigError, ManifestMismatchError

__all__ = ["EncryptedDataModule"]

_STAGES: Final = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


class EncryptedDataModule(pl.LightningDataModule):
    """Feeds the splits ``train``, ``val``, ``test`` and ``predict`` of an encrypted dataset.

    Args:
        root: The dataset's folder, an fsspec URL such as ``s3://bucket/dataset``, or a
            :class:`RemoteStorage`.
        keys: Releases the splits' keys, with one call a split.
        batch_size: Rows a batch. Under a private strategy, the expected size of a batch.
        output: ``tuple`` or ``dict``, see :class:`EncryptedShardDataset`.
        columns: Which columns a sample has, in which order. All by default.
        num_workers: Worker processes. None are needed: decryption leaves the interpreter free and
            keys never cross a process boundary.
        min_generation: The oldest generation of the dataset that is accepted.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        cache: For a URL, where downloaded shards are kept, encrypted as they are.

    Raises:
        ConfigError: An argument is wrong, or a needed split is missing.
        ManifestMismatchError: The dataset is not the pinned one, or not the one that a resumed
            checkpoint was trained on.

    A checkpoint records which bytes the run was trained on. Resuming on other rows, or on an older
    generation, is refused; new keys over the same rows are not other rows.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        keys: KeyProvider,
        batch_size: int,
        output: Output = "tuple",
        columns: Sequence[str] | None = None,
        num_workers: int = 0,
        min_generation: int | None = None,
        manifest_digest: str | None = None,
        storage_options: Options | None = None,
        cache: CiphertextCache | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ConfigError("batch_size must be positive and num_workers must not be negative.")
        self.batch_size = batch_size
        self._storage = open_storage(root, storage_options=storage_options, cache=cache)
        self._keys = keys
        self._num_workers = num_workers
        self._options: dict[str, Any] = {
            "output": output,
            "columns": columns,
            "min_generation": min_generation,
            "manifest_digest": manifest_digest,
        }
        self._datasets: dict[str, EncryptedShardDataset] = {}

    def setup(self, stage: str) -> None:
        """Verify the manifest and unwrap the keys of the splits that ``stage`` needs."""
        needed, *optional = _STAGES[stage]
        self._dataset(needed)
        manifest = self._datasets[needed].manifest
        for split in optional:
            if split in manifest.splits:
                self._dataset(split)
            else:
                # The hook that does nothing is how Lightning knows that there is no loader.
                vars(self)["val_dataloader"] = super().val_dataloader

    def _dataset(self, split: str) -> EncryptedShardDataset:
        if split not in self._datasets:
            self._datasets[split] = EncryptedShardDataset(
                self._storage, split=split, keys=self._keys, **self._options
            )
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of ``train``; a private strategy draws its own instead."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``val`` in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``test`` in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``predict`` in order."""
        return self._loader("predict")

    def _loader(self, split: str, *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            self._dataset(split),
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self._num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def teardown(self, stage: str) -> None:
        """Close the shards of the splits that ``stage`` read."""
        for split in _STAGES[stage]:
            if split in self._datasets:
                self._datasets[split].close()

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the rows that were trained on."""
        return {
            split: {
                "dataset": dataset.manifest.dataset_id.hex(),
                "generation": dataset.manifest.generation,
                "content": dataset.entry.content_digest,
                "manifest": dataset.manifest.digest,
            }
            for split, dataset in self._datasets.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the rows of a checkpoint with the current ones.

        Raises:
            ManifestMismatchError: The training split holds other rows, or the dataset is older
                than when the checkpoint was written.
        """
        saved = state_dict.get("train")
        if saved is None or "train" not in self._datasets:
            return
        dataset = self._datasets["train"]
        if saved["content"] != dataset.entry.content_digest:
            raise ManifestMismatchError(
                f"the checkpoint was trained on other rows than {str(self._storage)!r} holds in "
                "its split 'train' now. Resuming would mix two datasets under one privacy account. "
                "Nothing was read."
            )
        if dataset.manifest.generation < saved["generation"]:
            raise ManifestMismatchError(
                f"the dataset is at generation {dataset.manifest.generation} and the checkpoint "
                f"saw generation {saved['generation']}: it was rolled back. Nothing was read."
            )
