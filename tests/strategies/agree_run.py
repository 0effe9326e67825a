"""One process of the runs that test_agree.py looks at: ``agree_run.py FOLDER SCENARIO...``."""

from __future__ import annotations

import os
import random
import sys
from datetime import timedelta

import lightning as L
import numpy as np
import scenarios
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from scenarios import rows
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, random_split

from lightning_secure.crypto.providers.local import LocalKeyProvider
from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.strategies.ddp import PrivateDDPStrategy
from lightning_secure.strategies.fsdp import PrivateFSDPStrategy

RANK = int(os.environ.get("LOCAL_RANK", "0"))


class Plain(L.LightningModule):
    """Has no rows of its own."""

    def __init__(self, *, lr=0.1, width=8):
        super().__init__()
        torch.manual_seed(RANK)  # other weights in every process, which are no difference
        self.net = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))
        self.lr, self.seen = lr, []

    def training_step(self, batch, batch_idx):
        self.seen += batch[2].tolist()
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Model(Plain):
    """Trains on the rows that it is given."""

    def __init__(self, data=None, *, workers=0, batch_size=4, **options):
        super().__init__(**options)
        self.data = rows() if data is None else data
        self.workers, self.batch_size = workers, batch_size

    def train_dataloader(self):
        return DataLoader(
            self.data, batch_size=self.batch_size, shuffle=True, num_workers=self.workers
        )


class Sharded(Model):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class OwnIndices(Dataset):
    """A dataset of a user's own, with an order that nothing but its rows shows."""

    def __init__(self, order):
        self.order, self.base = order, rows()

    def __len__(self):
        return len(self.order)

    def __getitem__(self, row):
        return self.base[self.order[row]]


class Augmented(OwnIndices):
    """Honest rows that are other ones each time: by seeded generators, and by none."""

    def __init__(self, order):
        super().__init__(order)
        self.own = np.random.default_rng()

    def __getitem__(self, row):
        x, y, number = super().__getitem__(row)
        x = x + torch.randn(5) + random.random() + float(np.random.rand()) + self.own.random()
        return x.float(), y, number


class OpensInWorker(OwnIndices):
    """Rows that can be read in a worker only, as with files that a worker opens."""

    def __getitem__(self, row):
        assert torch.utils.data.get_worker_info() is not None
        return super().__getitem__(row)


class Unreadable(OwnIndices):
    def __getitem__(self, row):
        if row == 5:
            raise OSError("picture 5 cannot be read")
        return super().__getitem__(row)


def order_of(rank, count=33):
    return np.random.default_rng(rank).permutation(count).tolist()


def failing(model, kind=PrivateDDPStrategy, **options):
    return scenarios.failing(kind, model, **options)


def refused(data, **options):
    return failing(lambda: Model(data()), **options)


def unseeded_split():
    torch.seed()
    return random_split(range(33), [25, 8])[0].indices


def but_one(rank):
    return [row for row in range(33) if row != rank]


def frozen_on_one():
    model = Model()
    model.net[RANK * 2].requires_grad_(False)
    return model


def extra_frozen_layer():
    model = Model()
    if RANK:
        model.extra = nn.Linear(2, 2).requires_grad_(False)
    return model


class Adam(Model):
    def configure_optimizers(self):
        return (torch.optim.Adam if RANK else torch.optim.SGD)(self.parameters(), self.lr)


class Decays(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3 + RANK)]


class Validates(Model):
    """Is given a validation loader in the first process only."""

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader(rows(8), batch_size=4)


def saving(*steps):
    return [ModelCheckpoint(every_n_train_steps=count) for count in steps]


def fine(model, kind=PrivateDDPStrategy):
    """Run two steps or so, and return what happened."""
    return failing(model, kind, max_steps=2)


# ---------------------------------------------------------------- a plain strategy, encrypted rows


def module_of(folder, name, key="key", **options):
    return EncryptedDataModule(
        folder / name, keys=LocalKeyProvider(folder / f"{key}.kek"),
        **{"batch_size": 4, "columns": ("x", "y", "i"), **options},
    )  # fmt: skip


