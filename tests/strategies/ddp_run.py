"""One process of the runs that test_ddp.py looks at: ``ddp_run.py FOLDER SCENARIO...``."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial

import lightning as L
import scenarios
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scenarios import ROWS, FailsOutside, Watch, rows, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_secure.metrics import PrivateAccuracy
from lightning_secure.privacy.accounting.ledger import known_releases
from lightning_secure.strategies.ddp import PrivateDDPStrategy

RANK = int(os.environ.get("LOCAL_RANK", "0"))
Strategy = partial(PrivateDDPStrategy, public_metrics=["constant"])
trainer = partial(scenarios.trainer, Strategy)
failing = partial(scenarios.failing, Strategy)


class Model(L.LightningModule):
    """An ordinary module, which begins with other weights in every process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(RANK)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
        self.rows = rows()

    def training_step(self, batch, batch_idx):
        x, y, _ = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("withheld", loss, sync_dist=True)
        self.log("constant", 1.0, sync_dist=True, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y, _ = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(32), batch_size=4)


def quiet(folder, **config):
    watch, model = Watch(empty=[(0, 1), (2, 0), (2, 1)]), Model()
    off = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": 3}
    run = trainer(folder, watch, config={**off, "max_physical_batch_size": 3, **config})
    run.fit(model)
    public = run.strategy.ledger.public
    return {
        "drawn": watch.drawn, "first": watch.first, "weights": weights(model),
        "public": (public.expected_batch_size, public.dataset_size, public.steps_per_epoch),
    }  # fmt: skip


def noisy(folder):
    L.seed_everything(42, verbose=False)
    checkpoint = ModelCheckpoint(folder / "c", filename="{step}")
    watch, model = Watch(empty=[(1, 1), (3, 0), (3, 1)]), Model()
    run = trainer(
        folder, watch, checkpoint, enable_checkpointing=True, limit_val_batches=1.0,
        max_epochs=2, config={"noise_multiplier": 1000.0},
    )  # fmt: skip
    run.fit(model)
    return {
        "drawn": watch.drawn, "grads": torch.stack(watch.grads), "weights": weights(model),
        "ledger": run.strategy.ledger.state_dict(),
        "journals": [str(path.name) for path in (folder / "privacy_journal").iterdir()],
        "metrics": {k: float(v) for k, v in run.callback_metrics.items()},
        "by_hand": float(F.cross_entropy(model.net(rows(32)[:][0]), rows(32)[:][1])),
        "wrapped": type(run.strategy.model).__name__, "saved": checkpoint.best_model_path,
    }  # fmt: skip


def resumed(folder):
    path = folder.parent / "noisy" / "c" / "step=10.ckpt"
    run = trainer(folder.parent / "noisy", config={"noise_multiplier": 1000.0}, max_epochs=3)
    model = Model()
    run.fit(model, ckpt_path=path, weights_only=True)
    return {"ledger": run.strategy.ledger.state_dict(), "weights": weights(model)}


class Accurate(Model):
    """Publishes how well it does with noise, and charges the run for it."""

    def __init__(self, noise_multiplier):
        super().__init__()
        self.accuracy = PrivateAccuracy(noise_multiplier=noise_multiplier, public_rows=32)
        self.in_steps = []

    def training_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        self.in_steps.append(float(self.accuracy.compute()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val_accuracy", self.accuracy)


def metrics(folder, noise=9.0, **config):
    model = Accurate(noise)
    alone = Watch(empty=[(1, 1), (3, 0)])  # a process that waited for the other would wait in vain
    run = trainer(
        folder, alone, limit_val_batches=1.0, max_epochs=2, num_sanity_val_steps=1, config=config
    )
    run.fit(model)
    ledger = run.strategy.ledger
    found = float(run.callback_metrics["val_accuracy"])
    (after,) = run.validate(model, verbose=False)
    journal = known_releases(ledger, folder / "privacy_journal")
    return {
        "accuracy": (found, after["val_accuracy"]), "in_steps": model.in_steps,
        "releases": [tuple(release) for release in ledger.releases],
        "journal": [tuple(release) for release in journal],
    }  # fmt: skip


class FailsLater(Model):
    def training_step(self, batch, batch_idx):
        if RANK == 1 and self.trainer.global_step == 2:
            raise ValueError("out of memory, say")
        return super().training_step(batch, batch_idx)


class Terminated(Model):
    def training_step(self, batch, batch_idx):
        if RANK == 1 and self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


def terminated(folder):
    run, start, raised = (
        trainer(folder, max_epochs=3, config={"insecure_seed": 3}),
        time.monotonic(),
        None,
    )
    try:
        run.fit(Terminated())
    except BaseException as error:  # noqa: BLE001 # SystemExit among them
        raised = (type(error).__name__, str(error))
    return {"raised": raised, "seconds": time.monotonic() - start}


class Contrastive(Model):
    def training_step(self, batch, batch_idx):
        x, _, _ = batch
        out = F.normalize(self.net(x))
        return F.cross_entropy(out @ out.T, torch.arange(len(x)))


class Gathers(Model):
    def training_step(self, batch, batch_idx):
        everyone = self.all_gather(self.net(batch[0]).mean(0))
        return super().training_step(batch, batch_idx) + 0 * everyone.sum()


class Uneven(Model):
    def __init__(self):
        super().__init__()
        self.rows = rows(ROWS + RANK)


def promises(folder):
    return failing(Model, config={"max_grad_norm": 0.3 + RANK})(folder)


def in_the_way(folder):
    (folder / "journal").write_text("not a folder")
    return failing(Model, strategy={"journal": folder / "journal"})(folder)


SCENARIOS = {
    "quiet": quiet,
    "layers": partial(quiet, clipping="per_layer"),
    "noisy": noisy,
    "metrics": metrics,
    "too_dear": partial(metrics, noise=0.1, target_epsilon=40.0, accountant="rdp"),
    "resumed": resumed,
    # With a seed, so that it does draw rows in the step in which it is to fail.
    "fails_later": failing(FailsLater, config={"insecure_seed": 3}, max_epochs=3),
    "contrastive": failing(Contrastive, config={"insecure_seed": 3}),
    "gathers": failing(Gathers, config={"insecure_seed": 3}),
    "uneven": failing(Uneven),
    "clipped": failing(Model, gradient_clip_val=1.0),
    "journal": in_the_way,
    "promises": promises,
    "budget": failing(Model, config={"target_epsilon": 4.0}, max_epochs=50),
    "terminated": terminated,
    "fails_outside": failing(Model, FailsOutside(), max_epochs=3),  # last: it ends the connection
}


if __name__ == "__main__":
    scenarios.main(SCENARIOS, *sys.argv[1:])
