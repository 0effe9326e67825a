"""How layers come to their norms and sums: ways, memory, and attention's exchanged forward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.formulas import gram_squares
from lightning_secure.privacy.gradients.rules import layer_rule
from lightning_secure.privacy.gradients.rules.conv import ConvUnit, unfolded
from lightning_secure.privacy.gradients.rules.layer_rule import GHOST, Record, Way
from lightning_secure.privacy.gradients.rules.linear import LinearUnit


def watched(model):
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    return engine


# ---------------------------------------------------------------- ways and memory


def linear(batch, time=4):
    unit = LinearUnit.of("layer", nn.Linear(3, 5))
    return unit, torch.randn(batch, time, 3), torch.randn(batch, time, 5)


def test_large_gradients_are_neither_kept_nor_formed(monkeypatch):
    unit, inputs, grads = linear(6)
    everything = {GHOST, Way("product", kept=False), Way("product", kept=True)}
    assert set(unit.ways(inputs, grads)) == everything
    monkeypatch.setattr(layer_rule, "KEPT_BYTES", 8)
    assert set(unit.ways(inputs, grads)) == everything  # no larger than what they replace
    unit, inputs, grads = linear(6, time=1)
    assert set(unit.ways(inputs, grads)) == {GHOST, Way("product", kept=False)}
    monkeypatch.setattr(layer_rule, "FORMED_BYTES", 8)
    assert unit.ways(inputs, grads) == [GHOST]


def test_a_second_backward_through_one_call_is_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        loss = model(torch.randn(4, 3)).square().mean()
        loss.backward(retain_graph=True)
        with pytest.raises(UnsupportedModelError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("keep", [None, torch.tensor([True, False, True, True, False, True, True])])
@pytest.mark.parametrize("way", [GHOST, Way("product", kept=False), Way("product", kept=True)])
def test_pieces_of_a_batch_give_the_whole(monkeypatch, way, keep):
    unit, inputs, grads = linear(7)
    whole = Record(unit, inputs, grads, scale=7.0, way=way)

    def total(record):
        if keep is None:
            return record.weighted_sum(torch.arange(7.0))
        return record.rows(keep).weighted_sum(torch.arange(7.0)[keep])

    expected = whole.squares(), total(whole), whole.per_sample()
    # Room for two rows, so that there are several pieces.
    monkeypatch.setattr(layer_rule, "PIECE_BYTES", 2 * unit.working_bytes(inputs, grads, way))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the room grows with threads
    parts = Record(unit, inputs, grads, scale=7.0, way=way)
    torch.testing.assert_close(parts.squares(), expected[0])
    if way.kept:
        assert [len(formed[unit.weight]) for _, formed in parts._kept] == [2, 2, 2, 1]
    for p in unit.parameters:
        torch.testing.assert_close(total(parts)[p], expected[1][p], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(parts.per_sample()[p], expected[2][p])


@pytest.mark.parametrize("time", [63, 64, 65, 131])
def test_norms_from_quarters_are_those_of_the_whole(time):
    inputs = torch.randn(3, time, 4, dtype=torch.float64)
    grads = torch.randn(3, time, 5, dtype=torch.float64)
    expected = torch.einsum("bto,bti->boi", grads, inputs).flatten(1).square().sum(1)
    torch.testing.assert_close(gram_squares(inputs, grads), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [(5,), (5, 4), (3, 4, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_input_of_a_small_convolution_is_not_unfolded(monkeypatch, size, groups):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(size)]
    layer = kind(4, 6, 3, padding=1, groups=groups).double()
    unit = ConvUnit("layer", layer)
    inputs = torch.randn(3, 4, *size, dtype=torch.float64)
    grads = torch.randn_like(layer(inputs))
    expected = Record(unit, inputs, grads, way=Way("unfold", kept=True)).squares()
    # A result does not show by which way it came.
    monkeypatch.setattr("lightning_secure.privacy.gradients.rules.conv.unfolded", None)
    torch.testing.assert_close(unit.ghost_squares(inputs, grads), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("time", [2, 2000])
def test_what_is_hopeless_is_not_timed(time):
    unit = LinearUnit.of("layer", nn.Linear(600, 500))
    forms = {way.form for way in unit.ways(torch.empty(1, time, 600), torch.empty(1, time, 500))}
    assert forms == ({""} if time == 2 else {"product"})


def test_an_input_is_let_go_while_the_graph_is_still_there():
    """The graph keeps its hooks until it ends, and what they hold would be held with them."""
    model = nn.Sequential(nn.Linear(3, 2))
    engine = watched(model)
    unit = engine.units[0]
    unit._way = Way("product", kept=True)
    with engine.recording():
        inputs = torch.randn(4, 50, 3)
        storage = StorageWeakRef(inputs.untyped_storage())
        loss = model(inputs).square().mean()
        del inputs
        assert not storage.expired()
        loss.backward()
        assert storage.expired()


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_a_way_is_chosen_once_whatever_the_number_of_rows(rows, monkeypatch):
    """Norms by one way are larger than by another: one more row must not change the way of all."""
    unit, inputs, grads = linear(40)
    timed = []
    cost = unit._cost
    monkeypatch.setattr(unit, "_cost", lambda way, a, g: timed.append(len(g)) or cost(way, a, g))
    for count in (rows, 40, 1):
        unit.way(inputs[:count], grads[:count])
    assert timed == 9 * [32]  # three ways, three times each
    kept = LinearUnit.of("layer", nn.Linear(100, 90))  # as many are kept of few rows as of many
    ways = [kept.way(torch.ones(n, 2, 100), torch.ones(n, 2, 90)) for n in (1, 500)]
    assert ways == [GHOST, GHOST]


def test_what_is_not_needed_any_more_is_let_go():
    unit, inputs, grads = linear(6)
    for way, whole in ((GHOST, True), (Way("product", kept=True), False)):
        record = Record(unit, inputs, grads, way=way)
        record.release_inputs()
        assert (record.inputs is not None) == whole
        assert record.shapes == ((6, 4, 3), (6, 4, 5))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_unfolding_is_that_of_torch(dimensions):
    inputs = torch.randn(2, 3, *[7, 6, 8][:dimensions])
    kernel, stride, dilation = ([2, 3, 2][:dimensions], [2, 1, 3][:dimensions], [1, 2, 2])
    ours = unfolded(inputs, tuple(kernel), tuple(stride), tuple(dilation[:dimensions]))
    kind = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[dimensions]
    weight = torch.randn(4, 3, *kernel)
    expected = kind(inputs, weight, stride=stride, dilation=dilation[:dimensions])
    torch.testing.assert_close(weight.flatten(1) @ ours, expected.flatten(2), rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_or_bias_of_a_convolution_is_left_out():
    for name in ("weight", "bias"):
        layer = nn.Conv2d(2, 3, 3)
        getattr(layer, name).requires_grad_(False)
        unit = ConvUnit("layer", layer)
        inputs = torch.randn(4, 2, 5, 5)
        grads = torch.randn(4, 3, 3, 3)
        for way in unit.ways(inputs, grads):
            record = Record(unit, inputs, grads, way=way)
            first = Record(unit, inputs, grads, way=unit.ways(inputs, grads)[0])
            torch.testing.assert_close(record.squares(), first.squares(), rtol=1e-3, atol=0)
            assert len(record.weighted_sum(torch.ones(4))) == len(unit.parameters) == 1


def test_an_embedding_that_counts_tokens_of_the_batch_is_refused():
    model = nn.Sequential(nn.Embedding(5, 3, scale_grad_by_freq=True))
    with pytest.raises(UnsupportedModelError, match="scale_grad_by_freq"):
        GradientEngine(model, max_grad_norm=1.0)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"batch_first": True}, {"need_weights": False}),
        ({"batch_first": True}, {}),
        ({}, {"average_attn_weights": False}),
        ({"bias": False}, {"need_weights": False, "is_causal": True}),
        ({"batch_first": True}, {"is_causal": True}),
        ({"kdim": 6, "vdim": 4, "batch_first": True}, {}),
    ],
)
def test_attention_says_what_it_said_before(options, call):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **options)
    sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
    q, k, v = (torch.randn(5, 5, size) for size in sizes)
    if call.get("is_causal"):
        call["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected, weights = layer(q, k, v, **call)
    engine = watched(layer)
    out, shown = layer(q, k, v, **call)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert (shown is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(shown, weights, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(layer(q, k, v, **call)[0], expected, rtol=1e-5, atol=1e-6)
    engine.detach()
    assert "forward" not in vars(layer)


def test_attention_drops_out_as_it_did_before():
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(4, 6, 8)
    for weights in (False, True):
        engine = None
        outputs = []
        for _ in range(2):
            torch.manual_seed(3)
            outputs.append(layer(x, x, x, need_weights=weights)[0])
            engine = engine or watched(layer)
        engine.detach()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_attention_in_evaluation_is_not_taken_on_a_fast_path():
    """It would compute without the layers, and leave their parameters without a record."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)  # hooks on other layers would prevent it, too
    engine = watched(model)
    with engine.recording():
        model(torch.randn(3, 5, 8)).square().mean().backward()
    recorded = {p for record in engine.take(3) for p in record.unit.parameters}
    assert recorded == set(model.self_attn.parameters())


def test_attention_without_a_batch_is_refused():
    layer = nn.MultiheadAttention(8, 2)
    engine = watched(layer)
    with engine.recording(), pytest.raises(UnsupportedModelError, match="without a batch"):
        layer(*[torch.randn(5, 8)] * 3)


def test_a_partly_frozen_attention_trains_what_is_left():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    layer.in_proj_weight.requires_grad_(False)
    layer.out_proj.bias.requires_grad_(False)
    x = torch.randn(4, 5, 8)
    layer(x, x, x)[0].square().mean().backward()
    expected = {p: p.grad for p in layer.parameters() if p.requires_grad}
    engine = watched(layer)
    with engine.recording():
        layer(x, x, x)[0].square().mean().backward()
    for record in engine.take(4):
        for parameter, total in record.weighted_sum(torch.full((4,), 0.25)).items():
            torch.testing.assert_close(total, expected.pop(parameter), rtol=1e-4, atol=1e-6)
    assert not expected


def test_a_copy_of_a_watched_attention_works_by_itself():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 5, 8)
    engine = watched(nn.Sequential(layer))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not other(x, x, x)[0].any()
        assert layer(x, x, x)[0].any()
    engine.detach()
