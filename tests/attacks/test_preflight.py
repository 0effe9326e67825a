"""Ways past the trial runs; each succeeded once."""

from __future__ import annotations

import array
import copy
import dataclasses
import datetime
import enum
import functools
import io
import math
import pathlib
import random
import time
import uuid
from collections import Counter, deque

import lightning as L
import numpy as np
import pandas
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import CSVLogger
from opacus.layers import DPLSTM
from private_run import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.collate_fn import _require_alike
from lightning_secure.privacy.checks.metric_isolation import metrics_kept_apart
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.checks.snapshot import copied, difference
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.rules.layer_rule import Record, Way
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.released.step_metrics import require_rows_apart
from lightning_secure.privacy.sampling import PoissonBatchSampler

SIZE = 12


def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SIZE, 6, generator=generator)
    return x, torch.randint(0, 3, (SIZE,), generator=generator)


def check(model, loss, data=None, size=SIZE, **options):
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    options = {"backward": torch.autograd.backward, **options}
    try:
        preflight(engine, model, lambda b: loss(model, b), data or batch(), size=size, **options)
    finally:
        engine.detach()


class Net(nn.Module):
    def __init__(self, *between):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.between = nn.Sequential(nn.Tanh(), *between)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def cross_entropy(model, batch, **options):
    return F.cross_entropy(model(batch[0]), batch[1], **options)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(shift=0.0, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator) + shift
    y = torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, **options)


# ---------------------------------------------------------------- mixing that keeps norms


def by_sign(model, batch):
    return (model(batch[0]) * torch.sign(batch[0][:, 0].sum()).detach()).mean()


def by_rolled_target(model, batch):
    return F.l1_loss(model(batch[0])[:, 0], batch[0][:, 1].roll(1, 0))


def by_median(model, batch):
    p = model(batch[0])[:, 0]
    return (p - p.detach().median()).abs().mean()


@pytest.mark.parametrize("loss", [by_sign, by_rolled_target, by_median])
def test_mixing_that_keeps_every_norm_is_refused(loss):
    with pytest.raises(UnsupportedModelError, match="mixed in the loss"):
        check(Net(), loss)


def signed_collate(samples):
    x, y = default_collate(samples)
    return x * torch.sign(x.sum()), y


def test_a_collate_function_that_mixes_signs_is_refused(tmp_path):
    class Signs(Module):
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).mean()

    with pytest.raises(UnsupportedModelError, match="collate"):
        trainer(tmp_path).fit(Signs(), loader(collate_fn=signed_collate))


def test_rows_of_one_norm_can_be_told_apart():
    """Their gradients' norms never move; that is no reason to refuse the model."""
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    check(model, lambda m, b: m(b[0]).mean(), (F.normalize(batch()[0]), batch()[1]))


# ---------------------------------------------------------------- another way backward


def over_the_loss(self, loss):
    (loss / loss.detach()).backward()


def by_the_sign_of_the_loss(self, loss):
    (loss * torch.sign(torch.sin(1000 * loss.detach()))).backward()


@pytest.mark.parametrize("backward", [over_the_loss, by_the_sign_of_the_loss])
def test_a_backward_that_mixes_rows_is_refused(tmp_path, backward):
    kind = type("Kind", (Module,), {"backward": backward})
    with pytest.raises(UnsupportedModelError, match=r"backward\(\)"):
        trainer(tmp_path).fit(kind(), loader())


def test_a_backward_of_ones_own_that_mixes_nothing_is_fine(tmp_path):
    kind = type("Kind", (Module,), {"backward": lambda self, loss: (2 * loss).backward()})
    run = trainer(tmp_path)
    run.fit(kind(), loader())
    assert run.strategy.ledger.steps == 4


# ---------------------------------------------------------------- gradients changed in place


class Hooked(Module):
    """A hook changes the gradient of a layer's output in the tensor that the layer's record has."""

    def __init__(self, change):
        super().__init__()
        self.change, self.begun = change, None

    def training_step(self, batch, batch_idx):
        out = self.layer(batch[0])
        if self.begun is None or self.global_step >= self.begun:
            out.register_hook(self.change)
        return F.cross_entropy(out, batch[1])


def in_place(grad):
    grad.mul_(100)


def in_place_unseen(grad):
    grad.data.mul_(100)


@pytest.mark.parametrize("change", [in_place, in_place_unseen])
def test_a_hook_cannot_lengthen_what_was_measured(tmp_path, change):
    with pytest.raises(UnsupportedModelError, match="does not account for"):
        trainer(tmp_path).fit(Hooked(change), loader())


