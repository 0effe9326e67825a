"""Sums of bfloat16 products: no row is longer than the clipping norm, and little is lost."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.gradients import products
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums
from lightning_secure.privacy.gradients.clipping.layers import layer_groups
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.formulas import gram, grams_together, rounding
from lightning_secure.privacy.gradients.products import as_on_a_device
from lightning_secure.privacy.gradients.rules.conv import ConvUnit
from lightning_secure.privacy.gradients.rules.layer_rule import GHOST, Record, Way
from lightning_secure.privacy.gradients.rules.linear import LinearUnit

ROWS = 6


@contextlib.contextmanager
def by_gram_matrices():
    """As on a device, and never by gradients that are formed, which small layers take."""

    def ways(unit, inputs, grads):
        return [Way("product", kept=True) if unit.weight is None else GHOST]

    with (
        as_on_a_device(),
        mock.patch.object(LinearUnit, "ways", ways),
        mock.patch.object(ConvUnit, "ways", ways),
    ):
        yield


PLACES = {
    "processor": contextlib.nullcontext,
    "device": as_on_a_device,
    "device, by Gram matrices": by_gram_matrices,
}
everywhere = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.table(x))))


class Images(nn.Module):
    def __init__(self, *, groups=1):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 4, 3, stride=2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.layer(x))).mean(1))


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


MODELS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), (8,)),
    "over time": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)), (9, 8)),
    "transformer": (encoder, (9, 8)),
    "images": (Images, (4, 9, 9)),
    "grouped": (lambda: Images(groups=2), (4, 9, 9)),
    "tied": (Tied, None),
    "reused": (Reused, (5, 8)),
}


def network(name, seed):
    """A random network and rows, some of them extreme."""
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 ** float(torch.empty(()).uniform_(-1, 1.5))
    if shape is None:
        return model, torch.randint(0, 11, (ROWS, 7))
    x = torch.randn(ROWS, *shape)
    x[1] = x[1, :1] if x.ndim > 2 else x[1]  # steps that are all alike
    x[2] *= 1e3
    return model, x


def recorded(engine, model, x):
    with engine.recording(rows=len(x)):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        loss = out.float().flatten(1).logsumexp(1).mean()
        engine.scaled(loss, len(x)).backward()
    return engine.take(len(x))


def clipped(engine, model, x, bound, layers=None):
    sums = {}
    add_clipped_sums(sums, recorded(engine, model, x), max_grad_norm=bound, layers=layers)
    return sums


def length(sums):
    return float(torch.stack([t.double().square().sum() for t in sums.values()]).sum().sqrt())


@everywhere
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_no_row_is_longer_than_the_clipping_norm(name, place, per_layer):
    longest = 0.0
    for seed in range(12):
        model, x = network(name, seed)
        engine = GradientEngine(model, max_grad_norm=1.0)
        engine.attach()
        layers = layer_groups(engine.units, None) if per_layer else None
        for row in range(ROWS):
            for bound in (1e-3, 1.0):
                with place():
                    sums = clipped(engine, model, x[row : row + 1], bound, layers)
                longest = max(longest, length(sums) / bound)
        engine.detach()
    assert 0.5 < longest <= 1 + 1e-6


@everywhere
@pytest.mark.parametrize("name", MODELS)
def test_a_row_adds_the_same_beside_others(name, place):
    model, x = network(name, 3)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with place():
        whole = clipped(engine, model, x, 0.1)
        alone = [clipped(engine, model, x[row : row + 1], 0.1) for row in range(ROWS)]
    engine.detach()
    for parameter, total in whole.items():
        apart = sum(one[parameter] for one in alone) - total
        assert apart.norm() < 0.02 * 0.1


@everywhere
@pytest.mark.parametrize("name", MODELS)
def test_hardly_any_signal_is_lost(name, place):
    """Of the weighted gradients, against those of the same operands in float64."""
    model, x = network(name, 5)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    bound = 1e-3  # which every row exceeds
    with place():
        found = length(clipped(engine, model, x[:1], bound)) / bound
    engine.detach()
    assert 0.99 <= found <= 1 + 1e-6


#: Gradients of three steps, and what the first two multiply: they cancel, until a clip factor
#: rounds the gradients anew. The last is a feature of its own, so that the factor is just that.
CANCELLING = [
    ((1672.0, -1736.0, 0.146484375), (1.4609375, 1.40625, 1.0)),
    ((1784.0, -1704.0, 0.53515625), (1.328125, 1.390625, 1.0)),
    ((1584.0, -1632.0, 1.03125), (1.3515625, 1.3125, 1.0)),
]


@everywhere
def test_a_row_whose_steps_cancel_until_they_are_rounded_is_shortened(place):
    """Unmeasured, each would be more than three times as long as the clipping norm."""
    unit = LinearUnit.of("layer", nn.Linear(2, 1, bias=False))
    longest = 0.0
    for steps, grads in CANCELLING:
        a = torch.zeros(1, 3, 2)
        a[0, 0, 0], a[0, 1, 0], a[0, 2, 1] = steps
        g = torch.tensor(grads).view(1, 3, 1)
        sums = {}
        with place():
            record = Record(unit, a.bfloat16(), g.bfloat16())
            add_clipped_sums(sums, [record], max_grad_norm=1.0)
        longest = max(longest, length(sums))
    assert 0 < longest <= 1 + 1e-6


def test_a_rounded_sum_is_never_taken_without_its_norms():
    unit = LinearUnit.of("layer", nn.Linear(4, 2))
    record = Record(unit, torch.ones(3, 2, 4).bfloat16(), torch.ones(3, 2, 2).bfloat16(), way=GHOST)
    assert record.rounds
    with pytest.raises(PrivacyError, match="not checked"):
        record.weighted_sum(torch.ones(3))


def test_rows_that_are_not_finite_are_left_out():
    model, x = network("over time", 1)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    bad = x.clone()
    bad[4] = float("inf")
    with as_on_a_device():
        found = clipped(engine, model, bad, 1.0)
        expected = clipped(engine, model, x[torch.arange(ROWS) != 4], 1.0)
    engine.detach()
    for parameter, total in found.items():
        torch.testing.assert_close(total, expected[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [5, 512, 1300])
def test_the_rounding_of_truncating_additions_is_covered(size):
    """Added up as tensor cores may: cut off after each addition, and not rounded."""
    assert rounding(size, torch.bfloat16) == 2 * rounding(size, torch.float32)
    torch.manual_seed(size)
    one = torch.randn(1, 2, size).bfloat16()
    exact = one.double() @ one.double().transpose(1, 2)
    cut = torch.zeros(1, 2, 2)
    for k in range(size):
        exactly = cut.double() + one[:, :, k : k + 1].double() * one[:, None, :, k].double()
        rounded = exactly.float()
        too_far = rounded.double().abs() > exactly.abs()
        cut = torch.where(too_far, torch.nextafter(rounded, torch.zeros(())), rounded)
    lengths = one.double().norm(dim=2)
    bound = 1.01 * (size + 3) * products.unit_roundoff(torch.bfloat16)
    assert ((cut - exact).abs() <= bound * lengths[:, :, None] * lengths[:, None]).all()
    assert (gram(one, one) - exact).abs().max() <= rounding(
        size, torch.bfloat16
    ) * lengths.max() ** 2


@pytest.mark.parametrize(
    "way", [GHOST, *(Way(form, kept) for form in ("grouped", "unfold") for kept in (False, True))]
)
def test_a_convolutions_ways_agree(way):
    torch.manual_seed(1)
    unit = ConvUnit("layer", nn.Conv2d(4, 6, 3, padding=1, groups=2))
    inputs, grads = torch.randn(5, 4, 6, 6).bfloat16(), torch.randn(5, 6, 6, 6).bfloat16()
    wide = Record(unit, inputs.double(), grads.double(), way=Way("unfold", kept=True))
    expected = {}
    add_clipped_sums(expected, [wide], max_grad_norm=3.0)
    for place in PLACES.values():
        found = {}
        with place():
            record = Record(unit, inputs, grads, way=way)
            add_clipped_sums(found, [record], max_grad_norm=3.0)
        for parameter, total in expected.items():
            assert (found[parameter] - total).norm() < 0.01 * total.norm()
            assert found[parameter].dtype == torch.float32


@pytest.mark.parametrize("shape", [(4, 16, 32), (16, 64, 64), (64, 32, 48)])
@everywhere
def test_one_more_row_does_not_change_what_the_others_add(place, shape):
    """A way that follows the number of rows rounds all of them, or none: 600 rows moved by 1.6."""
    time, size_in, size_out = shape
    torch.manual_seed(0)
    a = torch.randn(1, time, size_in).bfloat16()
    g = torch.randn(1, time, size_out).bfloat16()

    def total(rows, *, opposed):
        inputs, grads = (x.expand(rows, -1, -1) for x in (a, g))
        if opposed:
            inputs, grads = torch.cat([inputs, a]), torch.cat([grads, -g])
        unit, sums = LinearUnit.of("layer", nn.Linear(size_in, size_out, bias=False)), {}
        record = Record(unit, inputs.contiguous(), grads.contiguous())
        add_clipped_sums(sums, [record], max_grad_norm=1.0)
        return sums[unit.weight].double()

    with place():
        for rows in (16, 64, 512, 600):
            moved = total(rows, opposed=True) - total(rows, opposed=False)
            assert float(moved.norm()) <= 1 + 1e-3


@everywhere
def test_all_ways_leave_the_same_room(place):
    """Or a long row, which decides the way of a batch, would move each clipped row by 1/256."""
    unit = LinearUnit.of("layer", nn.Linear(16, 24))
    torch.manual_seed(0)
    inputs, grads = torch.randn(1, 9, 16).bfloat16(), torch.randn(1, 9, 24).bfloat16()
    for way in (GHOST, Way("product", kept=False), Way("product", kept=True)):
        sums = {}
        with place():
            add_clipped_sums(sums, [Record(unit, inputs, grads, way=way)], max_grad_norm=1.0)
        assert length(sums) == pytest.approx(255 / 256, abs=1e-3)


def test_on_a_device_ways_follow_from_shapes(monkeypatch):
    """Where Gram matrices are larger than the weight, its gradients are formed and kept."""

    def timed(*arguments):
        raise AssertionError("to time a way is to wait for the device")

    monkeypatch.setattr(LinearUnit, "_cost", timed)
    monkeypatch.setattr(ConvUnit, "_cost", timed)
    large = LinearUnit.of("large", nn.Linear(768, 3072))
    maps = ConvUnit("maps", nn.Conv2d(64, 64, 3, padding=1))
    deep = ConvUnit("deep", nn.Conv2d(256, 256, 3, padding=1))

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    assert large.way(empty(32, 128, 768), empty(32, 128, 3072)) == GHOST
    assert maps.way(empty(32, 64, 32, 32), empty(32, 64, 32, 32)) == Way("unfold", kept=True)
    assert deep.way(empty(32, 256, 8, 8), empty(32, 256, 8, 8)) == GHOST


def test_under_autocast_a_layer_keeps_what_it_multiplied():
    model = nn.Sequential(nn.Linear(8, 4))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with by_gram_matrices():
        (record,) = recorded(engine, model, torch.randn(3, 7, 8))
    engine.detach()
    assert [item.dtype for item in record.evidence()] == 2 * [torch.bfloat16]


def test_the_branch_of_gpus_runs_on_shapes_alone():
    """``out_dtype`` is for GPUs only; tensors without content take the same way."""
    one = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta")
    other = torch.empty(2, 4, 5, dtype=torch.bfloat16, device="meta")
    found = products.product(one, other)
    assert found.dtype == torch.float32
    assert found.shape == (2, 3, 5)


@everywhere
def test_channels_that_cancel_within_a_row_do_not_round_the_others_away(place):
    torch.manual_seed(0)
    unit = ConvUnit("layer", nn.Conv2d(2, 3, 1))
    inputs, grads = torch.randn(32, 2, 2, 2), torch.randn(32, 3, 2, 2)
    inputs[31] = 0  # the bias alone
    grads[31] = torch.tensor([[2.0**30, -(2.0**30)], [2.0**-10, 0.0]])
    inputs, grads = inputs.bfloat16(), grads.bfloat16()
    sums = []
    for rows in (slice(None), slice(31)):
        found = {}
        with place():
            add_clipped_sums(found, [Record(unit, inputs[rows], grads[rows])], max_grad_norm=1.0)
        sums.append(found)
    moved = length({p: sums[0][p] - sums[1][p] for p in unit.parameters})
    assert moved <= 1 + 1e-3


def test_norms_taken_together_are_upper_bounds_of_each():
    """Layers of other widths have other errors: the largest one holds for all."""
    torch.manual_seed(0)
    found = []
    for width in (3, 500):
        a, g = torch.randn(2, 4, width).bfloat16(), torch.randn(2, 4, width).bfloat16()
        found.append(LinearUnit.of("layer", nn.Linear(width, width)).grams(a, g))
    together = grams_together(found)
    for grams, squares in zip(found, together, strict=True):
        (alone,) = grams_together([grams])
        assert (squares >= alone).all()
        torch.testing.assert_close(squares, alone, rtol=1e-3, atol=0)
