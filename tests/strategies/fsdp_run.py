"""One process of the runs that test_fsdp.py looks at: ``fsdp_run.py FOLDER SCENARIO...``."""

from __future__ import annotations

import os
import sys
from functools import partial

import lightning as L
import scenarios
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from scenarios import FailsOutside, Watch, rows, weights, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_secure.crypto.providers.local import LocalKeyProvider
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.plugins.checkpoint import EncryptedCheckpointIO
from lightning_secure.privacy.sharding import require_on
from lightning_secure.strategies.fsdp import PrivateFSDPStrategy

RANK = int(os.environ.get("LOCAL_RANK", "0"))
trainer = partial(scenarios.trainer, PrivateFSDPStrategy)
failing = partial(scenarios.failing, PrivateFSDPStrategy)


def plain_net():
    """Weights of odd sizes, and one of a single number, of which only one process has a part."""
    block = nn.Sequential(nn.Linear(8, 3), nn.LayerNorm(3), nn.Tanh())
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), block, nn.Linear(3, 1))


class Model(L.LightningModule):
    """A module that shards itself, and begins with other weights in every process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(RANK)
        self.net = plain_net()
        self.register_buffer("shift", torch.full((1,), float(RANK)))
        self.sharded = False

    def configure_model(self):
        if not self.sharded:
            self.shard(self.device_mesh["data_parallel"])
            self.sharded = True

    def shard(self, mesh):
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net[2], mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        out = (self.net(batch[0])[:, 0] + self.shift).float()
        return F.binary_cross_entropy_with_logits(out, batch[1].float())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        with torch.inference_mode():  # as Lightning's loop has it with NCCL
            loss = self.loss(batch)
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(32), batch_size=4)


class WithAdam(Model):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class LeavesWhole(Callback):
    """Has weights gathered before they change, so that they are old ones in the next step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for part in (module.net[0], module.net[2], module.net):
            part.unshard()


def on_the_cpu(model):
    """What is said where shards are on the CPU, and the strategy trains on a GPU."""
    try:
        require_on(model, torch.device("cuda"))
    except UnsupportedTrainerOptionError as error:
        return str(error)


def quiet(folder):
    """Without noise, with validation before, between and after, and chunks in unequal numbers."""
    watch, model = Watch(empty=[(0, 1), (2, 0), (2, 1), (3, 0)]), Model()
    off = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": 3}
    run = trainer(
        folder, watch, LeavesWhole(), limit_val_batches=2, val_check_interval=2,
        num_sanity_val_steps=1, config={**off, "max_physical_batch_size": 3},
    )  # fmt: skip
    run.fit(model)
    return {
        "drawn": watch.drawn, "chunks": watch.chunks, "first": watch.first,
        "weights": weights(model), "shift": model.shift,
        "offloaded": on_the_cpu(model),
        "sharded": [tuple(p.to_local().shape) for p in model.parameters()],
    }  # fmt: skip


def encrypted(folder):
    return EncryptedCheckpointIO(LocalKeyProvider(folder / "keys"))


def noisy(folder):
    L.seed_everything(42, verbose=False)
    checkpoint = ModelCheckpoint(folder / "c", filename="{step}")
    watch, model = Watch(empty=[(1, 1), (3, 0), (3, 1)]), WithAdam()
    run = trainer(
        folder, watch, checkpoint, enable_checkpointing=True, max_epochs=2,
        limit_val_batches=1, plugins=encrypted(folder), config={"noise_multiplier": 1000.0},
    )  # fmt: skip
    run.fit(model)
    states = [s["exp_avg"] for s in run.optimizers[0].state.values()]
    return {
        "drawn": watch.drawn, "grads": torch.stack(watch.grads), "weights": weights(model),
        "momentum": whole(states), "ledger": run.strategy.ledger.state_dict(),
        "saved": checkpoint.best_model_path,
    }  # fmt: skip


class FromMeta(WithAdam):
    """Has no weights until the strategy makes them."""

    def __init__(self):
        with torch.device("meta"):
            super().__init__()


class Begun(Callback):
    def on_train_start(self, trainer, module):
        self.weights = weights(module)
        self.momentum = whole([s["exp_avg"] for s in trainer.optimizers[0].state.values()])