def test_a_hook_that_lengthens_it_later_is_refused_there(tmp_path):
    module, run = Hooked(in_place), trainer(tmp_path)
    module.begun = 2
    with pytest.raises(UnsupportedModelError, match="changed in place in the backward pass"):
        run.fit(module, loader())
    assert run.strategy.ledger.steps == 2


# ---------------------------------------------------------------- what depends on how many rows


@pytest.mark.parametrize("power", [0.5, 0.49, 0.05, -0.05, -1.0])
def test_a_loss_that_scales_with_the_number_of_rows_is_refused(power):
    match = "grows" if power > 0 else "shrinks"
    with pytest.raises(UnsupportedModelError, match=match):
        check(Net(), lambda m, b: cross_entropy(m, b) * len(b[0]) ** power)
    with pytest.raises(UnsupportedModelError, match=match):
        check(Net(nn.Dropout(0.5)), lambda m, b: cross_entropy(m, b) * len(b[0]) ** power)


class DropPath(nn.Module):
    """Drops whole rows, as a layer that nobody knows."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1) < 0.8) / 0.8


@pytest.mark.parametrize("power", [1.0, -1.0])
def test_nor_can_it_hide_behind_random_numbers(power):
    with pytest.raises(UnsupportedModelError, match="mean"):
        check(Net(DropPath()), lambda m, b: cross_entropy(m, b) * len(b[0]) ** power)


def per_row_mask(model, batch):
    mask = (batch[0] > 0).float()[:, :3] + 0.1
    each = model(batch[0]).square() * mask
    return (each.sum(1) / mask.sum(1)).mean()


def functional_dropout(model, batch):
    x = F.dropout(batch[0], 0.4)
    q = model(x)[:, None]
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        per_row_mask,
        functional_dropout,
        lambda m, b: cross_entropy(m, b, label_smoothing=0.1),
        lambda m, b: cross_entropy(m, b, reduction="none").mean() * 1e-3,
    ],
)
@pytest.mark.parametrize(
    "between", [nn.Identity, nn.Dropout, nn.AlphaDropout, lambda: nn.LayerNorm(8), DropPath]
)
def test_ordinary_means_pass(loss, between):
    torch.manual_seed(0)
    check(Net(between()), loss)


@pytest.mark.parametrize("size", [SIZE, 200])
def test_class_weights_are_seen_where_their_class_is_rare(size):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 6, generator=generator), torch.zeros(size, dtype=torch.long)
    y[-1] = 2
    weights = torch.tensor([1.0, 1.0, 50.0])

    def weighted_mean(model, batch):  # by hand, so that no call shows it
        each = weights[batch[1]]
        return (each * cross_entropy(model, batch, reduction="none")).sum() / each.sum()

    with pytest.raises(UnsupportedModelError, match="mixed in the loss, after layer"):
        check(Net(), weighted_mean, (x, y), size=size)


def weighted_ones(rows):
    return torch.randn(rows, 6), torch.zeros(rows, dtype=torch.long)


WEIGHTS = torch.tensor([1.0, 1.0, 50.0])


def row_by_row(model, batch):
    rows = zip(model(batch[0]), batch[1], strict=True)
    losses = [F.cross_entropy(z.expand(4, 3), y.expand(4), WEIGHTS) for z, y in rows]
    return torch.stack(losses).mean()


def told(model, batch):
    with torch.no_grad():
        return cross_entropy(model, batch, weight=WEIGHTS)


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: cross_entropy(m, b, weight=WEIGHTS),
        lambda m, b: F.nll_loss(F.log_softmax(m(b[0]), 1), b[1], WEIGHTS),
        lambda m, b: nn.CrossEntropyLoss(WEIGHTS)(m(b[0]), b[1]),
        lambda m, b: cross_entropy(m, b, weight=WEIGHTS, reduction="none").mean(),
        lambda m, b: cross_entropy(m, b, weight=torch.full((3,), 7.0)),
        lambda m, b: F.cross_entropy(m(b[0]), F.one_hot(b[1], 3).float(), weight=WEIGHTS),
        row_by_row,
        lambda m, b: cross_entropy(m, b) + 0 * told(m, b),
    ],
)
def test_class_weights_that_divide_by_nothing_of_other_rows_pass(loss):
    check(Net(), loss, weighted_ones(SIZE))


class Padded(Module):
    """Its first rows have nothing that is ignored."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("seed", [3, 4])
