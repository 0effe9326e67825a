"""What the processes of ddp_run.py and fsdp_run.py have in common.

It is imported before they are forked, so nothing here may know which of them it is in.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

from lightning_secure.privacy.config import DPConfig

ROWS = 33
CONFIG = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 0.3}


def rows(count=ROWS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long(), torch.arange(count))


def whole(tensors):
    parts = [t.full_tensor() if isinstance(t, DTensor) else t for t in map(torch.detach, tensors)]
    return torch.cat([part.flatten() for part in parts]).clone()


def weights(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return whole(model.parameters())


class Watch(Callback):
    """Keeps draws and gradients; empties the draw of some processes in some steps."""

    def __init__(self, empty=()):
        self.empty, self.drawn, self.chunks, self.grads = set(empty), [], [], []
        self.first = None

    def on_train_start(self, trainer, module):
        self.first = weights(module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rows = trainer.strategy._step.drawn  # which hooks are not given
        if (trainer.global_step, trainer.global_rank) in self.empty:
            rows.chunks = ()
        self.chunks.append(len(rows.chunks))
        self.drawn.append([int(row) for chunk in rows.chunks for row in chunk.data[2]])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grads.append(whole([p.grad for p in module.parameters()]))


class FailsOutside(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise ValueError("outside of the step")


def trainer(kind, folder, *callbacks, strategy=None, config=None, **options):
    """A Trainer of two processes with a strategy of this kind."""
    return L.Trainer(
        **{
            "strategy": kind(
                DPConfig(**{**CONFIG, **(config or {})}),
                timeout=timedelta(seconds=15), **(strategy or {}),
            ),
            "accelerator": "cpu", "devices": 2, "max_epochs": 1, "logger": False,
            "limit_val_batches": 0, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": folder,
            "callbacks": list(callbacks), **options,
        }
    )  # fmt: skip


def failing(kind, model, *callbacks, **options):
    """Return a scenario that tells what every process raises, and how long it took to do so."""

    def scenario(folder):
        run, start = trainer(kind, folder, *callbacks, **options), time.monotonic()
        raised = None
        try:
            run.fit(model())
        except Exception as error:  # noqa: BLE001 # whatever it is is what is looked for
            raised = (type(error).__name__, str(error))
        return {
            "raised": raised, "seconds": time.monotonic() - start, "steps": run.global_step,
            "ledger": run.strategy.ledger and run.strategy.ledger.state_dict(),
        }  # fmt: skip

    return scenario


def main(scenarios, folder, *names):
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {}
    for name in names:
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        found[name] = scenarios[name](place)
    torch.save(found, Path(folder) / f"rank{os.environ['LOCAL_RANK']}.pt")
