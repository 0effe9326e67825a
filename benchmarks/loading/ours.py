"""lightning_secure, and what only it is asked: memory, size, key calls, a whole ``Trainer.fit``.

    python -m loading.ours [--clear]

With ``--clear`` the cipher copies instead of encrypting, in this process only: the same reader as
it would be without any encryption.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import secrets
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_secure import (
    EncryptedDataModule,
    EncryptedShardDataset,
    EncryptedShardWriter,
    LocalKeyProvider,
)
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.segments import TAG_BYTES, SegmentCipher
from lightning_secure.data.reading.samples import collate
from lightning_secure.util import events
from loading.serving import Cell, Epoch, serve
from loading.source import open_rows

#: Plaintext length of a segment, by variant. ``row`` has one row in each.
SEGMENTS = {"256k": 256 * 1024, "64k": 64 * 1024, "row": 1}


class Ours:
    """The datamodule's loader in order and shuffled, ``EncryptedShardDataset`` by index."""

    packages = ("lightning-secure", "lightning", "torch", "numpy", "cryptography")

    def prepare(self, cell: Cell) -> None:
        x, y, _ = cell.rows()
        # What is shuffled and what is read in order are splits of their own to a datamodule.
        for split in ("train", "predict") if cell.variant == "256k" else ("train",):
            seal(cell.data, split, x, y, segment_bytes=SEGMENTS[cell.variant])

    def open(self, cell: Cell) -> Epoch:
        if cell.mode == "random":
            dataset = EncryptedShardDataset(cell.data, split="train", keys=_keys(cell.data))
            order = cell.rows()[2].tolist()
            batch = cell.size.random_batch
            loader = DataLoader(dataset, batch_size=batch, sampler=order, collate_fn=collate)
            return lambda number: loader
        data = module(cell.data, cell.size.batch)
        shuffled = cell.mode == "shuffled"
        data.setup("fit" if shuffled else "predict")
        # Once, as Lightning does; an epoch is an iteration.
        batches = data.train_dataloader() if shuffled else data.predict_dataloader()
        return lambda number: batches

    def bytes_stored(self, data: str) -> dict[str, Any]:
        """Return what a dataset takes on the disk, manifest included."""
        files = [Path(data, "manifest.json"), *Path(data, "train").iterdir()]
        return {"bytes": sum(path.stat().st_size for path in files)}

    def key_calls(self, data: str) -> dict[str, Any]:
        """Return how often the key provider is asked while a split is opened and read."""
        calls: list[events.Event] = []
        events.subscribe("benchmark", calls.append)
        datamodule = module(Path(data), 256)
        datamodule.setup("fit")
        rows = sum(len(batch[0]) for batch in datamodule.train_dataloader())
        events.unsubscribe("benchmark")
        asked = [event for event in calls if event.action == "key.unwrap"]
        return {"calls": len(asked), "partitions": 1, "rows": rows}

    def memory(self, data: str, batch: int) -> dict[str, Any]:
        """Return by how much the process grows at most while its loader makes one pass."""
        datamodule = module(Path(data), batch)
        datamodule.setup("fit")
        next(iter(EncryptedShardDataset(data, split="train", keys=_keys(Path(data)))))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _resident("VmRSS")
        rows = sum(len(batch[0]) for batch in datamodule.train_dataloader())
        return {"megabytes": (_resident("VmHWM") - before) / 1e6, "rows": rows}

    def rewrap(self, data: str, count: int) -> dict[str, Any]:
        """Return how long it takes to wrap so many shards' keys under a new partition key."""
        if importlib.util.find_spec("lightning_secure.crypto.rotation") is None:
            return {}
        rotation: Any = importlib.import_module("lightning_secure.crypto.rotation")
        keys = _keys(Path(data))
        manifest = EncryptedShardDataset(data, split="train", keys=keys).manifest
        split = manifest.splits["train"]
        partition = manifest.open_partition(split.partition, keys)
        shards = []
        for number in range(count):
            uuid = secrets.token_bytes(16)
            file = f"train/shard-{number:05d}-{uuid.hex()[:8]}.lsec"
            wrapped = partition.seal(DataKey.generate(), shard_uuid=uuid)
            shards.append(
                replace(split.shards[0], number=number, uuid=uuid, file=file, wrapped_key=wrapped)
            )
        many = replace(manifest, splits={"train": replace(split, shards=tuple(shards))})
        start = time.perf_counter()
        after = rotation.rekeyed(many, split.partition, keys=keys)
        seconds = time.perf_counter() - start
        opened = after.open_partition(split.partition, keys)
        for shard in after.splits["train"].shards:
            opened.open(shard)
        return {"seconds": seconds}

    def fit(self, data: str, source: str, feed: str, batch: int) -> dict[str, Any]:
        """Return how long ``Trainer.fit`` takes for one epoch, fed by us or out of RAM."""
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        model = SmallCnn()
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if feed == "aes":
            start = time.perf_counter()
            trainer.fit(model, datamodule=module(Path(data), batch))
        else:
            x, y, _ = open_rows(Path(source))
            tensors = TensorDataset(torch.from_numpy(x.copy()), torch.from_numpy(y))
            if feed == "ram":
                loader: Any = DataLoader(tensors, batch_size=batch, shuffle=True)
            else:
                batches = BatchSampler(RandomSampler(tensors), batch, drop_last=False)
                loader = DataLoader(tensors, batch_size=None, sampler=batches)
            start = time.perf_counter()
            trainer.fit(model, loader)
        seconds = time.perf_counter() - start
        torch.set_num_threads(1)
        return {"seconds": seconds, "rows": model.rows}