def test_what_a_row_ignores_moves_no_other(tmp_path, seed):
    def weights(*, ignored):
        torch.manual_seed(0)
        x, y = torch.rand(64, 8, 4), torch.zeros(64, 8, dtype=torch.long)
        x[0], y[0] = 0, -100 if ignored else 0
        module = Padded()
        module.layer = nn.Linear(4, 3, bias=False)  # so that row 0 has no gradient either way
        dp = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": seed}
        run = trainer(tmp_path, dp={**dp, "public_dataset_size": 64})
        run.fit(module, DataLoader(TensorDataset(x, y), batch_size=16))
        return module.layer.weight

    torch.testing.assert_close(weights(ignored=True), weights(ignored=False), rtol=0, atol=1e-7)


# ---------------------------------------------------------------- mixing by chance

COINS = {
    "numpy": np.random.rand,  # as in CutMix' own code
    "python": random.random,
    "torch": lambda: torch.rand(()),
}


def mixed_by_chance(x, coin):
    return x + x.roll(1, 0) if COINS[coin]() < 0.5 else x


@pytest.mark.parametrize("coin", COINS)
def test_mixing_in_half_of_the_steps_is_refused(coin):
    def loss(model, batch):
        return cross_entropy(model, (mixed_by_chance(batch[0], coin), batch[1]))

    with pytest.raises(UnsupportedModelError, match="mixed in the forward pass"):
        check(Net(), loss)


@pytest.mark.parametrize("coin", COINS)
def test_a_collate_function_that_mixes_half_of_its_batches_is_refused(tmp_path, coin):
    def collate(samples):
        x, y = default_collate(samples)
        return mixed_by_chance(x, coin), y

    for _ in range(3):  # whatever was drawn before
        with pytest.raises(UnsupportedModelError, match="collate"):
            trainer(tmp_path).fit(Module(), loader(collate_fn=collate))


def test_a_collate_function_may_draw_for_each_row_by_itself(tmp_path):
    def collate(samples):
        x, y = default_collate(samples)
        return x * torch.rand(len(x), 1), y

    run = trainer(tmp_path)
    run.fit(Module(), loader(collate_fn=collate))
    assert run.strategy.ledger.steps == 4


@pytest.mark.parametrize("coin", COINS)
def test_a_number_that_mixes_by_chance_is_not_released(coin):
    model = Net()

    def output(batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return {"loss": losses.mean(), "row_loss": mixed_by_chance(losses, coin)}

    with pytest.raises(UnsupportedModelError, match="when another row does"):
        require_rows_apart(["row_loss"], model, output, batch(), size=SIZE)


# ---------------------------------------------------------------- padding to the longest row


def in_lengths(samples):
    """As most collate functions for texts do, with the lengths."""
    x = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    return x, torch.stack([y for _, y in samples]), torch.tensor([len(x) for x, _ in samples])


def in_random_lengths(samples):
    return in_lengths([(x[: random.randint(2, len(x))], y) for x, y in samples])


def texts(collate_fn=in_lengths):
    generator = torch.Generator().manual_seed(0)
    lengths = range(
        2, 34
    )  # of rows that follow one another about the same, as where they are sorted
    rows = [(torch.randn(n, 4, generator=generator), torch.tensor(n % 3)) for n in lengths]
    return DataLoader(rows, batch_size=8, collate_fn=collate_fn)


class Text(Module):
    """Classifies what is left of a text once its time is gone."""

    def __init__(self, pool, inner=nn.Identity):
        super().__init__()
        self.inner, self.pool = inner(), pool

    def training_step(self, batch, batch_idx):
        x, y, lengths = batch
        mask = torch.arange(x.shape[1])[None] < lengths[:, None]
        h = self.inner(x)
        return F.cross_entropy(self.layer(self.pool(h[0] if isinstance(h, tuple) else h, mask)), y)


def of_all(h, mask):
    return h.relu().mean(1)


def of_the_row(h, mask):
    return (h.relu() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def last_of_all(h, mask):
    return h[:, -1]


def last_of_the_row(h, mask):
    return h[torch.arange(len(h)), mask.sum(1) - 1]


def memory():
    return DPLSTM(4, 4, batch_first=True)


@pytest.mark.parametrize(("pool", "inner"), [(of_all, nn.Dropout), (last_of_all, memory)])
def test_a_row_that_padding_changes_is_refused(tmp_path, pool, inner):
    with pytest.raises(UnsupportedModelError, match="changes with its padding"):
        trainer(tmp_path).fit(Text(pool, inner), texts())


@pytest.mark.parametrize("collate", [in_lengths, in_random_lengths])
@pytest.mark.parametrize("inner", [nn.Dropout, memory])
def test_a_row_that_padding_does_not_change_is_fine(tmp_path, inner, collate):
    pool = last_of_the_row if inner is memory else of_the_row
    run = trainer(tmp_path)
    run.fit(Text(pool, inner), texts(collate))
    assert run.strategy.ledger.steps == 4


def test_an_activation_that_rounding_moves_is_not_taken_for_padding():
    weights = [torch.zeros(1)]
    _require_alike([0.02, 1e-7, 1e-7], weights)
    _require_alike([0.02, 0.01], [torch.zeros(1, dtype=torch.bfloat16)])
    for found in ([0.02, 0.003], [0.06, 1e-7]):
        with pytest.raises(UnsupportedModelError):
            _require_alike(found, weights)


# ---------------------------------------------------------------- what a checkpoint would hold


class Hyperparameters(Module):
    def training_step(self, batch, batch_idx):
        self.hparams["last_row"] = batch[0][0].tolist()
        return super().training_step(batch, batch_idx)


class OnSave(Module):
    losses = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses = [*self.losses, float(loss.detach())]
        return loss

    def on_save_checkpoint(self, checkpoint):
        checkpoint["losses"] = self.losses


class LearningRate(Module):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.optimizers().param_groups[0]["lr"] = float(loss.detach())
        return loss


class Schedule(Module):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().gamma = float(loss.detach())
        return loss


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Hyperparameters, "hyper_parameters.last_row"),
        (OnSave, "losses"),
        (LearningRate, r"optimizer_states.0.param_groups.0.lr"),
        (Schedule, r"lr_schedulers.0.gamma"),
    ],
)
def test_nothing_that_a_checkpoint_holds_takes_up_rows(tmp_path, kind, name):
    model, run = kind(), trainer(tmp_path)
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' changes"):
        run.fit(model, loader())
    assert dict(model.hparams) == {}
    assert not model.__dict__.get("losses")


