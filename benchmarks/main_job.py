"""The cost of each part of the main job, beside Lightning without it and beside Opacus.

    python benchmarks/main_job.py [--quick] [--json FILE]

All variants train the same module on the same rows in one process, in turns, and each ratio is
taken within a turn; medians over the turns are printed. All are quotients of times: below 1 is
faster than what stands after the "vs".

The width of the network is what decides how long this takes: Opacus keeps a gradient for each row,
256 times the weights, in memory that the system hands out and clears anew at each step.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from loading.machine import commit, describe_machine
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import (
    DPConfig,
    EncryptedCheckpointIO,
    EncryptedDataModule,
    EncryptedShardWriter,
    LocalKeyProvider,
    PrivateStrategy,
)

FEATURES, CLASSES, BATCH = 768, 10, 256  # a row is 3 KB
CLIP, NOISE, DELTA = 1.0, 1.0, 1e-5


class Perceptron(L.LightningModule):
    """Two hidden layers; its backward pass is most of a step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithOpacus(Perceptron):
    """The main job, made private by Opacus the way its Lightning tutorial does."""

    def __init__(self, width: int, grad_sample_mode: str) -> None:
        super().__init__(width)
        self._mode = grad_sample_mode

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trainer.fit_loop.setup_data()
        _, optimizer, _ = PrivacyEngine().make_private(
            module=self,
            optimizer=super().configure_optimizers(),
            data_loader=self.trainer.train_dataloader,
            noise_multiplier=NOISE,
            max_grad_norm=CLIP,
            grad_sample_mode=self._mode,
        )
        return optimizer  # type: ignore[no-any-return]


class EpochTimes(L.Callback):
    """Seconds of each training epoch but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch > 0:
            self.seconds.append(time.perf_counter() - self._start)


def epoch_seconds(module: L.LightningModule, epochs: int, data: Any, **options: Any) -> float:
    times = EpochTimes()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)
    return statistics.median(times.seconds)


def checkpoint_seconds(plugin: CheckpointIO, state: dict[str, Any], path: Path) -> float:
    start = time.perf_counter()
    plugin.save_checkpoint(state, path)
    os.sync()  # both reach the disk; ours does so by itself
    return time.perf_counter() - start


def reading_seconds(plugin: CheckpointIO, path: Path) -> float:
    start = time.perf_counter()
    plugin.load_checkpoint(path, map_location="cpu")
    return time.perf_counter() - start


def measure(folder: Path, *, quick: bool) -> dict[str, list[float]]:
    rows, epochs, width, rounds, megabytes = (
        (1536, 3, 128, 3, 64) if quick else (8192, 3, 256, 5, 512)
    )
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, FEATURES), dtype=np.float32)
    y = generator.integers(0, CLASSES, rows)
    keys = LocalKeyProvider.generate(folder / "key")
    # One row a segment, as for private training: Poisson sampling picks single rows.
    shards = EncryptedShardWriter(folder / "shards", split="train", keys=keys, segment_bytes=1)
    with shards as writer:
        writer.write_batch({"x": x, "y": y})

    def in_memory() -> Any:
        tensors = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        return DataLoader(tensors, batch_size=BATCH, shuffle=True)

    def sealed() -> Any:
        return EncryptedDataModule(folder / "shards", keys=keys, batch_size=BATCH)

    def private() -> Any:
        return PrivateStrategy(DPConfig(noise_multiplier=NOISE, delta=DELTA, max_grad_norm=CLIP))

    variants: dict[str, Callable[[], float]] = {
        "plain": lambda: epoch_seconds(Perceptron(width), epochs, in_memory()),
        "sealed": lambda: epoch_seconds(Perceptron(width), epochs, sealed()),
        "private": lambda: epoch_seconds(
            Perceptron(width), epochs, in_memory(), strategy=private()
        ),
        "private_sealed": lambda: epoch_seconds(
            Perceptron(width), epochs, sealed(), strategy=private()
        ),
        "opacus_hooks": lambda: epoch_seconds(WithOpacus(width, "hooks"), epochs, in_memory()),
        "opacus_functorch": lambda: epoch_seconds(
            WithOpacus(width, "functorch"), epochs, in_memory()
        ),
    }
    state = {"state_dict": {str(i): torch.randn(1 << 18) for i in range(megabytes)}}
    plugins: dict[str, CheckpointIO] = {
        "torch": TorchCheckpointIO(),
        "encrypted": EncryptedCheckpointIO(keys),
    }
    for name, plugin in plugins.items():
        variants[f"save_{name}"] = partial(checkpoint_seconds, plugin, state, folder / name)
        variants[f"load_{name}"] = partial(reading_seconds, plugin, folder / name)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        names = list(variants) if turn % 2 == 0 or turn == 0 else _turned(list(variants))
        for name in names:
            seconds[name].append(variants[name]())
    return seconds


def _turned(names: list[str]) -> list[str]:
    """The other order; a checkpoint is still written before it is read."""
    return sorted(names, key=lambda name: (name.startswith("load"), -names.index(name)))


RATIOS = {
    "sealed_vs_plain": ("sealed", "plain"),
    "private_vs_plain": ("private", "plain"),
    "private_sealed_vs_plain": ("private_sealed", "plain"),
    "private_vs_opacus_hooks": ("private", "opacus_hooks"),
    "private_vs_opacus_functorch": ("private", "opacus_functorch"),
    "checkpoint_save_vs_torch": ("save_encrypted", "save_torch"),
    "checkpoint_load_vs_torch": ("load_encrypted", "load_torch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), quick=arguments.quick)
    quotients = {
        name: [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
        for name, (ours, theirs) in RATIOS.items()
    }
    result = {
        "machine": describe_machine(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("lightning", "torch", "opacus")
        },
        "commit": commit(Path(__file__).parent),
        "command": "benchmarks/main_job.py" + " --quick" * arguments.quick,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "rounds": {name: [round(time, 4) for time in times] for name, times in seconds.items()},
        "ratios": {name: round(statistics.median(q), 3) for name, q in quotients.items()},
    }
    for name, ratio in result["ratios"].items():
        low, high = min(quotients[name]), max(quotients[name])
        print(f"{name:30} {ratio:6.2f}   ({low:.2f} to {high:.2f})")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
