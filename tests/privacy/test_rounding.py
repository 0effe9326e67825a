"""What rounding may do: norms are upper bounds, tight ones, and no row wipes out the others."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from torch import nn

from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.float32 import exact_products
from lightning_secure.privacy.gradients.formulas import (
    gram,
    gram_squares,
    grams_squares,
    linear_ghost_squares,
    rounding,
)
from lightning_secure.privacy.gradients.rules.conv import ConvUnit
from lightning_secure.privacy.gradients.rules.embedding import EmbeddingUnit
from lightning_secure.privacy.gradients.rules.layer_rule import GHOST, Record, Unit, Way
from lightning_secure.privacy.gradients.rules.linear import LinearUnit

PRODUCT = Way("product", kept=False)


def exact_squares(inputs, grads):
    return (grads.double().transpose(1, 2) @ inputs.double()).flatten(1).square().sum(1)


@pytest.mark.parametrize(
    ("time", "size_in", "size_out", "most"),
    [(16, 96, 50257, 1e-3), (96, 768, 1100, 1e-3), (7, 30, 40, 2e-5)],
)
def test_the_norm_of_a_large_layer_is_barely_enlarged(time, size_in, size_out, most):
    """Of GPT-2's head it once was by a third, and so much harder was every row clipped."""
    torch.manual_seed(0)
    inputs = torch.randn(1, time, size_in) + 0.5  # steps that are alike, as after a layer norm
    grads = torch.randn(1, time, size_out)
    excess = gram_squares(inputs, grads) / exact_squares(inputs, grads) - 1
    assert 0 < float(excess) < most


@pytest.mark.parametrize("size", [1, 5, 512, 513, 1300])
def test_the_bound_holds_for_every_entry_of_a_gram_matrix(size):
    torch.manual_seed(size)
    one = torch.randn(2, 4, size)
    other = torch.cat([-one[:, :2] + torch.randn(2, 2, size) * 1e-4, one[:, 2:]], 1)
    apart = (gram(one, other).double() - one.double() @ other.double().transpose(1, 2)).abs()
    lengths = one.double().norm(dim=2, keepdim=True) * other.double().norm(dim=2).unsqueeze(1)
    assert (apart <= rounding(size, one.dtype) * lengths).all()
    assert rounding(size, one.dtype) <= 1.01 * 2**-24 * min(size + 3, 512 + 3)


def test_the_bound_is_that_of_the_worst_entries():
    """Gram matrices as wrong as they may be, the wrong way: their sum is still no underestimate."""
    generator = torch.Generator().manual_seed(3)
    error = 1e-3
    for place in range(20):
        a = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64)
        g = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
        if place % 2:  # half of them cancel
            a[:, 3:], g[:, 3:] = -a[:, :3] * 1.01, g[:, :3]
        matrices = [x @ x.transpose(1, 2) for x in (a, g)]
        lengths = [x.norm(dim=2) for x in (a, g)]
        wrong = [
            matrix - error * length.unsqueeze(2) * length.unsqueeze(1) * other.sign()
            for matrix, length, other in zip(matrices, lengths, reversed(matrices), strict=True)
        ]
        # A bound takes lengths from the diagonal, which is off by as much.
        found = grams_squares([(*wrong, (0, 0))], *2 * [error * (1 + 2 * error)])
        assert found >= exact_squares(a, g)


@pytest.mark.parametrize("time", [None, 3])
def test_a_row_whose_squares_are_too_small_for_a_float_is_not_taken_for_nothing(time):
    shape = (1, 4096) if time is None else (1, time, 4096)
    inputs, grads = torch.full(shape, 1e-23), torch.full((*shape[:-1], 256), 5e17)
    norm = linear_ghost_squares(inputs, grads, bias=False).sqrt()
    exact = exact_squares(inputs.view(1, -1, 4096), grads.view(1, -1, 256)).sqrt()
    assert float(norm) >= float(exact) > 0.005


# ---------------------------------------------------------------- rows that wipe out others


def attacked(unit, way, inputs, grads, *, row=31):
    """Return how far a row moves the clipped sum, with a clipping norm of one."""
    sums = []
    for rows in (slice(None), torch.arange(len(inputs)) != row):
        found = {}
        record = Record(unit, inputs[rows].clone(), grads[rows].clone(), way=way)
        add_clipped_sums(found, [record], max_grad_norm=1.0)
        sums.append(found)
    moved = [(sums[0][p] - sums[1][p]).double().square().sum() for p in unit.parameters]
    return float(sum(moved).sqrt())


@pytest.mark.parametrize("way", [GHOST, PRODUCT, Way("product", kept=True)])
@pytest.mark.parametrize("hidden", ["weight", "bias"])
def test_a_linear_layers_row_that_cancels_does_not_wipe_out_the_others(way, hidden):
    """Its gradient is small, the sum's partial results are not: 1e9 - 1e9 rounds others away."""
    torch.manual_seed(0)
    unit = LinearUnit.of("layer", nn.Linear(3, 4))
    inputs, grads = torch.randn(32, 3, 3), torch.randn(32, 3, 4)
    parts = torch.tensor([1e9, -1e9, 1e-3]).view(3, 1)
    if hidden == "weight":
        inputs[-1], grads[-1] = parts, 1.0
    else:
        inputs[-1], grads[-1] = 0.0, parts
    assert attacked(unit, way, inputs, grads) <= 1.01


