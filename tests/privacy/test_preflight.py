from __future__ import annotations

import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.batch_rows import recombined
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.gradients.engine import GradientEngine

SIZE = 12


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SIZE, 6, generator=generator)
    return x, torch.randint(0, 3, (SIZE,), generator=generator)


def check(model, loss, data=None, size=SIZE):
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    try:
        preflight(
            engine,
            model,
            lambda b: loss(model, b),
            data or batch(),
            size=size,
            backward=torch.autograd.backward,
        )
    finally:
        engine.detach()


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


# ---------------------------------------------------------------- what passes


class Dropping(Net):
    def forward(self, x):
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.4))


@pytest.mark.parametrize("size", [1, 2, 5, SIZE])
@pytest.mark.parametrize("kind", [Net, Dropping])
def test_an_ordinary_model_passes(kind, size):
    x, y = batch()
    check(kind(), cross_entropy, (x[:size], y[:size]), size)


def hinge(model, batch):
    x, y = batch
    return F.multi_margin_loss(model(x), y)


def fitted(size):
    """A model and rows that it fits, so that no row has a gradient of a hinge or a softmax."""
    x, y = batch()
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.a.weight.normal_()
        model.b.weight.normal_()
        model.b.bias.copy_(1e4 * F.one_hot(y[0], 3))
    return model, (x[:size], y[:1].repeat(size))


@pytest.mark.parametrize("size", [1, SIZE])
@pytest.mark.parametrize("loss", [hinge, cross_entropy])
def test_a_model_that_fits_its_first_rows_passes_and_keeps_its_weights(loss, size):
    model, data = fitted(size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss(model, data).backward()
    assert not any(p.grad.any() for p in model.parameters())
    model.zero_grad(set_to_none=True)

    check(model, loss, data, size)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_reused_and_tied_layers_pass():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(8, 3)
            self.c.weight = self.b.weight

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) + self.c(h * h)

    check(Tied(), cross_entropy)


def test_token_models_pass_also_on_one_row():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9)

        def forward(self, x):
            return self.head(self.embed(x))

    def loss(model, batch):
        return F.cross_entropy(model(batch["ids"]).transpose(1, 2), batch["ids"])

    for rows in (1, 4):
        ids = torch.randint(0, 9, (rows, 7), generator=torch.Generator().manual_seed(1))
        check(Tokens(), loss, {"ids": ids}, rows)


def test_a_weighted_mean_by_a_constant_passes():
    check(Net(), lambda m, b: 0.01 * cross_entropy(m, b))


# ---------------------------------------------------------------- what does not


def contrastive(model, batch):
    z = F.normalize(model(batch[0]))
    return F.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def root_of_the_mean(model, batch):
    return cross_entropy(model, batch).sqrt()


def class_balanced(model, batch):
    x, y = batch
    weights = 1.0 / torch.bincount(y, minlength=3).clamp(min=1)
    return F.cross_entropy(model(x), y, weight=weights)