def test_optimizers_are_as_before():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.25)

    def meddling(model, batch):
        loss = cross_entropy(model, batch)
        optimizer.param_groups[0]["lr"] = float(loss.detach())
        return loss

    check(model, meddling, stateful=[optimizer])
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_hook_that_cannot_be_asked_yet_is_refused():
    def fails():
        raise AttributeError("best")

    with pytest.raises(UnsupportedModelError, match="on_save_checkpoint"):
        check(Net(), cross_entropy, checkpoint=fails)


@dataclasses.dataclass(slots=True)
class Slots:
    total: float = 0.0


class Tagged(str):
    """Has attributes of its own."""


class Kept(Module):
    """Keeps something of the rows in an object, which goes into every checkpoint."""

    def __init__(self, kept, keep):
        super().__init__()
        self.kept, self.keep = kept, keep

    def training_step(self, batch, batch_idx):
        self.kept = self.keep(self.kept, float(batch[0].sum())) or self.kept
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["kept"] = self.kept


def attribute(kept, value):
    kept.total = value


def first_ever(kept, value):
    if not kept.total:
        kept.total = value


KINDS = {
    "slots": (Slots, attribute),
    "saturated at once": (Slots, first_ever),
    "module": (nn.Identity, attribute),
    "text": (lambda: Tagged("a"), attribute),
    "array": (lambda: array.array("d"), lambda k, v: k.append(v)),
    "text buffer": (io.StringIO, lambda k, v: k.write(str(v)) and None),
    "buffer": (io.BytesIO, lambda k, v: k.write(str(v).encode()) and None),
    "frame": (lambda: pandas.DataFrame({"v": [0.0]}), lambda k, v: k.loc.__setitem__((0, "v"), v)),
    "partial": (lambda: functools.partial(print, [0]), lambda k, v: k.args[0].append(v)),
    "objects": (lambda: np.array([Slots()]), lambda k, v: attribute(k[0], v)),
    "masked": (lambda: np.ma.array([0.0], mask=[1]), lambda k, v: k.data.__setitem__(0, v)),
    "path": (lambda: pathlib.Path("a"), lambda k, v: pathlib.Path(str(v))),
    "random": (random.Random, lambda k, v: k.seed(v)),
    "generator": (torch.Generator, lambda k, v: k.manual_seed(hash(v)) and None),
    "enum": (lambda: enum.Enum("E", "A B").A, lambda k, v: type(k).B),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_up_rows_is_seen_whatever_its_type(tmp_path, kind):
    make, keep = KINDS[kind]
    with pytest.raises(UnsupportedModelError, match=r"'kept[.a-z_]*' changes"):
        trainer(tmp_path).fit(Kept(make(), keep), loader())


def test_a_new_key_is_not_told(tmp_path):
    module = Kept({}, lambda k, v: k.update({f"Ann {v}": 1}))
    with pytest.raises(UnsupportedModelError, match="'kept' changes"):
        trainer(tmp_path).fit(module, loader())


def test_a_number_that_python_has_no_type_for_is_compared_by_itself():
    assert difference(copied(np.longdouble(1)), copied(np.longdouble(1))) is None
    assert difference(copied(np.longdouble(1)), copied(np.longdouble(2))) == ""


def test_a_module_pickled_whole_holds_buffers_that_its_state_leaves_out():
    kept = nn.Identity()
    kept.register_buffer("seen", torch.zeros(1), persistent=False)
    before = copied([kept])
    kept.seen.add_(1)
    assert difference(before, copied([kept])) == "0.seen"


class Late(Module):
    """Does in later steps what it does not in the first, in which a preflight looks."""

    def __init__(self, change):
        super().__init__()
        self.register_buffer("center", torch.zeros(4))
        self.frozen = nn.Linear(4, 1).requires_grad_(False)
        self.change, self.kept = change, []

    def training_step(self, batch, batch_idx):
        if self.global_step > 0:
            with torch.no_grad():
                self.change(self, batch[0])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.layer.parameters())

    def on_save_checkpoint(self, checkpoint):
        checkpoint["kept"] = list(self.kept)