def plain(make, *, seed=None):
    def scenario(folder):
        if seed is not None:
            L.seed_everything(seed(), verbose=False)
        run = L.Trainer(
            strategy=DDPStrategy(timeout=timedelta(seconds=15)), accelerator="cpu", devices=2,
            max_epochs=1, logger=False, limit_val_batches=0, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        model, raised = Plain(), None
        try:
            run.fit(model, datamodule=make(folder.parent))
        except Exception as error:  # noqa: BLE001 # whatever it is is what is looked for
            raised = (type(error).__name__, str(error))
            torch.distributed.destroy_process_group()
        os.environ.pop("PL_GLOBAL_SEED", None)
        return {"raised": raised, "seen": model.seen}

    return scenario


def alone_after_ddp(ranks):
    """After a fit of DDP, whose group of processes stays, some of them train for themselves."""

    def scenario(folder):
        found = plain(lambda f: module_of(f, "A", seed=5))(folder)
        if found["raised"] is not None or RANK not in ranks:
            return found
        run = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, limit_val_batches=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        model = Plain()
        try:
            data = module_of(folder.parent, "B" if RANK else "A", batch_size=4 + RANK)
            run.fit(model, datamodule=data)
        except Exception as error:  # noqa: BLE001 # whatever it is is what is looked for
            found["raised"] = (type(error).__name__, str(error))
        return {**found, "alone": model.seen}

    return scenario


DIFFERENT = {
    "unseeded_split": refused(lambda: Subset(rows(), unseeded_split())),
    "seeded_split": refused(lambda: Subset(rows(), order_of(RANK)[:25])),
    "other_order": refused(lambda: Subset(ConcatDataset([rows(), rows()]), order_of(RANK, 66))),
    "nested": refused(lambda: Subset(Subset(rows(), order_of(RANK)), range(20))),
    "but_one": refused(lambda: Subset(rows(), but_one(RANK))),
    "own_order": refused(lambda: OwnIndices(order_of(RANK))),
    "own_but_one": refused(lambda: OwnIndices(but_one(RANK))),
    "own_augmented": refused(lambda: Augmented(order_of(RANK))),
    "own_in_worker": failing(lambda: Model(OpensInWorker(order_of(RANK)), workers=1)),
    "split_by_rank": refused(lambda: Subset(rows(32), range(RANK, 32, 2))),
    "own_split_by_rank": refused(lambda: OwnIndices(list(range(16 * RANK, 16 * RANK + 16)))),
    "tensors": refused(lambda: Subset(rows(40 + RANK), range(33)) if RANK else rows()),
    "one_number": refused(lambda: (data := rows(), data.tensors[0][7].add_(RANK))[0]),
    "batch_size": failing(lambda: Model(batch_size=4 + RANK)),
    "frozen": failing(frozen_on_one),
    "extra_layer": failing(extra_frozen_layer),
    "width": failing(lambda: Model(width=8 + RANK)),
    "lr": failing(lambda: Model(lr=0.1 + RANK)),
    "optimizer": failing(Adam),
    "schedule": failing(Decays),
    "epochs": failing(Model, max_epochs=1 + RANK),
    "precision": failing(Model, precision="bf16-mixed" if RANK else "32-true"),
    "delta": failing(Model, config={"delta": 1e-5 * (1 + RANK)}),
    "seed": failing(Model, config={"insecure_seed": 3 if RANK else None}),
    "public": failing(Model, strategy={"public_metrics": ["a"] if RANK else ["b"]}),
    "validation": failing(lambda: (Model if RANK else Validates)(), limit_val_batches=1.0),
    "checkpoints": failing(Model, callbacks=saving(1 + RANK), enable_checkpointing=True),
    "no_checkpoints": failing(Model, callbacks=saving(1)[RANK:], enable_checkpointing=not RANK),
    "patience": failing(Model, callbacks=[EarlyStopping("loss", patience=1 + RANK)]),
    "sharded_rows": failing(lambda: Sharded(OwnIndices(order_of(RANK))), PrivateFSDPStrategy),
    "sharded_width": failing(lambda: Sharded(width=8 + RANK), PrivateFSDPStrategy),
    "sharded_lr": failing(lambda: Sharded(lr=0.1 + RANK), PrivateFSDPStrategy),
}

ALIKE = {
    "same_split": fine(lambda: Model(Subset(ConcatDataset([rows()]), order_of(0)))),
    "same_own": fine(lambda: Model(OwnIndices(order_of(0)))),
    "same_augmented": fine(lambda: Model(Augmented(order_of(0)))),
    "same_in_worker": fine(lambda: Model(OpensInWorker(order_of(0)), workers=1)),
    "unreadable": failing(lambda: Model(Unreadable(order_of(0))), max_steps=0),
    "chunks": failing(Model, config={"max_physical_batch_size": 2 + RANK}, max_steps=2),
    "sharded": fine(lambda: Sharded(OwnIndices(order_of(0))), PrivateFSDPStrategy),
}

PLAIN = {
    "other_generation": plain(lambda f: module_of(f, "B" if RANK else "A", seed=5)),
    "pinned": plain(
        lambda f: module_of(f, "A", seed=5, manifest_digest="0" * 64 if RANK else None)
    ),
    "other_key": plain(lambda f: module_of(f, "A", "wrong" if RANK else "key", seed=5)),
    "other_batches": plain(lambda f: module_of(f, "A", seed=5, batch_size=4 + RANK)),
    "other_columns": plain(
        lambda f: module_of(f, "A", seed=5, columns=("x", "y", "i")[: 3 - RANK])
    ),
    "other_seed": plain(lambda f: module_of(f, "A", seed=RANK)),
    "global_seeds": plain(lambda f: module_of(f, "A"), seed=lambda: 42 + RANK),
    "first_alone": alone_after_ddp([0]),
    "each_alone": alone_after_ddp([0, 1]),
}

SCENARIOS = {**DIFFERENT, **ALIKE, **PLAIN}

if __name__ == "__main__":
    scenarios.main(SCENARIOS, *sys.argv[1:])
