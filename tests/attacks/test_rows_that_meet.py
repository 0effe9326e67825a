"""Rows that meet in the loss, after the network, later or rarely; each passed the trials once."""

from __future__ import annotations

import dataclasses
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from private_run import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lightning_secure import DPConfig
from lightning_secure.errors import ConfigError, UnsupportedModelError
from lightning_secure.privacy.checks.loss_graph import loss_graph
from lightning_secure.privacy.checks.repeat_trials import Repeats
from lightning_secure.privacy.checks.trial_seeds import Seeds


class Module(L.LightningModule):
    """Two heads on one layer, and a loss of their outputs, targets and inputs."""

    def __init__(self, loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head, self.other = nn.Linear(8, 3), nn.Linear(8, 2)
        self.loss, self.rows_seen = loss, []

    def training_step(self, batch, batch_idx):
        h = self.body(batch[0])
        self.rows_seen.append(len(h))
        return self.loss(self.head(h), batch[1], self.other(h), self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(count=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def loader(**options):
    return DataLoader(rows(), batch_size=16, **options)


def fit(tmp_path, loss, data=None, *, steps=4, **dp):
    run = trainer(tmp_path, dp={"expected_batch_size": 16, **dp}, max_steps=steps, max_epochs=-1)
    run.fit(loss if isinstance(loss, L.LightningModule) else Module(loss), data or loader())
    return run


def ce(z, y, **options):
    return F.cross_entropy(z, y, **options)


# ---------------------------------------------------------------- what bends the mean


def flooding(z, y, o, m):
    return (ce(z, y) - 0.3).abs() + 0.3


def clamped(z, y, o, m):
    return ce(z, y).clamp(min=0.01)


def floor(z, y, o, m):
    return torch.maximum(ce(z, y), torch.tensor(0.01))


def root(z, y, o, m):
    return (F.mse_loss(z, F.one_hot(y, 3).float()) + 1e-6).sqrt()


def logarithm(z, y, o, m):
    return ce(z, y).log()


def perplexity(z, y, o, m):
    return ce(z, y).exp()


def square(z, y, o, m):
    return ce(z, y) ** 2


def product(z, y, o, m):
    return ce(z, y) * o.square().mean()


def quotient(z, y, o, m):
    return ce(z, y) / (1 + o.square().mean())


def largest(z, y, o, m):
    return torch.stack([ce(z, y), o.square().mean()]).max()


def soft_largest(z, y, o, m):
    return torch.stack([ce(z, y), 0.1 * o.square().mean()]).logsumexp(0)


def relu(z, y, o, m):
    return F.relu(ce(z, y) - 0.01)


def leaky(z, y, o, m):
    return F.leaky_relu(ce(z, y) - 0.01, 0.5)


def chosen(z, y, o, m):
    loss = ce(z, y)
    return torch.where(loss > 0.01, loss, 2 * loss)


def smooth(z, y, o, m):
    return F.softplus(50 * ce(z, y)) / 50


def huber_of_the_mean(z, y, o, m):
    return F.smooth_l1_loss(ce(z, y), torch.tensor(0.0), beta=1e-3)


def free_bits(z, y, o, m):
    return ce(z, y) + o.square().mean(0).clamp(min=1e-9).sum()


def entropy_of_the_mean(z, y, o, m):
    p = o.softmax(1).mean(0)
    return ce(z, y) + 0.1 * (p * p.log()).sum()


def covariance(z, y, o, m):
    return ce(z, y) + 0.01 * (o.T @ o / len(o)).square().sum()


def norm(z, y, o, m):
    return ce(z, y, reduction="none").norm() / len(y) ** 0.5


def deviation(z, y, o, m):
    return ce(z, y) + 0.1 * o.std()


def floods(loss):
    return ((loss - 0.3).abs() + 0.3).sum()


def each_of(z, y):
    return ce(z, y, reduction="none")


def loop(z, y, o, m):
    return floods(sum(ce(z[i : i + 1], y[i : i + 1]) for i in range(len(z))) / len(z))


def loop_select(z, y, o, m):
    target = F.one_hot(y, 3).float()
    return floods(sum(F.mse_loss(z[i], target[i]) for i in range(len(z))) / len(z))


def loop_indexed(z, y, o, m):
    return floods(sum(z[torch.tensor([i])].square().mean() for i in range(len(z))) / len(z))


def unbound(z, y, o, m):
    return floods(sum(each_of(z, y).unbind(0)) / len(z))


def split(z, y, o, m):
    return floods(sum(part.sum() for part in each_of(z, y).split(2)) / len(z))


def stacked_tasks(z, y, o, m):
    return floods(torch.stack([each_of(z, y), o.square().sum(1)]).mean(1))


def transposed(z, y, o, m):
    return floods((z - F.one_hot(y, 3)).square().T.mean(1))


def transposed_whole(z, y, o, m):
    return floods(z.square().T.mean())


def moved(z, y, o, m):
    return floods(torch.stack([z, 2 * z], 2).square().movedim(0, 2).mean(2))


def one_row_besides(z, y, o, m):
    return floods((each_of(z, y) + 0 * z[0].sum()).mean())


def every_row_besides(z, y, o, m):
    return floods((each_of(z, y) + 0 * sum(part.sum() for part in z)).mean())


def halves(z, y, o, m):
    each = each_of(z, y)
    return floods(each[::2].sum() / len(z) + each[1::2].sum() / len(z))


def picked_by_a_mask(z, y, o, m):
    each = each_of(z, y)
    return floods((each[y == 1].sum() + each[y != 1].sum()) / len(z))


def in_pairs(z, y, o, m):
    each = each_of(z, y)[: len(z) // 2 * 2 or 1]
    if len(each) == 1:
        return each.sum()
    return each.view(-1, 2).mean(1).sqrt().mean()


def neighbours(z, y, o, m):
    return sum((z[i].sum() * z[i - 1].sum()).cos() for i in range(len(z))) / len(z)


BENT = {
    loop: "abs", loop_select: "abs", loop_indexed: "abs", unbound: "abs", split: "abs",
    stacked_tasks: "abs", transposed: "abs", transposed_whole: "abs", moved: "abs",
    one_row_besides: "abs", every_row_besides: "abs", halves: "abs", picked_by_a_mask: "abs",
    in_pairs: "sqrt", neighbours: "cos|product",
    flooding: "abs", clamped: "clamp", floor: "maximum", root: "sqrt", logarithm: "log",
    perplexity: "exp", square: "pow", product: "product", quotient: "division",
    largest: "max", soft_largest: "logsumexp", relu: "relu", leaky: "leaky",
    chosen: "where", smooth: "softplus", huber_of_the_mean: "smooth", free_bits: "clamp",
    entropy_of_the_mean: "product|log", covariance: "pow", norm: "norm", deviation: "std",
}  # fmt: skip


@pytest.mark.parametrize("loss", BENT, ids=lambda loss: loss.__name__)
def test_what_bends_the_mean_is_refused_with_its_name(tmp_path, loss):
    module = Module(loss)
    with pytest.raises(UnsupportedModelError, match="mixed in the loss") as caught:
        fit(tmp_path, module)
    assert "No step was taken" in str(caught.value)
    assert "isolate_rows=True" in str(caught.value)
    assert any(f" {name}" in str(caught.value) or f"({name}" in str(caught.value)
               for name in BENT[loss].split("|")), caught.value  # fmt: skip
    assert module.rows_seen == []


@pytest.mark.parametrize("loss", BENT, ids=lambda loss: loss.__name__)
def test_the_graph_alone_shows_what_bends_the_mean(loss):
    module = Module(loss)
    assert loss_graph(module.training_step(rows(7).tensors, 0), 7).fault is not None


# ---------------------------------------------------------------- what only trial rows show


def weighed(z, y, o, m):
    weights = torch.tensor([1.0, 1.0, 50.0])[y]
    return (weights * ce(z, y, reduction="none")).sum() / weights.sum()


def over_itself(z, y, o, m):
    loss = ce(z, y)
    return loss / loss.detach()


def by_the_others_loss(z, y, o, m):
    return ce(z, y) + 0.1 * o.square().mean() * ce(z, y).detach()


def weighed_by_losses(z, y, o, m):
    losses = torch.stack([ce(z, y), o.square().mean()])
    return (losses * losses.detach().softmax(0)).sum()


def sign_of_the_mean(z, y, o, m):
    loss = ce(z, y)
    return loss * torch.sign(loss.detach() - 1.0)


def most_are_of_one_class(z, y, o, m):
    return ce(z, y) * (2.0 if len(y.unique()) == 1 or (y == 2).float().mean() > 0.75 else 1.0)


def mixup(p, coin):
    def loss(z, y, o, m):
        if coin() < p:
            places = torch.randperm(len(y))
            return (ce(z, y) + ce(z + z[places], y[places])) / 2
        return ce(z, y)

    return loss


HIDDEN = [
    weighed,
    over_itself,
    by_the_others_loss,
    weighed_by_losses,
    sign_of_the_mean,
    most_are_of_one_class,
    *(mixup(0.1, coin) for coin in (random.random, np.random.rand, lambda: float(torch.rand(())))),
    mixup(0.005, random.random),
]


@pytest.mark.parametrize("loss", HIDDEN)
def test_what_only_trial_rows_show_is_refused(tmp_path, loss):
    with pytest.raises(UnsupportedModelError, match=r"isolate_rows=True.*No step was taken"):
        fit(tmp_path, loss, insecure_seed=1)  # else, once in some hundreds, only in the second step


class EarlyExit(Module):
    """Passes over a batch whose rows are too large, which those of the data are not."""

    def training_step(self, batch, batch_idx):
        loss = ce(self.head(self.body(batch[0])), batch[1])
        return loss * 0 if batch[0].abs().mean() > 50 else loss


def test_an_exit_that_only_extreme_rows_reach_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"mixed in the loss.*No step was taken"):
        fit(tmp_path, EarlyExit())


@pytest.mark.parametrize("loss", [*BENT, *HIDDEN])
def test_each_trains_where_each_row_runs_by_itself(tmp_path, loss):
    module = Module(loss)
    assert fit(tmp_path, module, steps=2, isolate_rows=True).strategy.ledger.steps == 2
    assert set(module.rows_seen) == {1}


# ---------------------------------------------------------------- later


def from_step(step, then):
    def loss(z, y, o, m):
        return then(z, y, o, m) if m.global_step >= step else ce(z, y)

    return loss


@pytest.mark.parametrize("loss", [flooding, root, product, norm])
@pytest.mark.parametrize("step", [1, 3, 6])
def test_what_bends_the_mean_later_is_refused_in_that_step(tmp_path, loss, step):
    run = trainer(tmp_path, dp={"expected_batch_size": 16}, max_steps=12, max_epochs=-1)
    with pytest.raises(UnsupportedModelError, match="This step was not taken"):
        run.fit(Module(from_step(step, loss)), loader())
    assert run.strategy.ledger.steps == run.global_step == step


@pytest.mark.parametrize("loss", [weighed, over_itself, by_the_others_loss, sign_of_the_mean])
@pytest.mark.parametrize("step", [1, 4])
def test_a_loss_that_scales_otherwise_later_is_tried_again_in_that_step(tmp_path, loss, step):
    run = trainer(tmp_path, dp={"expected_batch_size": 16}, max_steps=12, max_epochs=-1)
    with pytest.raises(UnsupportedModelError, match=r"isolate_rows.*This step was not taken"):
        run.fit(Module(from_step(step, loss)), loader())
    assert run.strategy.ledger.steps == step


class Centred(Module):
    """Mixes rows in the forward pass from a step on, with nothing to be seen after it."""

    def training_step(self, batch, batch_idx):
        h = self.body(batch[0])
        h = h - h.detach().mean(0) if self.global_step >= 4 else h - 0.1
        return ce(self.head(h), batch[1])


def test_rows_are_tried_again_in_steps_that_are_powers_of_two(tmp_path):
    run = trainer(tmp_path, dp={"expected_batch_size": 16}, max_steps=12, max_epochs=-1)
    with pytest.raises(UnsupportedModelError, match="forward pass, before layer 'head'"):
        run.fit(Centred(), loader())
    assert run.strategy.ledger.steps == 7


class Masked(L.LightningModule):
    """Divides by the targets that count, of which the first batches leave none out."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def training_step(self, batch, batch_idx):
        ids, targets = batch
        each = ce(self.head(self.embed(ids)).transpose(1, 2), targets, reduction="none")
        counted = targets != -100
        # Before the mean over the rows, where the loss's graph and slope show nothing of it.
        return ((each * counted).sum(1) / counted.sum()).mul(len(ids)).mean()

    configure_optimizers = Module.configure_optimizers


class InOrder(Callback):
    """Has the draw of every step be of the first rows, until a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        drawn = trainer.strategy._step.drawn.chunks
        for chunk in drawn if trainer.global_step < self.step else ():
            targets = chunk.data[1]
            targets[targets == -100] = 0


def test_targets_that_are_left_out_later_have_rows_tried_again(tmp_path):
    ids = torch.randint(0, 9, (64, 6), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    targets[::3, 2:] = -100
    data = DataLoader(TensorDataset(ids, targets), batch_size=16)
    run = trainer(
        tmp_path, dp={"expected_batch_size": 16}, max_steps=12, max_epochs=-1,
        callbacks=[InOrder(5)],
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="mixed in the loss"):
        run.fit(Masked(), data)
    assert run.strategy.ledger.steps == 5


# ---------------------------------------------------------------- what must train as ever


def several(z, y, o, m):
    return ce(z, y) + 0.5 * o.square().mean() - 0.1 * o.mean() + 3


def smoothed(z, y, o, m):
    return ce(z, y, label_smoothing=0.1)


def binary(z, y, o, m):
    target = F.one_hot(y, 3).float()
    return F.binary_cross_entropy_with_logits(z, target, pos_weight=torch.tensor([1.0, 2.0, 5.0]))


def masked_by_row(z, y, o, m):
    each = z.square() * torch.tensor([1.0, 0.0, 1.0])
    return each.sum() / (2 * len(z))


def mean_of_row_means(z, y, o, m):
    mask = (z.detach() > 0).float() + 0.1
    return ((z.square() * mask).sum(1) / mask.sum(1)).mean()


def both_errors(z, y, o, m):
    target = F.one_hot(y, 3).float()
    return F.mse_loss(z, target) + F.l1_loss(z, target) + F.huber_loss(z, target)


def variational(z, y, o, m):
    mu, logvar = o[:, 0], o[:, 1]
    kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() / len(o)
    sample = mu + torch.randn_like(mu) * (logvar / 2).exp()
    return F.mse_loss(z[:, 0], sample, reduction="none").mean() + min(1, m.global_step / 3) * kl


def row_by_row(z, y, o, m):
    return sum(F.mse_loss(z[i], o[i, :1].expand(3)).sqrt() for i in range(len(z))) / len(z)


def rows_by_mask(z, y, o, m):
    places = torch.arange(len(z))
    return sum(
        (z[places == i].square().mean() + o[i[None]].sum().exp()).log() for i in places
    ) / len(z)


def rows_unbound(z, y, o, m):
    pairs = zip(z.unbind(), o.split(1), strict=True)
    return sum((a.square().mean() + b.square().mean()).sqrt() for a, b in pairs) / len(z)


def rows_of_unlike_lengths(z, y, o, m):
    kept = [2 + i % 2 for i in range(len(z))]
    mask = torch.arange(3)[None] < torch.tensor(kept)[:, None]
    return sum(part.square().mean().sqrt() for part in z[mask].split(kept)) / len(z)


def sequence_first(z, y, o, m):
    return (torch.stack([z, 2 * z]) - 1).square().mean(2).add(0.1).sqrt().mean()


def by_class(z, y, o, m):
    return sum((z[:, c] - (y == c).float()).square().add(0.1).sqrt().mean() for c in range(3))


def transposed_rows(z, y, o, m):
    return (z.square().T.sum(0) + 0.1).sqrt().mean() + (z.T.exp() + 1).log().mean()


def stacked(z, y, o, m):
    losses = torch.stack([ce(z, y), o.square().mean(), z.abs().mean()])
    return (losses * torch.tensor([1.0, 0.5, 0.1])).sum().double().view(1).squeeze()


def focal(z, y, o, m):
    each = ce(z, y, reduction="none")
    return ((1 - (-each).exp()) ** 2 * each).mean()


def roots_of_rows(z, y, o, m):
    return (z.square().mean(1) + 1e-6).sqrt().clamp(max=3).mean()


def triplet(z, y, o, m):
    return F.triplet_margin_loss(z, z.roll(1, 1), z.roll(2, 1)) + F.soft_margin_loss(
        z, F.one_hot(y, 3) * 2.0 - 1
    )


def in_numbers(z, y, o, m):
    parts = torch.zeros(2)
    parts[0] = ce(z, y)
    parts[1] += o.mean()
    return parts.sum() / 2


def as_einsum(z, y, o, m):
    return torch.einsum("bc,c->", z.square(), torch.tensor([1.0, 2.0, 3.0])) / len(z)


def divergence(z, y, o, m):
    target = F.one_hot(y, 3).float().add(0.1).div(1.3)
    return F.kl_div(z.log_softmax(1), target, reduction="batchmean")


def sequences(z, y, o, m):
    logs = z.log_softmax(1)[None].expand(4, -1, -1)
    lengths = torch.full((len(z),), 4)
    return F.ctc_loss(logs, y.clamp(min=1)[:, None], lengths, lengths // 4)


class Scaled(torch.autograd.Function):
    """The gradient reversal of domain-adversarial training."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -0.5 * grad


def reversed_gradient(z, y, o, m):
    return ce(z, y) + Scaled.apply(o.square().mean())


ORDINARY = [
    several, smoothed, binary, masked_by_row, mean_of_row_means, both_errors, variational,
    row_by_row, stacked, focal, roots_of_rows, triplet, in_numbers, as_einsum, divergence,
    sequences, reversed_gradient, rows_by_mask, rows_unbound, rows_of_unlike_lengths,
    sequence_first, by_class, transposed_rows,
]  # fmt: skip


@pytest.mark.parametrize("loss", ORDINARY, ids=lambda loss: loss.__name__)
def test_ordinary_losses_train(tmp_path, loss):
    assert fit(tmp_path, loss, steps=5).strategy.ledger.steps == 5


@pytest.mark.parametrize("isolate", [False, True])
def test_ordinary_losses_of_transformers_train(tmp_path, isolate):
    small = {"vocab_size": 11, "pad_token_id": 0}
    bert = BertForSequenceClassification(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=8, num_labels=3, **small,
        )
    )  # fmt: skip
    gpt = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0,
                   vocab_size=11)
    )  # fmt: skip

    class Wrapped(L.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            return self.model(**batch).loss

        configure_optimizers = Module.configure_optimizers

    ids = torch.randint(1, 11, (32, 6), generator=torch.Generator().manual_seed(0))
    for model, labels in ((bert, ids[:, 0] % 3), (gpt, ids)):
        data = [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]
        run = fit(
            tmp_path / type(model).__name__, Wrapped(model.train()),
            DataLoader(data, batch_size=8), steps=3, isolate_rows=isolate,
        )  # fmt: skip
        assert run.strategy.ledger.steps == 3


class Checkpointing(L.LightningModule):
    def __init__(self, reentrant):
        super().__init__()
        small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(
            intermediate_size=8, max_position_embeddings=16, num_labels=3, vocab_size=11,
            pad_token_id=0, **small,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config).train()
        with pytest.warns(FutureWarning, match="gradient_checkpointing"):
            self.model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    configure_optimizers = Module.configure_optimizers


def padded(samples):
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    labels = torch.stack([label for _, label in samples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


@pytest.mark.parametrize("reentrant", [False, True])
def test_padded_rows_train_with_dropout_in_layers_that_run_again(tmp_path, reentrant):
    data = [(torch.arange(1, 4 + i % 7), torch.tensor(i % 3)) for i in range(48)]
    module = Checkpointing(reentrant)
    run = fit(tmp_path, module, DataLoader(data, batch_size=16, collate_fn=padded), steps=2)
    assert run.strategy.ledger.steps == 2


class InPlace(Module):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch[0].sub_(0.5).div_(0.5)
        return batch


def test_a_batch_that_is_changed_in_place_trains(tmp_path):
    assert fit(tmp_path, InPlace(several), steps=5).strategy.ledger.steps == 5


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    names: list = dataclasses.field(default_factory=list, init=False)


class OfFields(Module):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch.x, batch.y), batch_idx)


def of_fields(samples):
    return Sample(*default_collate(samples))


def test_rows_of_a_dataclass_are_tried_and_train(tmp_path):
    data = loader(collate_fn=of_fields)
    assert fit(tmp_path / "a", OfFields(several), data).strategy.ledger.steps == 4
    with pytest.raises(UnsupportedModelError, match="mixed"):
        fit(tmp_path / "b", OfFields(weighed), data)


@pytest.mark.parametrize(
    ("precision", "dp"),
    [("bf16-mixed", {}), ("bf16-mixed", {"loss_scale": 2**12}), ("bf16-true", {}), ("64-true", {})],
)
def test_ordinary_losses_train_in_any_precision(tmp_path, precision, dp):
    run = trainer(tmp_path, dp={"expected_batch_size": 16, **dp}, max_steps=3, precision=precision)
    run.fit(Module(lambda z, y, o, m: ce(z.float(), y) + 0.1 * o.float().square().mean()), loader())
    assert run.strategy.ledger.steps == 3


# ---------------------------------------------------------------- each row by itself


def mixing_collate(samples):
    x, y = default_collate(samples)
    return x - x.mean(0) if len(x) > 1 else x, y


def rarely_mixing_collate(samples):
    x, y = default_collate(samples)
    return (x + x.roll(1, 0) if random.random() < 0.02 else x), y


@pytest.mark.parametrize("collate", [mixing_collate, rarely_mixing_collate])
def test_a_collate_function_sees_one_row_only_where_rows_run_by_themselves(tmp_path, collate):
    with pytest.raises(UnsupportedModelError, match=r"collate function.*isolate_rows=True"):
        fit(tmp_path / "a", lambda z, y, o, m: ce(z, y), loader(collate_fn=collate))
    run = fit(
        tmp_path / "b", lambda z, y, o, m: ce(z, y), loader(collate_fn=collate), isolate_rows=True
    )
    assert run.strategy.ledger.steps == 4


class OnTransfer(Module):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] - batch[0].mean(0) * (len(batch[0]) > 1), batch[1]


def test_a_transfer_hook_sees_one_row_only_where_rows_run_by_themselves(tmp_path):
    with pytest.raises(UnsupportedModelError, match="isolate_rows=True"):
        fit(tmp_path / "a", OnTransfer(flooding))
    fit(tmp_path / "b", OnTransfer(flooding), isolate_rows=True)


def without_noise(tmp_path, loss, **dp):
    module = Module(loss)
    quiet = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": 3}
    fit(tmp_path, module, steps=3, **quiet, **dp)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_rows_by_themselves_come_to_the_same_weights(tmp_path):
    def loss(z, y, o, m):
        return ce(z, y) + 0.1 * o.square().mean()

    together, alone = (
        without_noise(tmp_path / str(i), loss, **dp)
        for i, dp in enumerate(({}, {"isolate_rows": True}))
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_rows_by_themselves_and_several_at_once_contradict_each_other():
    with pytest.raises(ConfigError, match="isolate_rows"):
        DPConfig(
            noise_multiplier=1, delta=1e-5, max_grad_norm=1, isolate_rows=True,
            max_physical_batch_size=8,
        )  # fmt: skip


def test_a_step_that_fails_on_one_row_is_refused_where_rows_run_by_themselves(tmp_path):
    def squeezing(z, y, o, m):
        return F.nll_loss(F.log_softmax(z.squeeze(), dim=1), y)

    with pytest.raises(UnsupportedModelError, match="batch of one row"):
        fit(tmp_path, squeezing, isolate_rows=True)


def test_a_gradient_past_its_layer_is_refused_where_rows_run_by_themselves(tmp_path):
    def penalty(z, y, o, m):
        return ce(z, y) + m.head.weight.square().sum()

    with pytest.raises(UnsupportedModelError, match=r"head.weight.*does not account for"):
        fit(tmp_path, penalty, isolate_rows=True)


# ---------------------------------------------------------------- what trials leave, and cost


class Counting(Module):
    """Counts its steps, and keeps a slow copy of its weights that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.steps, self.drawn = 0, []
        self.slow = [p.detach().clone() for p in self.head.parameters()]

    def training_step(self, batch, batch_idx):
        self.steps += 1
        for mine, other in zip(self.slow, self.head.parameters(), strict=True):
            mine.lerp_(other.data, 0.1)
        return ce(self.head(self.body(batch[0])), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.drawn.append(self.steps)


def test_trials_in_later_steps_leave_nothing_behind(tmp_path, monkeypatch):
    slow = []
    for again in (True, False):
        if not again:  # the same fit without them
            monkeypatch.setattr(Repeats, "note", lambda *a, **k: False)
        module = Counting()
        quiet = {"noise_multiplier": None, "insecure_noise_off": True, "insecure_seed": 3}
        fit(tmp_path / str(again), module, steps=9, max_physical_batch_size=64, **quiet)
        assert module.drawn == list(range(1, 10))
        slow.append(module.slow[0].clone())
    assert torch.equal(*slow)


def test_trials_run_in_powers_of_two_and_else_within_their_share():
    now = 0.0
    repeats = Repeats(lambda: now)
    repeats.begin()
    net, ran = nn.Linear(4, 3), []
    for step in range(1, 2001):
        now += 0.01
        repeats.begin_step()
        x, y = rows(8).tensors
        loss = ce(net(x), y) * step  # as a penalty that grows
        graph = repeats.look(loss, 8)
        loss.backward()
        if repeats.note(graph, (x, y), rows=8, layers=[net]):
            ran.append(step)
            with repeats.again():
                now += 0.02
    assert ran[:13] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 32]
    assert {2**n for n in range(1, 11)} <= set(ran)
    assert 0.018 < len(ran) * 0.02 / now < 0.023


def test_seeds_by_which_a_coin_falls_are_found():
    seeds = Seeds()
    for high in (False, True):
        for_torch, for_python, for_numpy = seeds.extreme(high=high)
        torch.manual_seed(for_torch), random.seed(for_python), np.random.seed(for_numpy)
        first = [float(torch.rand(())), random.random(), np.random.rand()]
        assert all((value > 0.99) == high for value in first)
    assert Seeds(1).number() == Seeds(1).number() != Seeds(2).number()
    assert seeds.number() != Seeds().number()


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("loss", ORDINARY, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("count", [2, 3, 5, 7, 8])
def test_the_graph_of_an_ordinary_loss_is_linear_for_any_number_of_rows(loss, count):
    class WithStep(Module):
        global_step = 1

    module = WithStep(loss)
    assert loss_graph(module.training_step(rows(count).tensors, 0), count).fault is None


@pytest.mark.parametrize("rows", [2, 3, 4, 8])
def test_a_nonlinear_loss_of_one_row_in_a_loop_is_no_mean_of_rows(rows):
    z = torch.randn(rows, 8, requires_grad=True)  # as long as a multiple of their number
    losses = [z[i].square().mean().sqrt() for i in range(rows)]
    losses += [part.squeeze(0).exp().mean().log() for part in z.split(1)]
    losses += [part.exp().mean().log() for part in z.unbind(0)]
    assert loss_graph(sum(losses) / rows, rows).fault is None
    assert loss_graph((z * 2).square().mean().sqrt(), rows).fault == "sqrt"


def test_tokens_that_are_picked_by_a_mask_are_no_sum_over_rows():
    z = torch.randn(4, 6, 7, requires_grad=True)
    picked = (z * 1.0)[torch.arange(24).reshape(4, 6) % 5 > 0][:-1]
    each = F.cross_entropy(picked, torch.zeros(len(picked), dtype=torch.long), reduction="none")
    assert loss_graph(((1 - (-each).exp()) ** 2 * each).mean(), 4).fault is None