def resumed(folder):
    begun = Begun()
    home = folder.parent / "noisy"
    run = trainer(
        home, begun, config={"noise_multiplier": 1000.0}, max_epochs=3, plugins=encrypted(home)
    )
    path = home / "c" / "step=10.ckpt"
    run.fit(FromMeta(), ckpt_path=path, weights_only=True)
    return {
        "weights": begun.weights, "momentum": begun.momentum,
        "ledger": run.strategy.ledger.state_dict(),
    }  # fmt: skip


class FailsLater(Model):
    def training_step(self, batch, batch_idx):
        if RANK == 1 and self.trainer.global_step == 2:
            raise ValueError("out of memory, say")
        return super().training_step(batch, batch_idx)


class Contrastive(Model):
    def training_step(self, batch, batch_idx):
        out = F.normalize(self.net[2](self.net[0](batch[0])))
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))


class Unsharded(Model):
    def shard(self, mesh):
        fully_shard(self.net[0], mesh=mesh)


class Nothing(Model):
    def shard(self, mesh):
        pass


class Replicated(Model):
    def shard(self, mesh):
        fully_shard(self.net, mesh=self.device_mesh)


class Alone(Model):
    def shard(self, mesh):
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("one", "other"))
        fully_shard(self.net, mesh=mesh["other"])


class Mixed(Model):
    def shard(self, mesh):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(self.net, mesh=mesh, mp_policy=policy)


class Memory(Model):
    """Its optimizer keeps a tensor that no other process has, and that no checkpoint would."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.state[self.net[0].weight]["own"] = torch.zeros(3)
        return optimizer


class FailsMidway(Model):
    def on_train_start(self):
        self.handle = self.net[1].register_forward_hook(self.fail)

    def fail(self, *_):
        if self.trainer.global_step == 2:
            raise ValueError("in a forward pass")


def again(folder):
    model = FailsMidway()
    first = failing(lambda: model)(folder)
    model.handle.remove()
    model.on_train_start = lambda: None
    run = trainer(folder, limit_val_batches=1)
    run.fit(model)
    after = weights(model)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    changed = failing(lambda: model)(folder)["raised"]
    return {
        **first, "steps": run.global_step, "account": run.strategy.ledger.steps, "weights": after,
        "changed": changed and changed[0],
    }  # fmt: skip


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight


class Layers(Model):
    """Layers that are themselves sharded, or hold others that are, of every kind of rule."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, padding=1),
            nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0),
            nn.MultiheadAttention(4, 2, batch_first=True), nn.Flatten(), nn.Linear(16, 8), Scale(),
            nn.Linear(8, 8), nn.Linear(8, 1),
        )  # fmt: skip
        self.net[0].weight.requires_grad_(False)

    def shard(self, mesh):
        for layer in (0, 2, 3, 4, 6):
            fully_shard(self.net[layer], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def loss(self, batch):
        net = self.net
        x = net[:4](batch[0])
        x = net[4](x, x, x, need_weights=False)[0]
        x = torch.utils.checkpoint.checkpoint(net[5:9], x, use_reentrant=False)
        return F.binary_cross_entropy_with_logits(net[9](x)[:, 0], batch[1].float())


class OwnLayer(Model):
    """Has a layer that goes through functorch, which copies it, and is itself sharded."""

    def __init__(self):
        super().__init__()
        self.net[1] = Scale()

    def shard(self, mesh):
        fully_shard(self.net[1], mesh=mesh)
        super().shard(mesh)


SCENARIOS = {
    "own_layer": failing(OwnLayer),
    "layers": failing(Layers),
    "bf16": failing(Model, precision="bf16-true"),
    "bf16_mixed": failing(Model, precision="bf16-mixed"),
    "memory": failing(Memory),
    "again": again,
    "fails_outside": failing(Model, FailsOutside()),  # last: it ends the connection
    "quiet": quiet,
    "noisy": noisy,
    "resumed": resumed,
    # With a seed, so that it does draw rows in the step in which it is to fail.
    "fails_later": failing(FailsLater, config={"insecure_seed": 3}),
    # Seeded, so that both draw rows in the first step, and see it.
    "contrastive": failing(Contrastive, config={"insecure_seed": 3}),
    "unsharded": failing(Unsharded),
    "nothing": failing(Nothing),
    "replicated": failing(Replicated),
    "alone": failing(Alone),
    "mixed": failing(Mixed),
}


if __name__ == "__main__":
    scenarios.main(SCENARIOS, *sys.argv[1:])
