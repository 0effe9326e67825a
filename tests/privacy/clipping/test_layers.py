"""Clipping by layers, against gradients by ``torch.func`` and against rows that attack it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.clipping.layers import LayerGroups
from lightning_secure.privacy.gradients.clipping.rules import PerLayerClipping
from lightning_secure.privacy.gradients.engine import GradientEngine

BATCH = 6


class Net(nn.Module):
    """A layer that is used twice, two that share a weight, and others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 5)
        self.pair = nn.ModuleDict({"left": nn.Linear(5, 4), "right": nn.Linear(5, 4)})
        self.pair["right"].weight = self.pair["left"].weight
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.first(torch.tanh(self.first(x)))
        return self.head(self.norm(self.pair["left"](x) + torch.sin(self.pair["right"](x))))


LAYERS = ("first", "pair", "norm", "head")
PARTS = {"first": 1.0, "pair": 2.0, "norm": 2.0, "head": 4.0}  # as long as 5 together


def loss(output):
    return output.square().sum(1)


def clipped(model, x, *, parts=None, bound):
    """Return the clipped sum by parameter name, as the engine has it."""
    clipping = PerLayerClipping(parts=parts)
    engine = GradientEngine(model, max_grad_norm=bound, clipping=clipping)
    engine.attach()
    try:
        engine.begin_step()
        with engine.recording():
            loss(model(x)).mean().backward()
        engine.add_chunk(len(x))
        return {name: engine._sums[p] for name, p in model.named_parameters()}
    finally:
        engine.detach()


def by_sample(model, x):
    def of_one(parameters, row):
        return loss(functional_call(model, parameters, (row[None],)))[0]

    return vmap(grad(of_one), (None, 0))({n: p.detach() for n, p in model.named_parameters()}, x)


def rows(scale=1.0):
    return scale * torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(0))


def of(layer, gradients):
    return [item for name, item in gradients.items() if name.startswith(layer)]


def length(gradients):
    return math.sqrt(sum(float(item.double().square().sum()) for item in gradients))


@pytest.mark.parametrize("parts", [None, PARTS])
@pytest.mark.parametrize("bound", [0.5, 20.0])
def test_each_layer_is_clipped_to_its_share(parts, bound):
    model, x = Net().double(), rows().double()
    grads, found = by_sample(model, x), clipped(model, x, parts=parts, bound=bound)
    for layer in LAYERS:
        share = bound / 2 if parts is None else bound * parts[layer] / 5
        squares = sum(item.flatten(1).square().sum(1) for item in of(layer, grads))
        factors = (share / squares.sqrt()).clamp(max=1)
        for name, item in grads.items():
            if name.startswith(layer):
                torch.testing.assert_close(
                    found[name], torch.einsum("b,b...->...", factors, item), rtol=1e-9, atol=1e-12
                )


@pytest.mark.parametrize("parts", [None, PARTS])
def test_no_row_moves_the_sum_by_more_than_the_bound(parts):
    model, bound = Net(), 0.7
    for scale in (1e-6, 1e-2, 1.0, 1e2, 1e6):
        for row in rows(scale).split(1):
            moved = clipped(model, row, parts=parts, bound=bound)
            assert length(moved.values()) <= bound * (1 + 1e-5)
            for layer in LAYERS:
                share = 0.5 if parts is None else parts[layer] / 5
                assert length(of(layer, moved)) <= bound * share * (1 + 1e-5)
    # And the bound is not given away: a row that is long in every layer takes all of it.
    assert length(clipped(model, rows()[:1], parts=parts, bound=0.01).values()) == pytest.approx(
        0.01, rel=1e-4
    )


def test_a_row_that_overflows_in_one_layer_is_left_out_of_all():
    model, x = Net(), rows()
    broken = torch.cat([x, torch.full((1, 5), torch.inf)])
    sums, without = clipped(model, broken, bound=1.0), clipped(model, x, bound=1.0)
    for name, total in without.items():
        torch.testing.assert_close(sums[name], total, rtol=1e-5, atol=1e-6)


@given(
    squares=st.lists(st.floats(0, 1e12), min_size=1, max_size=5),
    shares=st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5),
    bound=st.floats(1e-3, 1e3),
)
def test_whatever_the_norms_the_whole_is_bounded(squares, shares, bound):
    parameters = [nn.Parameter(torch.zeros(())) for _ in squares]
    shares = shares[: len(squares)]
    whole = math.hypot(*shares)
    groups = LayerGroups(
        names=tuple(map(str, range(len(squares)))),
        shares=tuple(share / whole for share in shares),
        group_of={p: index for index, p in enumerate(parameters)},
    )
    pairs = [
        (p, torch.tensor([s], dtype=torch.float64))
        for p, s in zip(parameters, squares, strict=True)
    ]
    factors = groups.factors(pairs, max_grad_norm=bound)
    left = sum(float(factors[p] ** 2 * square) for p, square in pairs)
    assert left <= bound**2 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"first": 1.0, "pair": 1.0, "norm": 1.0}, "no part for layer 'head'"),
        ({**PARTS, "hed": 1.0}, "a part for 'hed'"),
        ({**PARTS, "first.weight": 1.0}, "a part for 'first.weight'"),
        ({**PARTS, "pair.left": 1.0}, "'pair.left' and 'pair' share a parameter"),
        ({"f": 1.0, **PARTS}, "a part for 'f'"),
    ],
)
def test_parts_that_do_not_fit_the_model_are_refused(parts, message):
    with pytest.raises(UnsupportedModelError, match=message):
        GradientEngine(Net(), max_grad_norm=1.0, clipping=PerLayerClipping(parts=parts))


def test_frozen_layers_need_no_part():
    model = Net()
    model.head.requires_grad_(False)
    parts = {name: part for name, part in PARTS.items() if name != "head"}
    engine = GradientEngine(model, max_grad_norm=1.0, clipping=PerLayerClipping(parts=parts))
    assert sum(share**2 for share in engine._layers.shares) == pytest.approx(1)
