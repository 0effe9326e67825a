"""``fit(datamodule=)``: encrypted splits as Lightning reads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import distributed
from torch.utils.data import DataLoader

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.data.loader.loader import (
    WINDOW_BYTES,
    EncryptedLoader,
    LoadOptions,
    Transform,
)
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.reading.dataset import EncryptedShardDataset, ReadOptions
from lightning_secure.data.reading.samples import Output
from lightning_secure.data.storage import CiphertextCache, Storage, open_storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.errors import ConfigError, ManifestMismatchError
from lightning_secure.privacy.accounting.carried_ledger import bring_ledger_with_weights
from lightning_secure.util.agreement import Statement, compared, gathered
from lightning_secure.util.strategy_check import introduce

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
        seed: Of the order of the training rows, from 0 to 2**64 - 1. By default what
            ``seed_everything`` was given, or 0; in several processes, in the first.
        drop_last: Whether training rows that fill no whole batch in each process are left out.
        transform: Applied to each batch, after it is on the device; or one for some of the splits,
            by name.
        window_bytes: Plaintext in which training rows are mixed, in bytes, see
            :class:`~lightning_secure.data.loader.loader.EncryptedLoader`.
        threads: How many decrypt; by default one a core, 8 at most.
        num_workers: Worker processes where rows are drawn at random, by a private strategy or for
            ``predict``. None are needed: decryption leaves the interpreter free and keys never
            cross a process boundary.
        min_generation: The oldest generation of the dataset that is accepted.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        cache: For a URL, where downloaded shards are kept, encrypted as they are.

    Raises:
        ConfigError: if an argument is wrong, or a needed split is missing.
        ManifestMismatchError: if the dataset is not the pinned one, or not the one that a resumed
            checkpoint was trained on.

    A checkpoint records which bytes the run was trained on. Resuming on other rows, or on an older
    generation, is refused; new keys over the same rows are not other rows. It also records where in
    the epoch the run stood: a run that is resumed goes on with the rows that it has not seen, also
    with another number of processes or another batch size.

    >>> from lightning_secure import seal
    >>> _ = seal({"age": [34, 51, 29]}, folder / "data", keys=keys, split="val")
    >>> data = EncryptedDataModule(folder / "data", keys=keys, batch_size=2)
    >>> data.setup("validate")
    >>> list(data.val_dataloader())
    [(tensor([34, 51]),), (tensor([29]),)]
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        keys: KeyProvider,
        batch_size: int,
        output: Output = "tuple",
        columns: Sequence[str] | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        transform: Transform | Mapping[str, Transform] | None = None,
        window_bytes: int = WINDOW_BYTES,
        threads: int | None = None,
        num_workers: int = 0,
        min_generation: int | None = None,
        manifest_digest: str | None = None,
        storage_options: Options | None = None,
        cache: CiphertextCache | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
        if num_workers < 0:
            raise ConfigError(f"num_workers must be at least 0, not {num_workers}.")
        self.batch_size = batch_size
        self._storage = open_storage(root, storage_options=storage_options, cache=cache)
        self._keys = keys
        self._transform = transform
        self._loading: LoadOptions = {
            "batch_size": batch_size,
            "window_bytes": window_bytes,
            "threads": threads,
            "num_workers": num_workers,
        }
        self._seed = seed
        self._drop_last = drop_last
        self._train_loader: EncryptedLoader | None = None
        self._resume: Mapping[str, Any] | None = None
        self._options: ReadOptions = {
            "output": output,
            "columns": columns,
            "threads": threads,
            "min_generation": min_generation,
            "manifest_digest": manifest_digest,
        }
        self._datasets: dict[str, EncryptedShardDataset] = {}
        self._shared_seed: int | None = None

    @property
    def manifest_digest(self) -> str | None:
        """Digest of the manifest that the rows were read by, in hexadecimal; None before setup.

        Of the training rows, if they are among them.

        >>> from lightning_secure import seal
        >>> sealed = seal({"age": [34, 51, 29]}, folder / "data", keys=keys, split="val")
        >>> data = EncryptedDataModule(folder / "data", keys=keys, batch_size=2)
        >>> data.setup("validate")
        >>> data.manifest_digest == sealed.manifest_digest
        True
        """
        dataset = self._datasets.get("train", next(iter(self._datasets.values()), None))
        return None if dataset is None else dataset.manifest.digest

    def setup(self, stage: str) -> None:
        """Verify the manifest and unwrap the keys of the splits that ``stage`` needs.

        Where several processes train or evaluate together, they agree on what they read.

        Raises:
            ConfigError: if the Trainer's strategy would write checkpoints past a CheckpointIO that
                encrypts or redacts them, the split is missing, the processes read different rows or
                read them differently, or another process failed here.
        """
        with self._agreeing(stage):
            if self.trainer is not None:
                introduce(self.trainer.strategy)
                bring_ledger_with_weights(self.trainer.strategy)
            self._open(stage)

    def _open(self, stage: str) -> None:
        needed, *optional = _STAGES[stage]
        self._dataset(needed)
        manifest = self._datasets[needed].manifest
        for split in optional:
            if split in manifest.splits:
                self._dataset(split)
            else:
                # The hook that does nothing is how Lightning knows that there is no loader.
                vars(self)["val_dataloader"] = super().val_dataloader

    @contextlib.contextmanager
    def _agreeing(self, stage: str) -> Iterator[None]:
        """Go on in all processes of a run, or in none: a loader would wait for the others in vain.

        Raises:
            ConfigError: if the processes do not agree, or one of them has failed or gone.
        """
        trainer = self.trainer
        # Not where the hook is called by hand, which other processes need not do.
        together = trainer is not None and trainer.state.status == TrainerStatus.RUNNING
        if not together or not _spans_processes(trainer):
            yield
            return
        try:
            yield
            statement = self._statement(stage)
        except Exception:
            with contextlib.suppress(RuntimeError):  # a process that has gone needs no word
                compared(None)
            raise
        found: list[str] = ["another process has gone or did not answer in time"]
        with contextlib.suppress(RuntimeError):  # its text names machines
            differing = compared(statement)
            if not differing:
                self._shared_seed = gathered(_global_seed())[0]
            found = differing
        if found:
            raise ConfigError(
                f"the processes of this run do not read the same data: {'; '.join(found)}. Open "
                "the same dataset with the same arguments in every process. Nothing was read."
            )

    def _statement(self, stage: str) -> Statement:
        """Return what the batches of a stage follow from, in all processes together."""
        stated: dict[str, str | bytes] = {
            "batch_size": str(self.batch_size),
            "seed": str(self._seed),
            "drop_last": str(self._drop_last),
            "window_bytes": str(self._loading["window_bytes"]),
        }
        for split in _STAGES[stage]:
            dataset = self._datasets.get(split)
            stated[f"the split {split!r}"] = "absent" if dataset is None else "present"
            if dataset is not None:
                stated |= {f"{k} of {split!r}": v for k, v in dataset.rows_statement().items()}
        return stated

    def _dataset(self, split: str) -> EncryptedShardDataset:
        if split not in self._datasets:
            dataset = EncryptedShardDataset(
                self._storage, split=split, keys=self._keys, **self._options
            )
            self._datasets[split] = dataset
            self._require_from(dataset.manifest.generation)
        return self._datasets[split]

    def _require_from(self, generation: int) -> None:
        """Accept no generation older than one that was seen, whatever is opened later."""
        least = self._options["min_generation"]
        self._options["min_generation"] = max(least or 0, generation)

    def train_dataloader(self) -> EncryptedLoader:
        """Return shuffled batches of ``train``; a private strategy draws its own instead.

        >>> from lightning_secure import seal
        >>> _ = seal({"age": [34, 51, 29]}, folder / "data", keys=keys)
        >>> data = EncryptedDataModule(folder / "data", keys=keys, batch_size=2, seed=0)
        >>> data.setup("fit")
        >>> sorted(int(age) for (ages,) in data.train_dataloader() for age in ages)
        [29, 34, 51]
        """
        trainer = self.trainer
        if trainer is not None and trainer.state.fn != TrainerFn.FITTING:
            trainer = None
        loader = self._loader(
            "train",
            shuffle=not getattr(trainer, "overfit_batches", False),
            seed=self._order_seed(),
            drop_last=self._drop_last,
            trained_batches=partial(_trained_batches, trainer) if trainer is not None else None,
        )
        resume, self._resume = self._resume, None
        if resume is not None:
            loader.load_state_dict(resume)
            if trainer is not None:
                _count_from(trainer, loader.batches_done)
                if 0 < loader.batches_done < len(loader):
                    _reopen_epoch(trainer)
        self._train_loader = loader
        return loader

    def _order_seed(self) -> int:
        if self._seed is not None:
            return self._seed
        # Of the first process: a seed of each one's own would give each another order of the rows.
        return _global_seed() if self._shared_seed is None else self._shared_seed

    def val_dataloader(self) -> EncryptedLoader:
        """Return batches of ``val`` in order."""
        return self._loader("val")

    def test_dataloader(self) -> EncryptedLoader:
        """Return batches of ``test`` in order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches of ``predict`` in order.

        A plain DataLoader, because Lightning tells a prediction writer the rows of no other.
        """
        return self._loader("predict").random_access()

    def _loader(self, split: str, **options: Any) -> EncryptedLoader:
        place: dict[str, Any] = {}
        if self.trainer is not None:
            introduce(self.trainer.strategy, loaded=bool(self.trainer.ckpt_path))  # by now
            place = {"device": self.trainer.strategy.root_device}
            processes = self.trainer.distributed_sampler_kwargs
            if processes is not None:
                place |= {"rank": processes["rank"], "world_size": processes["num_replicas"]}
        transform = self._transform
        if isinstance(transform, Mapping):
            transform = transform.get(split)
        return EncryptedLoader(
            self._dataset(split), transform=transform, **self._loading, **place, **options
        )

    def teardown(self, stage: str) -> None:
        """Close the shards of the splits that ``stage`` read."""
        for split in _STAGES[stage]:
            if split in self._datasets:
                self._datasets[split].close()

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the rows that were trained on, and where the epoch stands.

        Raises:
            ConfigError: if :meth:`setup` would raise it, also for a checkpoint that is written
                because of it.
        """
        if self.trainer is not None:
            introduce(self.trainer.strategy, loaded=bool(self.trainer.ckpt_path))
        state: dict[str, Any] = {
            split: {
                "dataset": dataset.manifest.dataset_id.hex(),
                "generation": dataset.manifest.generation,
                "content": dataset.entry.content_digest,
                "manifest": dataset.manifest.digest,
            }
            for split, dataset in self._datasets.items()
        }
        if self._train_loader is not None and self._train_loader.begun:
            state["train"]["position"] = self._train_loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the rows of a checkpoint with the current ones, and go on where it stood.

        Raises:
            ManifestMismatchError: if the training split holds other rows, or the dataset is older
                than when the checkpoint was written.
        """
        for seen in state_dict.values():
            for dataset in self._datasets.values():
                if seen.get("dataset") == dataset.manifest.dataset_id.hex():
                    ManifestPin(seen["generation"]).check(dataset.manifest)
                    self._require_from(seen["generation"])
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
        self._resume = saved.get("position")


def _spans_processes(trainer: Any) -> bool:
    """Whether the Trainer runs in every process of torch's group, which outlives the fit of DDP."""
    return (
        trainer.world_size > 1
        and distributed.is_initialized()
        and distributed.get_world_size() == trainer.world_size
    )


def _global_seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def _trained_batches(trainer: pl.Trainer) -> int:
    count: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(count.processed)


def _count_from(trainer: pl.Trainer, batches: int) -> None:
    """Let the Trainer count the epoch's batches from ``batches`` on.

    The checkpoint counts batches of as many processes, and as large, as there were. The Trainer
    compares that with the length of today's loader, to know when the epoch ends.
    """
    count: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    shift = batches - count.processed
    count.ready += shift
    count.started += shift
    count.processed += shift
    count.completed += shift


def _reopen_epoch(trainer: pl.Trainer) -> None:
    """Let the Trainer go on in an epoch that was cut, for example by ``max_steps``.

    Lightning counts such an epoch as done, and would never ask for its other rows. One that
    ``limit_train_batches`` has cut is done.
    """
    progress: Any = trainer.fit_loop.epoch_progress
    options: Any = trainer  # whose limits are set without being declared
    limited = options.limit_train_batches != 1.0 or options.overfit_batches
    if limited or progress.current.processed != progress.current.ready:
        return
    for count in (progress.current, progress.total):
        count.processed -= 1
        count.completed = min(count.completed, count.processed)
    trainer.fit_loop.restarting = True