def into_the_state(module, x):
    (state, *_) = module.optimizers().optimizer.state.values()
    state["exp_avg"].add_(1e-3)


LATE = {
    "center": lambda m, x: m.center.mul_(0.9).add_(x.mean(0), alpha=0.1),
    "frozen.weight": lambda m, x: m.frozen.weight.add_(x.mean(0)),
    r"hyper_parameters.last[.0-9]*": lambda m, x: m.hparams.update(last=x[0].tolist()),
    "kept": lambda m, x: m.kept.append(len(x)),
    "optimizer_states.0.state.0.exp_avg.1": into_the_state,
}


@pytest.mark.parametrize("name", LATE)
def test_what_takes_up_rows_in_a_later_step_is_seen_there(tmp_path, name):
    run = trainer(tmp_path, max_epochs=2)
    with pytest.raises(UnsupportedModelError, match=rf"'{name}' changes.*This step was not taken"):
        run.fit(Late(LATE[name]), loader())
    assert run.strategy.ledger.steps == 1


class Fetching(torch.utils.data.Dataset):
    """Keeps of the rows what it has fetched."""

    def __init__(self, keep):
        self.rows, self.keep, self.kept = loader().dataset, keep, [0.0]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        self.keep(self.kept, float(self.rows[row][0].sum()))
        return self.rows[row]


class Fetched(L.LightningDataModule):
    """Its state is what the dataset keeps."""

    def __init__(self, keep, **options):
        super().__init__()
        self.rows, self.options = Fetching(keep), options

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8, **self.options)

    def state_dict(self):
        return {"kept": self.rows.kept}


def counted(kept, _):
    kept[0] += 1


def last(kept, value):
    kept[0] = value


@pytest.mark.parametrize("keep", [counted, last])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("collate", [default_collate, lambda samples: default_collate(samples)])
def test_what_a_dataset_keeps_of_rows_is_in_no_checkpoint(tmp_path, keep, isolated, collate):
    run = trainer(tmp_path, dp={"isolate_rows": isolated})
    with pytest.raises(UnsupportedModelError, match=r"'Fetched.kept.0' changes"):
        run.fit(Module(), datamodule=Fetched(keep, collate_fn=collate))


def test_what_copies_of_the_dataset_keep_in_workers_is_in_none_either(tmp_path):
    data, run = Fetched(counted, num_workers=1), trainer(tmp_path)
    run.fit(Module(), datamodule=data)
    assert run.strategy.ledger.steps == 4
    assert data.state_dict() == {"kept": [0.0]}


class Clock(Kept):
    """Its checkpoints say when they were written."""

    def __init__(self, now, keep=lambda *_: None):
        super().__init__([], keep)
        self.now = now

    def on_save_checkpoint(self, checkpoint):
        checkpoint["kept"] = self.now(self.kept)


def saved_at(kept):
    kept.append(time.time())
    return kept


