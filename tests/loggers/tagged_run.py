"""One process of a private run that is tracked: ``tagged_run.py FOLDER tags``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, PrivateDDPStrategy, RedactingMLFlowLogger


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(shuffle):
    return DataLoader(TensorDataset(torch.randn(32, 3)), batch_size=4, shuffle=shuffle)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    logger = RedactingMLFlowLogger("tagged", save_dir=folder / "runs")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, logger=logger,
        strategy=PrivateDDPStrategy(
            DPConfig(noise_multiplier=1.0, delta=1e-3, max_grad_norm=1.0)
        ),
        callbacks=[ModelCheckpoint(folder / "checkpoints")],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Model(), loader(True), loader(False))
    seen = {"epsilon": trainer.strategy.ledger.epsilon(), "run": logger._run_id}
    torch.save({"tags": seen}, folder / f"rank{os.environ['LOCAL_RANK']}.pt")