@pytest.mark.parametrize("form", ["grouped", "unfold", ""])
@pytest.mark.parametrize("hidden", ["weight", "bias"])
def test_a_convolutions_row_that_cancels_does_not_wipe_out_the_others(form, hidden):
    torch.manual_seed(0)
    unit = ConvUnit("layer", nn.Conv1d(2, 3, 2))
    inputs, grads = torch.randn(32, 2, 7), torch.randn(32, 3, 6)
    parts = torch.tensor([1e9, 0, 0, 0, 0, -1e9])
    if hidden == "weight":
        inputs[-1], grads[-1] = torch.tensor([1e9, 1e9, -1e9, -1e9, 0, 0, 1e-3]), 1.0
    else:
        inputs[-1], grads[-1] = 0.0, parts
    assert attacked(unit, Way(form, kept=False), inputs, grads) <= 1.01


@pytest.mark.parametrize("form", ["grouped", "unfold", ""])
def test_nor_does_it_where_channels_come_last(form):
    """A sum over rows and places at once goes from row to row there, with 1e9 in between."""
    unit = ConvUnit("layer", nn.Conv2d(2, 3, 1))
    inputs, grads = torch.zeros(32, 2, 2, 2), torch.ones(32, 3, 2, 2)
    grads[16] = torch.tensor([[1e9, 0.0], [0.0, -1e9]])
    grads = grads.contiguous(memory_format=torch.channels_last)
    assert attacked(unit, Way(form, kept=False), inputs, grads, row=16) <= 1.01


def test_a_tables_row_that_cancels_does_not_wipe_out_the_others():
    torch.manual_seed(0)
    unit = EmbeddingUnit("layer", nn.Embedding(2, 3))
    tokens, grads = torch.zeros(32, 3, dtype=torch.long), torch.randn(32, 3, 3)
    grads[-1] = torch.tensor([1e9, -1e9, 1e-3]).view(3, 1)
    assert attacked(unit, GHOST, tokens, grads) <= 1.01


# ---------------------------------------------------------------- the precision in force


@pytest.fixture
def careless():
    """Everything that trades precision for speed."""
    settings = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    settings += [torch.backends.cudnn.conv, torch.backends.mkldnn.conv]
    before = [setting.fp32_precision for setting in settings]
    torch.set_float32_matmul_precision("medium")
    settings[2].fp32_precision, settings[3].fp32_precision = "tf32", "bf16"
    careless = [setting.fp32_precision for setting in settings]
    yield settings
    assert [setting.fp32_precision for setting in settings] == careless  # put back
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value
    torch.set_float32_matmul_precision("highest")


def test_norms_and_sums_are_exact_whatever_the_model_may_round(careless, monkeypatch):
    found = []
    for kind in (LinearUnit, ConvUnit):
        for name in ("ghost_squares", "weighted_sum"):
            rule = getattr(kind, name)

            def spy(unit, *args, rule=rule, name=name):
                found.append((name, *(setting.fp32_precision for setting in careless)))
                return rule(unit, *args)

            # It does what it did, and tells under which settings.
            monkeypatch.setattr(kind, name, spy)
    # The trial of ways would choose by time, and so not always the same rules.
    monkeypatch.setattr(Unit, "ways", lambda *args: [GHOST])
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Linear(4, 2))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        model(torch.randn(3, 2, 5)).square().mean().backward()
    engine.add_chunk(3)
    assert {name for name, *_ in found} == {"ghost_squares", "weighted_sum"}
    assert {setting for _, *settings in found for setting in settings} == {"ieee"}


def test_a_backward_pass_under_autocast_does_not_round_the_norms():
    """In bfloat16 a row that cancels would seem to have whatever norm was left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    engine.units[0]._way = GHOST
    inputs = torch.randn(4, 5, 8)
    norms = []
    for enabled in (False, True):
        with engine.recording():
            loss = model(inputs).square().sum((1, 2)).mean()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss.backward()
                norms.append(engine.add_chunk(4))
                assert torch.is_autocast_enabled("cpu") == enabled
        engine.begin_step()
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)


@pytest.fixture
def settings():
    """The precision of each kind of operation; as at the start afterwards."""
    yield attrgetter("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv")
    for setting in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn):
        setting.fp32_precision = "none"
    torch.backends.mkldnn.conv.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize(
    ("place", "value"),
    [("", "tf32"), ("cuda.matmul", "tf32"), ("cudnn.conv", "ieee"), ("mkldnn.conv", "bf16")],
)
@pytest.mark.parametrize("older", ["highest", "medium"])
def test_trial_runs_are_exact_whichever_settings_of_torch_were_used(settings, place, value, older):
    """The older ones cannot be read where the newer ones say otherwise: no run could begin."""
    torch.set_float32_matmul_precision(older)
    setting = attrgetter(place)(torch.backends) if place else torch.backends
    setting.fp32_precision = value

    before, seen = [kind.fp32_precision for kind in settings(torch.backends)], []

    def loss_of(batch):
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        seen.append((*older, *(kind.fp32_precision for kind in settings(torch.backends))))
        return model(batch).square().mean()

    model = nn.Sequential(nn.Linear(3, 2))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    preflight(engine, model, loss_of, torch.randn(6, 3), size=6, backward=torch.autograd.backward)
    assert {word for words in seen for word in words} <= {"highest", False, "ieee", "none"}
    assert [kind.fp32_precision for kind in settings(torch.backends)] == before


def test_settings_come_back_after_an_error(careless):
    def fail():
        assert {setting.fp32_precision for setting in careless} == {"ieee"}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        exact_products()(fail)()