NAMES = [f"C-{100371 + 7 * row}" for row in range(999)]
CLOCKS = {
    "seconds": lambda _: time.time(),
    "nanoseconds": lambda _: [{"now": time.time_ns()}],
    "whole seconds": lambda _: int(time.time()),
    "left": lambda _: 1e6 - time.monotonic(),
    "date": lambda _: datetime.datetime.now(datetime.UTC),
    "text": lambda _: datetime.datetime.now(datetime.UTC).isoformat(),
    "seconds in a text": lambda _: time.strftime("%Y-%m-%d %H:%M:%S"),
    "name": lambda _: f"run-{uuid.uuid4()}",
    "count": lambda kept: kept.append(0) or len(kept),
    "list": saved_at,
    "elapsed": lambda _: time.perf_counter() - 5,
    "hundredths": lambda _: round(time.time(), 2),
    "milliseconds in a text": lambda _: f"at {time.time():.3f}",
    "local": lambda _: datetime.datetime.now().isoformat(),
    "as in C": lambda _: time.ctime(),
    "in a file's name": lambda _: time.strftime("run_%Y%m%d-%H%M%S.ckpt"),
    "elapsed in a text": lambda _: str(datetime.timedelta(seconds=time.monotonic())),
    "hex": lambda _: uuid.uuid4().hex,
    "drawn": lambda _: random.choice("abc"),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_clock_takes_up_no_rows(tmp_path, clock):
    module = Clock(CLOCKS[clock])
    module.kept = [time.time()]
    run = trainer(tmp_path)
    run.fit(module, loader())
    assert run.strategy.ledger.steps


@pytest.mark.parametrize(
    "now",
    [
        lambda kept: [time.time(), *kept],
        lambda kept: f"{datetime.datetime.now(datetime.UTC)} {sum(kept)}",
        lambda kept: time.time() + sum(map(abs, kept)),
        lambda kept: {"at": time.time(), "n": kept[-1:]},
        lambda kept: f"C-{random.choice(kept or [0]):.6f}",
        lambda kept: random.choice(NAMES[: 1 + len(kept)]),
        lambda kept: f"{uuid.uuid4().hex} {uuid.uuid4().hex[:6] if not kept else kept[-1]}",
        lambda kept: f"{uuid.uuid4().hex[:8]}",
        lambda kept: round(time.time(), 2) + sum(map(abs, kept)) * 1e-4,
        lambda kept: time.time() + 0.05 * len(kept),
        lambda kept: f"{time.time() + len(kept):.1f}",
        lambda kept: f"{datetime.datetime.now() + datetime.timedelta(seconds=len(kept))}",
    ],
)
def test_nothing_hides_behind_a_clock(tmp_path, now):
    module = Clock(now, lambda kept, value: kept.append(value))
    with pytest.raises(UnsupportedModelError, match="takes up the rows"):
        trainer(tmp_path).fit(module, loader())


def test_a_timer_is_a_clock(tmp_path):
    run = trainer(tmp_path, callbacks=[Timer(duration="00:01:00:00")], max_time="00:01:00:00")
    run.fit(Module(), loader())
    assert run.strategy.ledger.steps


class Settings:
    def __init__(self):
        self.depth = 2
        self.me = self


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda v: v["objects"][0].__dict__.update(depth=3), "objects.0.depth"),
        (lambda v: v["objects"].append(1), "objects"),
        (lambda v: v["array"].__setitem__(0, 2.0), "array"),
        (lambda v: v["tensor"].add_(1), "tensor"),
        (lambda v: v["set"].add(3), "set"),
        (lambda v: v.update(new=None), "new"),
        (lambda v: v.pop("set"), "set"),
        (lambda v: v["deep"]["a"]["b"].append(1), "deep.a.b"),
    ],
)
def test_a_change_is_found_wherever_it_is(change, name):
    value = {
        "objects": [Settings(), math.nan],
        "array": np.array([1.0, np.nan]),
        "tensor": torch.tensor([1.0, math.nan]),
        "set": {1},
        "deep": {"a": {"b": []}},
    }
    before = copied(value)
    assert difference(before, copied(value)) is None
    change(value)
    assert difference(before, copied(value)) == name


# ---------------------------------------------------------------- metrics


class Shared(Module):
    """One metric for training and validation."""

    def __init__(self):
        super().__init__()
        mean = torchmetrics.MeanMetric
        self.both = torchmetrics.MetricCollection({"mean": mean(), "again": mean()})

    def training_step(self, batch, batch_idx):
        self.both(batch[0].mean())
        self.log_dict(self.both)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.both(batch[0].mean())
        self.log_dict({f"val_{name}": metric for name, metric in self.both.items()})


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_metric_does_not_carry_training_rows_into_validation(tmp_path, sanity):
    seen = []
    for shift in (0.0, 100.0):
        run = trainer(
            tmp_path, logger=CSVLogger(tmp_path, name=str(shift)), num_sanity_val_steps=sanity
        )
        run.fit(Shared(), loader(shift), loader())
        seen.append({k: float(v) for k, v in run.logged_metrics.items() if k[:3] == "val"})
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"val_mean", "val_again"}