def largest_only(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none").max()


def batch_centred(model, batch):
    x, y = batch
    return F.cross_entropy(model.b(model.a(x) - model.a(x).mean(0)), y)


def batch_attention(model, batch):
    x, y = batch
    h = model.a(x)
    return F.cross_entropy(model.b(torch.softmax(h @ h.T, -1) @ h), y)


@pytest.mark.parametrize("loss", [contrastive, root_of_the_mean, class_balanced, largest_only])
def test_a_loss_that_mixes_rows_is_refused_as_such(loss):
    with pytest.raises(UnsupportedModelError, match="mixed in the loss, after layer 'b'"):
        check(Net(), loss)


@pytest.mark.parametrize("loss", [batch_centred, batch_attention])
def test_a_forward_pass_that_mixes_rows_is_refused_with_the_layer(loss):
    with pytest.raises(UnsupportedModelError, match="before layer 'b'"):
        check(Net(), loss)


@pytest.mark.parametrize("term", ["a", "b"])
def test_of_several_terms_the_one_at_fault_is_told_by_its_layer(term):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def loss(model, batch):
        x, y = batch
        kind = {"a": "mean", "b": "mean", term: "sum"}
        return sum(F.cross_entropy(getattr(model, n)(x), y, reduction=r) for n, r in kind.items())

    with pytest.raises(UnsupportedModelError, match=f"at layer '{term}'"):
        check(Two(), loss)


def test_a_sum_is_refused():
    def total(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="sum")

    with pytest.raises(UnsupportedModelError, match="is a sum over the batch"):
        check(Net(), total)


class Kinked(nn.Module):
    """Rounds one activation to either side of its kink, by the size of the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(400, 400, bias=False), nn.Linear(400, 3)
        nn.init.eye_(self.a.weight)
        with torch.no_grad():
            self.b.weight[:, 0] *= 0.1

    def forward(self, x):
        return self.b(F.relu(self.a(x) + (1e-7 if len(x) < 5 else -1e-7)))


def at_the_kink(*places):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SIZE, 400, generator=generator)
    x[list(places), 0] = 0
    return x, torch.randint(0, 3, (SIZE,), generator=generator)


def test_an_activation_that_rounding_moves_over_its_kink_is_no_dependence_on_the_size():
    torch.manual_seed(0)
    for first in range(0, SIZE, 3):
        check(Kinked(), cross_entropy, at_the_kink(first, first + 1, first + 2))


def test_a_little_that_depends_on_the_size_in_every_draw_is_refused():
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match=r"not a mean.* at layer 'a'"):
        check(Kinked(), cross_entropy, at_the_kink(*range(SIZE)))


def test_a_factor_of_rows_is_refused_though_few_rows_have_it():
    def loss(model, batch):
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return torch.where(x[:, 0] == 0, losses * len(x), losses).mean()

    x, y = at_the_kink(0, 1, 2)
    for seed in range(3):
        torch.manual_seed(seed)
        with pytest.raises(UnsupportedModelError, match="grows with its rows"):
            check(Net(), loss, (x[:, :6], y))


@pytest.mark.parametrize(
    ("loss", "parameter"),
    [
        (lambda m, b: cross_entropy(m, b) + 0.1 * m.a.weight.square().sum(), "a.weight"),
        (lambda m, b: cross_entropy(m, b) + 0.1 * F.linear(b[0], m.a.weight).mean(), "a.weight"),
        (lambda m, b: cross_entropy(m, b) + m.b.bias.mean(), "b.bias"),
    ],
)
def test_a_gradient_past_its_layer_is_refused_with_the_parameter(loss, parameter):
    with pytest.raises(UnsupportedModelError, match=f"'{parameter}'.*weight_decay"):
        check(Net(), loss)


def test_a_gradient_penalty_is_refused():
    """Its inner backward runs through the same hooks."""

    def penalised(model, batch):
        x = batch[0].clone().requires_grad_()
        out = model(x).sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return cross_entropy(model, batch) + slope.square().sum(1).mean()

    with pytest.raises(UnsupportedModelError):
        check(Net(), penalised)


def test_an_option_that_the_rules_do_not_know_is_refused():
    class Circular(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 2, 3, padding=1, padding_mode="circular")

        def forward(self, x):
            return self.conv(x[:, None]).mean(2)

    model = Circular()
    with pytest.raises(UnsupportedModelError, match="padding_mode"):
        check(model, lambda m, b: F.cross_entropy(m(b[0]), b[1] % 2))


def test_statistics_in_a_buffer_are_refused():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(6))

        def forward(self, x):
            self.running_mean.mul_(0.9).add_(0.1 * x.mean(0))
            return super().forward(x)

    model = Counting()
    with pytest.raises(UnsupportedModelError, match="'running_mean'"):
        check(model, cross_entropy)
    assert not model.running_mean.any()


def test_a_loss_without_the_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="does not depend"):
        check(Net(), lambda m, b: b[0].mean())


def test_a_loss_without_the_batch_is_refused():
    with pytest.raises(UnsupportedModelError, match="nothing could be checked"):
        check(Net(), lambda m, b: m(torch.ones_like(b[0])).mean())


@pytest.mark.parametrize("loss", [hinge, cross_entropy])
def test_rows_that_meet_are_seen_in_a_model_that_fits_its_first_rows(loss):
    def centred(model, batch):
        x, y = batch
        return loss(lambda rows: model(rows - rows.mean(0)), (x, y))

    model, data = fitted(SIZE)
    with pytest.raises(UnsupportedModelError, match="rows are mixed in the forward pass"):
        check(model, centred, data)


def test_gradients_that_are_not_finite_cannot_be_checked():
    with pytest.raises(UnsupportedModelError, match="not finite"):
        check(Net(), lambda m, b: (m(b[0]) - 1e9).log().mean())


def test_a_step_that_fails_on_one_row_is_refused_before_it_meets_one():
    def squeezing(model, batch):
        x, y = batch
        return F.nll_loss(F.log_softmax(model(x).squeeze(), dim=1), y)

    with pytest.raises(UnsupportedModelError, match="batch of one row") as caught:
        check(Net(), squeezing)
    assert isinstance(caught.value.__cause__, IndexError)


def test_layers_that_depend_on_other_rows_are_refused():
    def gated(model, batch):
        x, y = batch
        h = torch.tanh(model.a(x))
        return F.cross_entropy(model.b(h) + (model.b(-h) if x[-1, 0] > x[0, 0] else 0), y)

    def try_all():
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(SIZE, 6, generator=generator)
            check(Net(), gated, (x, batch()[1]))

    with pytest.raises(UnsupportedModelError, match=r"other layers|one row's gradient"):
        try_all()


def test_a_batch_without_rows_is_refused():
    class Opaque:
        pass

    with pytest.raises(UnsupportedModelError, match="Opaque"):
        check(Net(), lambda m, b: m(torch.ones(1, 6)).mean(), Opaque())


# ---------------------------------------------------------------- what is left behind


class Collecting(Net):
    """A model whose training step counts, collects and measures."""

    def __init__(self):
        super().__init__()
        self.steps = 0
        self.losses = []
        self.by_name = {"a": 1}
        self.names = {"x"}
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.kept = torch.zeros(3)
        self.register_buffer("constant", torch.ones(2))

    def forward(self, x):
        self.steps += 1
        self.losses.append(float(x.sum()))
        self.by_name["b"] = 2
        self.names.add("y")
        self.kept += 1
        out = super().forward(x)
        self.accuracy(out, torch.zeros(len(x), dtype=torch.long))
        return out


def test_nothing_is_left_behind():
    model = Collecting()
    losses = model.losses
    model.a.weight.grad = torch.ones_like(model.a.weight)
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)
    expected = torch.rand(1), np.random.rand(), random.random()
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(7)

    def noisy(m, b):
        random.random(), np.random.rand()
        return cross_entropy(m, b)

    check(model, noisy)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert (model.steps, model.by_name, model.names) == (0, {"a": 1}, {"x"})
    assert model.losses is losses
    assert losses == []
    assert not model.kept.any()
    assert model.accuracy._update_count == 0
    assert torch.equal(model.a.weight.grad, torch.ones_like(model.a.weight))
    assert model.b.weight.grad is None
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_refused_leaves_nothing_behind_either():
    model = Collecting()
    with pytest.raises(UnsupportedModelError):
        check(model, lambda m, b: cross_entropy(m, b).sqrt())
    assert model.steps == 0
    assert model.losses == []


# ---------------------------------------------------------------- trial rows

Point = namedtuple("Point", "x y")


def test_trial_rows_keep_the_batchs_form_and_its_values():
    x, y = batch()
    names = [f"n{i}" for i in range(SIZE)]
    data = {
        "pair": (x, [y, names]),
        "point": Point(x.double(), y),
        "user": UserDict(mask=y > 0),
        "scalar": torch.tensor(3.0),
        "config": "text",
        "number": 5,
        "other": torch.ones(SIZE + 1),
    }
    made = recombined(data, SIZE, 4, torch.Generator().manual_seed(0))
    assert made["pair"][0].shape == (4, 6)
    assert isinstance(made["pair"], tuple)
    assert isinstance(made["point"], Point)
    assert isinstance(made["user"], UserDict)
    assert made["point"].x.dtype == torch.float64
    assert set(made["pair"][1][1]) <= set(names)
    assert len(made["pair"][1][1]) == 4
    assert set(made["pair"][1][0].tolist()) <= set(y.tolist())
    for column in range(6):  # each value from the same place in some row
        assert set(made["pair"][0][:, column].tolist()) <= set(x[:, column].tolist())
    assert made["scalar"] is data["scalar"]
    assert made["other"] is data["other"]
    assert (made["config"], made["number"]) == ("text", 5)


def test_a_rare_class_is_as_likely_as_any_other_in_trial_rows():
    classes = torch.zeros(100, dtype=torch.long)
    classes[40] = 7
    (made,) = recombined((classes,), 100, 200, torch.Generator().manual_seed(0))
    assert 60 < int((made == 7).sum()) < 140


def test_of_one_row_trial_rows_differ_nevertheless():
    x, tokens = torch.ones(1, 6), torch.arange(8)[None]
    made, ids = recombined((x, tokens), 1, 4, torch.Generator().manual_seed(0))
    assert made.unique().numel() > 1
    assert set(ids.flatten().tolist()) <= set(range(8))
    shifted, _ = recombined((x * 0, tokens), 1, 4, torch.Generator().manual_seed(0), jitter=2)
    assert shifted.any()