class SmallCnn(L.LightningModule):
    """Two convolutions on images of 32 by 32."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 8 * 8, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.rows += len(x)
        return functional.cross_entropy(self.layers(x.float() / 255), y % 10)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seal(root: Path, split: str, x: Any, y: Any, *, segment_bytes: int) -> None:
    """Seal rows, and look whether they can be read in the files, which they must not."""
    root.mkdir(parents=True, exist_ok=True)
    path = root / "project.kek"
    keys = LocalKeyProvider(path) if path.exists() else LocalKeyProvider.generate(path)
    step = max(1, 2**25 // x[0].nbytes)
    with EncryptedShardWriter(root, split=split, keys=keys, segment_bytes=segment_bytes) as writer:
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            writer.write_batch({"x": x[rows].copy(), "y": y[rows]})
    shard = min((root / split).glob("*.lsec")).read_bytes()
    if (x[0].tobytes() in shard) != (SegmentCipher.open_into is _copy_out):
        raise RuntimeError("what was to be encrypted was not, or the other way round")


def module(data: Path, batch: int) -> EncryptedDataModule:
    """Return the datamodule as a user makes it."""
    return EncryptedDataModule(data, keys=_keys(data), batch_size=batch)


def _keys(data: Path) -> LocalKeyProvider:
    return LocalKeyProvider(data / "project.kek")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {field}")


def _copy_in(cipher: SegmentCipher, index: int, plaintext: Any, *, records: int, out: Any) -> int:
    source, target = np.frombuffer(plaintext, np.uint8), np.frombuffer(out, np.uint8)
    np.copyto(target[: len(source)], source)
    target[len(source) :] = 0
    return len(target)


def _copy_out(cipher: SegmentCipher, index: int, sealed: Any, *, records: int, out: Any) -> int:
    # numpy releases the interpreter while it copies, as AES-GCM does.
    source, target = np.frombuffer(sealed, np.uint8), np.frombuffer(out, np.uint8)
    np.copyto(target, source[:-TAG_BYTES])
    return len(target)


def main() -> None:
    """Serve; in the clear if asked to."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if "--clear" in sys.argv:
        SegmentCipher.seal_into = _copy_in  # type: ignore[method-assign,assignment]
        SegmentCipher.open_into = _copy_out  # type: ignore[method-assign,assignment]
    torch.set_num_threads(1)  # as all who are measured
    serve(Ours())


if __name__ == "__main__":
    main()