class Undeclared(torchmetrics.Metric):
    """Keeps what it is told in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.seen = {"deep": []}

    def update(self, value):
        self.seen["deep"].append(value)
        self.last = value

    def compute(self):
        return torch.stack([*self.seen["deep"], torch.tensor(0.0)]).sum()


class Highest(Module):
    """Shows in validation the highest value that it was ever told."""

    def __init__(self, metric, where="training_step"):
        super().__init__()
        self.metric, self.where = metric(), where

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and self.where == "on_after_batch_transfer":
            self.metric.update(batch[0].mean())
        return batch

    def training_step(self, batch, batch_idx):
        if self.where == "training_step":
            self.metric(batch[0].mean())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.metric(batch[0].mean() * 0)

    def on_validation_epoch_end(self):
        value = self.metric.compute()
        self.log("val", value["max"] if isinstance(value, dict) else value)


@pytest.mark.parametrize(
    ("metric", "where"),
    [
        (lambda: torchmetrics.MinMaxMetric(torchmetrics.MeanMetric()), "training_step"),
        (Undeclared, "training_step"),
        (torchmetrics.MeanMetric, "on_after_batch_transfer"),
    ],
)
def test_a_metric_hides_no_training_rows_where_it_declares_none(tmp_path, metric, where):
    run = trainer(tmp_path, num_sanity_val_steps=0)
    run.fit(Highest(metric, where), loader(100.0), loader())
    assert float(run.callback_metrics["val"]) == 0


def test_a_metric_keeps_no_attribute_that_it_has_got_meanwhile():
    metric = Undeclared()
    with metrics_kept_apart(metric):
        metric.update(torch.tensor(1.0))
    assert "last" not in vars(metric)
    assert metric.seen == {"deep": []}


def test_a_metric_goes_on_where_it_was():
    both = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.CatMetric()])
    same = torchmetrics.MetricCollection(
        {"a": torchmetrics.MeanMetric(), "b": torchmetrics.MeanMetric()}
    )
    model = nn.ModuleList([both, same])
    for round_ in range(3):
        with metrics_kept_apart(model):
            both.update(torch.tensor(100.0)), same.update(torch.tensor(50.0))
            assert float(same.compute()["a"]) > 5
        both.update(torch.tensor(float(round_))), same.update(torch.tensor(float(round_)))
    assert both["CatMetric"].compute().tolist() == [0, 1, 2]
    assert both["MeanMetric"].compute() == 1
    assert {k: float(v) for k, v in same.compute().items()} == {"a": 1.0, "b": 1.0}


# ---------------------------------------------------------------- one row that is not finite


class Normalised(nn.Module):
    """Of zeros it makes not a number."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.w * x / x.norm(dim=-1, keepdim=True)


class Twice(nn.Module):
    """A layer that is used twice, one that shares its weight, and one that divides by nothing."""

    def __init__(self, kind):
        super().__init__()
        self.a = kind()
        self.norm = nn.LayerNorm(6, eps=0.0)
        self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3)
        self.c.weight = self.b.weight

    def forward(self, x):
        h = self.norm(self.a(self.a(x)))
        return self.b(h) + self.c(h.sin())


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(Normalised(), nn.Linear(6, 3)),
        lambda: Twice(Normalised),
        lambda: Twice(lambda: nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 2), nn.Flatten()),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 2), nn.Flatten()),
    ],
)
@pytest.mark.parametrize("bad", [[4], list(range(SIZE))])
def test_a_row_that_is_not_finite_is_as_if_it_were_not_there(net, bad):
    torch.manual_seed(0)
    model = net()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    x = batch()[0]
    x[bad] = math.inf
    sums = []
    for rows in (x, x[[row for row in range(SIZE) if row not in bad]]):
        engine.begin_step()
        if len(rows):
            with engine.recording():
                model(rows).square().sum(1).mean().backward()
            engine.add_chunk(len(rows))
        sums.append(engine._sums)
    for parameter, total in sums[0].items():
        expected = sums[1].get(parameter, torch.zeros_like(parameter))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_no_way_to_a_sum_makes_not_a_number_of_a_row_left_out(kept):
    engine = GradientEngine(nn.Sequential(Normalised()), max_grad_norm=1.0)
    (unit,) = engine.units
    x, keep = batch()[0], torch.arange(SIZE) != 4
    x[4] = math.inf
    record = Record(unit, x, torch.ones(SIZE, 6), way=Way("product", kept=kept))
    record.squares()
    (total,) = record.rows(keep).weighted_sum(torch.ones(SIZE - 1)).values()
    assert torch.isfinite(total).all()
    engine.detach()


# ---------------------------------------------------------------- processes and copies


