"""Train in three processes' lives: 1 rank and 2 ranks, killed in the middle of an epoch, then 3.

    python killed_run.py SHARDS KEY_FILE FOLDER

The module counts, in a buffer that every checkpoint holds, how often each row was trained on. So
after the last life the final checkpoint says whether each row was seen exactly once an epoch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import distributed

from lightning_secure import EncryptedDataModule, LocalKeyProvider

ROWS = 240
#: ranks, and after how many batches in this life to kill, which is after a checkpoint and not at it
LIVES = ((1, 5), (2, 4), (3, None))


class Counting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(ROWS, dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        x, y = batch
        counts = torch.bincount(y, minlength=ROWS)
        if distributed.is_initialized():
            distributed.all_reduce(counts)
        self.seen += counts
        return self.layer(x).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Killer(Callback):
    def __init__(self, after):
        self.left = after

    def on_train_batch_end(self, *args):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def live(root, key_file, folder, ranks, kill_after):
    warnings.filterwarnings("ignore")
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_last=True, save_top_k=-1, filename="{step}"
    )
    last = folder / "last.ckpt"
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp",
        max_epochs=2,
        callbacks=[Killer(kill_after), checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data = EncryptedDataModule(
        root, keys=LocalKeyProvider(key_file), batch_size=10, seed=11, window_bytes=500
    )
    module = Counting()
    trainer.fit(
        module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True
    )
    if trainer.is_global_zero:
        (folder / "seen.json").write_text(json.dumps(module.seen.tolist()))


def spawn(ranks, rank, port, *arguments):
    pid = os.fork()
    if pid:
        return pid
    if ranks > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
            "NODE_RANK": "0", "LOCAL_RANK": str(rank),
        }  # fmt: skip
    live(*arguments)
    os._exit(0)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main():
    root, key_file, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for ranks, kill_after in LIVES:
        port = free_port()
        pids = [
            spawn(ranks, rank, port, root, key_file, folder, ranks, kill_after)
            for rank in range(ranks)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        saved = torch.load(folder / "last.ckpt", weights_only=True)
        position = saved["EncryptedDataModule"]["train"]["position"]
        print(  # noqa: T201
            json.dumps(
                {
                    "codes": codes,
                    "epoch": position["epoch"],
                    "left": sum(stop - start for start, stop in position["left"]),
                    "seen": saved["state_dict"]["seen"].tolist(),
                }
            )
        )


if __name__ == "__main__":
    main()