def test_a_fork_draws_noise_and_rows_of_its_own(in_fork):
    noise = GaussianNoise()
    sampler = PoissonBatchSampler(1000, sample_rate=0.5, steps=1)

    def draw():
        return noise.add_(torch.zeros(3), std=1.0).tolist(), list(sampler)

    draw()
    theirs = in_fork(lambda: repr(draw()).encode()).decode()
    ours = draw()
    assert str(ours[0]) not in theirs
    assert str(ours[1]) not in theirs


def test_a_copied_sampler_draws_rows_of_its_own():
    sampler = PoissonBatchSampler(1000, sample_rate=0.5, steps=1)
    assert list(copy.deepcopy(sampler)) != list(sampler)
    assert len(copy.deepcopy(sampler)) == 1


# ---------------------------------------------------------------- what is left behind


class Keeping(Net):
    def __init__(self):
        super().__init__()
        self.queue = deque([0], maxlen=3)
        self.array = np.zeros(2)
        self.nested = [[], {"a": [1]}]
        self.counts = Counter(a=2)
        self.pair = ([], torch.zeros(2))
        self.parameters_too = [self.b.weight]
        self.loop = []
        self.loop.append(self.loop)
        self.bytes = bytearray(b"x")

    def forward(self, x):
        self.queue.append(1)
        self.array += 1
        self.nested[0].append(1)
        self.nested[1]["a"].append(2)
        self.counts["b"] += 1
        self.pair[0].append(1)
        self.pair[1].add_(1)
        self.loop.append(1)
        self.bytes.append(1)
        self.later = [1]
        return super().forward(x)


def test_collections_are_as_before():
    model = Keeping()
    held = model.queue, model.array, model.nested[1]["a"], model.pair[1]
    check(model, cross_entropy)
    assert model.queue == deque([0], maxlen=3)
    assert model.queue.maxlen == 3
    assert model.array.tolist() == [0, 0]
    assert model.nested == [[], {"a": [1]}]
    assert model.counts == {"a": 2}
    assert model.pair[0] == []
    assert model.pair[1].tolist() == [0, 0]
    assert model.parameters_too[0] is model.b.weight
    assert len(model.loop) == 1
    assert model.loop[0] is model.loop
    assert model.bytes == b"x"
    assert not hasattr(model, "later")
    again = model.queue, model.array, model.nested[1]["a"], model.pair[1]
    assert all(a is b for a, b in zip(held, again, strict=True))


# ---------------------------------------------------------------- layers


class TwoParents(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(6, 6)
        self.encoder = nn.Sequential(shared, nn.Tanh())
        self.decoder = nn.Sequential(shared, nn.Linear(6, 3))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_a_layer_under_two_parents_is_one_layer():
    model = TwoParents()
    assert len(GradientEngine(model, max_grad_norm=1.0).units) == 2
    check(model, cross_entropy)


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (lambda: nn.LazyLinear(3), "LazyLinear.*no weights yet.*sizes"),
        (lambda: nn.EmbeddingBag(10, 3), r"EmbeddingBag.*nn.Embedding"),
    ],
)
def test_layers_that_cannot_be_known_are_refused_with_what_to_do(layer, advice):
    with pytest.raises(UnsupportedModelError, match=rf"'0'.*{advice}"):
        GradientEngine(nn.Sequential(layer()), max_grad_norm=1.0)


def test_a_refusal_in_the_middle_of_a_run_does_not_deny_the_steps_before(tmp_path):
    class Later(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx < 2:
                return super().training_step(batch, batch_idx)
            return batch[0].mean().requires_grad_()

    class Folded(Module):
        def training_step(self, batch, batch_idx):
            x = batch[0] if batch_idx < 2 else batch[0].repeat(2, 1)
            return self.layer(x).square().mean()

    for kind in (Later, Folded):
        run = trainer(tmp_path / kind.__name__)
        with pytest.raises(UnsupportedModelError) as caught:
            run.fit(kind(), loader())
        assert run.strategy.ledger.steps == 2
        assert "No step was taken" not in str(caught.value)


def test_a_layer_inside_a_transform_of_torch_func_is_refused_by_name():
    def sharpened(model, batch):
        values = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values):
            return F.cross_entropy(torch.func.functional_call(model, values, batch[0]), batch[1])

        slopes = torch.func.grad(loss)(values)
        moved = {name: p + 0.05 * slopes[name] for name, p in model.named_parameters()}
        return F.cross_entropy(torch.func.functional_call(model, moved, batch[0]), batch[1])

    with pytest.raises(UnsupportedModelError, match=r"layer 'a' .*torch\.func"):
        check(Net(), sharpened)
