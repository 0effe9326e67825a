"""Per-sample norms and clipped sums against ``torch.func.vmap(grad)``."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_secure.errors import ConfigError, UnsupportedModelError
from lightning_secure.privacy.gradients.clipped_sums import per_sample_norms
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.formulas import (
    clip_factor,
    linear_ghost_squares,
    linear_per_sample,
    linear_weighted_sum,
)
from lightning_secure.privacy.gradients.rules.find_units import find_units
from lightning_secure.privacy.gradients.rules.layer_rule import Record
from lightning_secure.privacy.noise.gaussian import GaussianNoise

BATCH = 6


class Scale(nn.Module):
    """A layer that nobody has a rule for."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.inner = nn.Linear(size, size)

    def forward(self, x):
        return self.inner(x) * self.weight


class Reused(nn.Module):
    """One layer used twice, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 4)
        self.c = nn.Linear(5, 4)
        self.c.weight = self.b.weight

    def forward(self, x):
        x = self.a(torch.tanh(self.a(x)))
        return self.b(x) + self.c(torch.sin(x))


class Tokens(nn.Module):
    """An embedding with padding, layers over time, and a norm."""

    def __init__(self, tie=False):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8, bias=False)
        self.head = nn.Linear(8, 11)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x).mean(1)


class Attention(nn.Module):
    """Self-attention, or attention to a memory, in any of its forms."""

    def __init__(self, *, memory=None, batch_first=True, weights=False, masked=False, **options):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.out = nn.Linear(8, 3)
        self.memory, self.batch_first, self.weights, self.masked = (
            memory,
            batch_first,
            weights,
            masked,
        )

    def forward(self, x):
        y = x if self.memory is None else torch.sin(x[:, :3, : self.memory])
        z = y if self.memory is None else y * 2
        padding = None
        mask = None
        if self.masked:
            padding = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
            padding = padding.index_fill(1, torch.tensor([4]), True)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(2)
            if self.masked == "float":
                padding = torch.zeros(len(x), x.shape[1], dtype=x.dtype).masked_fill(
                    padding, float("-inf")
                )
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, -1.5)
        items = (x, y, z) if self.memory is not None else (x, x, x)
        if not self.batch_first:
            first = items[0].transpose(0, 1)
            items = (first,) * 3 if self.memory is None else [i.transpose(0, 1) for i in items]
        out, _ = self.attend(
            *items, need_weights=self.weights, key_padding_mask=padding, attn_mask=mask
        )
        return self.out(out if self.batch_first else out.transpose(0, 1)).mean(1)


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))


def volumes():
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(2, 1, 1)),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def signals():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2),
        nn.RMSNorm(7),
        nn.Tanh(),
        nn.Conv1d(6, 2, 5, bias=False),
        nn.Flatten(),
    )


def conv(in_place):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=in_place),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 2, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


def partly_frozen():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def floats(*shape):
    return lambda: torch.randn(BATCH, *shape)


def tokens():
    return torch.randint(0, 11, (BATCH, 7))


ZOO = {
    "linear": (lambda: nn.Linear(5, 3), floats(5)),
    "mlp, in place": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False)),
        floats(5),
    ),
    "in place over time": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True),
            nn.Linear(4, 3), nn.Flatten(),
        ),
        floats(3, 5),
    ),
    "linear over time": (
        lambda: nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 30), nn.Flatten()),
        floats(3, 5),
    ),
    "linear over long time": (
        lambda: nn.Sequential(nn.Linear(5, 2), nn.Flatten()),
        floats(30, 5),
    ),
    "linear over two dimensions": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2), nn.Flatten()),
        floats(2, 3, 5),
    ),
    "convolutions": (lambda: conv(in_place=False), floats(1, 8, 8)),
    "embedding and norm": (Tokens, tokens),
    "tied embedding": (lambda: Tokens(tie=True), tokens),
    "reused layers": (Reused, floats(5)),
    "self-attention": (Attention, floats(5, 8)),
    "self-attention with weights and masks": (
        lambda: Attention(weights=True, masked="float", batch_first=False),
        floats(5, 8),
    ),
    "self-attention with masks": (lambda: Attention(masked="bool"), floats(5, 8)),
    "attention to a memory": (lambda: Attention(memory=8), floats(5, 8)),
    "attention to a memory of another size": (
        lambda: Attention(memory=6, kdim=6, vdim=6, bias=False),
        floats(5, 8),
    ),
    "attention with one bias for three weights": (
        lambda: Attention(memory=6, kdim=6, vdim=6, batch_first=False),
        floats(5, 8),
    ),
    "transformer layer": (encoder, floats(5, 8)),
    "volumes": (lambda: lazily(volumes(), (2, 4, 5, 4)), floats(2, 4, 5, 4)),
    "signals": (signals, floats(4, 7)),
    "a layer of the user's": (
        lambda: nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Linear(4, 3)),
        floats(5),
    ),
    "partly frozen": (partly_frozen, floats(5)),
    "bias over time only": (lambda: frozen_weight(), floats(4, 5)),
}  # fmt: skip


def lazily(model, shape):
    model(torch.zeros(1, *shape))
    return model


def frozen_weight():
    model = nn.Sequential(nn.Linear(5, 3), nn.Flatten())
    model[0].weight.requires_grad_(False)
    return model


def build(name, seed=0):
    torch.manual_seed(seed)
    make, inputs = ZOO[name]
    return make(), inputs()


def loss_of(model, x):
    out = model(x)
    return (out.sin() * torch.arange(1.0, out.shape[1] + 1)).sum(1).mean()


def reference(model, x):
    """Each sample's gradient by parameter, by functorch."""
    # functorch cannot change in place what it vectorises.
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, sample):
        return loss_of(lambda x: functional_call(model, values, (x,)), sample[None])

    # functorch has no rule for the fast kernels of attention.
    with sdpa_kernel(SDPBackend.MATH):
        grads = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    if isinstance(model, Tokens):
        grads["embed.weight"] = _without_padding(model, x, grads["embed.weight"])
    return grads


def _without_padding(model, x, grads):
    # vmap's embedding knows nothing of padding_idx; of a tied weight the head's part stays.
    plain = []
    for sample in x:
        model.zero_grad()
        loss_of(model, sample[None]).backward()
        plain.append(model.embed.weight.grad.clone())
    return torch.stack(plain)


def recorded(engine, model, x):
    with engine.recording():
        loss_of(model, x).backward()
    return engine.take(len(x))


@pytest.mark.parametrize("name", ZOO)
def test_norms_are_those_of_functorch(name):
    model, x = build(name)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    norms = per_sample_norms(recorded(engine, model, x))
    engine.detach()
    expected = sum(g.flatten(1).square().sum(1) for g in reference(model, x).values()).sqrt()
    torch.testing.assert_close(norms, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
def test_norms_and_sums_are_exact_by_every_way(name):
    model, x = build(name)
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    expected = reference(model, x)
    model.zero_grad()
    norms = sum(g.flatten(1).square().sum(1) for g in expected.values()).sqrt()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording(whole=True):
        loss_of(model, x).backward()
    records = engine.take(len(x))
    engine.detach()
    torch.testing.assert_close(per_sample_norms(records), norms, rtol=1e-9, atol=1e-12)
    weights = torch.rand(len(x), dtype=torch.float64)
    keep = torch.arange(len(x)) != 2
    tried = 0
    for record in records:
        inputs, grads = record.evidence()
        exact = [
            Record(record.unit, inputs, grads, scale=len(x), way=way)
            for way in record.unit.ways(inputs, grads)
        ]
        first = exact[0]
        sums, kept = first.weighted_sum(weights), first.rows(keep).weighted_sum(weights[keep])
        for other in exact:
            torch.testing.assert_close(other.squares(), first.squares(), rtol=1e-9, atol=1e-18)
            for p, total in other.weighted_sum(weights).items():
                torch.testing.assert_close(total, sums[p], rtol=1e-9, atol=1e-12)
            for p, total in other.rows(keep).weighted_sum(weights[keep]).items():
                torch.testing.assert_close(total, kept[p], rtol=1e-9, atol=1e-12)
            tried += 1
    assert tried >= len(records)


@pytest.mark.parametrize("bound", [0.05, 1.0, 1e4])
@pytest.mark.parametrize("name", ZOO)
def test_clipped_means_are_those_of_functorch(name, bound):
    model, x = build(name, seed=1)
    engine = GradientEngine(model, max_grad_norm=bound)
    engine.attach()
    engine.begin_step()
    with engine.recording():
        loss_of(model, x).backward()
    engine.add_chunk(len(x))
    engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=10)
    ours = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    frozen = [p.grad for p in model.parameters() if not p.requires_grad]
    engine.detach()
    model.zero_grad()
    grads = reference(model, x)
    norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
    factors = (bound / norms).clamp(max=1)
    for parameter, g in grads.items():
        expected = torch.einsum("b,b...->...", factors, g) / 10
        torch.testing.assert_close(ours[parameter], expected, rtol=1e-4, atol=1e-6)
    assert all(grad is None for grad in frozen)


def test_without_clipping_the_sum_is_autograds_to_the_last_bit_or_nearly():
    model, x = build("mlp, in place")
    loss_of(model, x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    engine = GradientEngine(model, max_grad_norm=1e6)
    engine.attach()
    with engine.recording():
        loss_of(model, x).backward()
    engine.add_chunk(BATCH)
    engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=BATCH)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


def test_chunks_add_up_to_the_whole():
    def released(*parts):
        model, x = build("convolutions", seed=4)
        engine = GradientEngine(model, max_grad_norm=0.3)
        engine.attach()
        engine.begin_step()
        for part in parts:
            with engine.recording():
                loss_of(model, x[part]).backward()
            engine.add_chunk(len(x[part]))
        engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=1)
        return [p.grad for p in model.parameters()]

    whole = released(slice(None))
    split = released(slice(0, 1), slice(1, 4), slice(4, None))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["mlp, in place", "convolutions", "reused layers", "embedding and norm"]
)
def test_one_sample_moves_the_sum_by_no_more_than_the_bound(name):
    """Sensitivity, which is what the noise is measured against."""
    bound = 0.1

    def released(x):
        model, _ = build(name, seed=2)
        engine = GradientEngine(model, max_grad_norm=bound)
        engine.attach()
        with engine.recording():
            loss_of(model, x).backward()
        engine.add_chunk(len(x))
        engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=1)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    _, x = build(name, seed=2)
    huge = x * 1000 if x.is_floating_point() else x
    moved = released(huge) - released(huge[:-1])
    assert 0 < moved.norm() <= bound * (1 + 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mlp, in place", "convolutions", "reused layers"])
def test_a_sample_that_overflows_is_left_out_and_takes_nothing_with_it(name, bad):
    def released(x):
        model, _ = build(name, seed=3)
        engine = GradientEngine(model, max_grad_norm=0.5)
        engine.attach()
        with engine.recording():
            loss_of(model, x).backward()
        engine.add_chunk(len(x))
        engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=1)
        return [p.grad for p in model.parameters()]

    _, x = build(name, seed=3)
    spoilt = x.clone()
    spoilt[2] = bad
    without = torch.cat([x[:2], x[3:]])
    for a, b in zip(released(spoilt), released(without), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_noise_has_the_promised_width_and_reaches_every_parameter():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    engine = GradientEngine(model, max_grad_norm=2.0)
    engine.begin_step()
    engine.release(GaussianNoise(seed=5), noise_multiplier=3.0, expected_batch_size=4)
    for parameter in model.parameters():
        assert 0.7 < float(parameter.grad.std()) / (3.0 * 2.0 / 4) < 1.3
    assert 0.98 < float(model[0].weight.grad.std()) / 1.5 < 1.02


def test_nothing_of_a_step_is_left_for_the_next():
    model, x = build("linear")
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        loss_of(model, x).backward()
    engine.add_chunk(BATCH)
    engine.begin_step()
    engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=1)
    assert not any(p.grad.any() for p in model.parameters())


def test_recording_leaves_parameters_as_they_were():
    model, x = build("partly frozen")
    before = [p.requires_grad for p in model.parameters()]
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()

    def fail():
        with engine.recording():
            assert [p.requires_grad for p in model.parameters()] == before
            model[4].register_forward_hook(lambda *_: 1 / 0)
            model(x)

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.requires_grad for p in model.parameters()] == before
    model[4]._forward_hooks.popitem()
    loss_of(model, x).backward()  # outside of the block everything is as usual
    assert model[4].weight.grad is not None


@pytest.mark.parametrize("name", ["mlp, in place", "convolutions"])
def test_autograd_computes_no_gradient_of_a_weight(name):
    model, x = build(name)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    leaves = set()

    def walk(node):
        if node is not None and node not in leaves:
            leaves.add(node)
            for following, _ in node.next_functions:
                walk(following)

    with engine.recording():
        walk(loss_of(model, x).grad_fn)
    weights = {id(p) for p in model.parameters()}
    assert not any(id(getattr(node, "variable", None)) in weights for node in leaves)


def test_no_gradient_past_a_layer_is_shown_to_a_hook_or_kept():
    model, x = build("linear")
    weight, shown = next(model.parameters()), []
    weight.register_hook(lambda grad: shown.append(grad.clone()))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        (loss_of(model, x) + weight.square().sum()).backward()
    assert not weight.grad.any()
    assert not any(grad.any() for grad in shown)
    engine.detach()
    (loss_of(model, x) + weight.square().sum()).backward()
    assert weight.grad.any()


def test_complex_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.cfloat))
    with pytest.raises(UnsupportedModelError, match=r"'1\.weight' is complex"):
        GradientEngine(model, max_grad_norm=1.0)
    model[1].requires_grad_(False)
    GradientEngine(model, max_grad_norm=1.0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_instance_norms_train_in_a_step_as_in_trial_runs(size):
    norm = getattr(nn, f"InstanceNorm{size}d")(3, affine=True)
    x = torch.randn(BATCH, 3, *[4] * size)
    norm(x).square().mul(x).mean().backward()
    expected = [p.grad.clone() for p in norm.parameters()]
    engine = GradientEngine(nn.Sequential(norm), max_grad_norm=1e6)
    engine.attach()
    engine.begin_step()
    with engine.recording(rows=BATCH):
        engine.scaled(norm(x).square().mul(x).mean(), BATCH).backward()
    engine.add_chunk(BATCH)
    engine.release(GaussianNoise(), noise_multiplier=0.0, expected_batch_size=BATCH)
    for parameter, gradient in zip(norm.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    tracking = getattr(nn, f"InstanceNorm{size}d")(3, affine=True, track_running_stats=True)
    with pytest.raises(UnsupportedModelError, match="running stats"):
        GradientEngine(nn.Sequential(tracking), max_grad_norm=1.0)


def test_evaluation_leaves_no_record():
    model, x = build("linear")
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording(), torch.no_grad():
        model(x)
    with pytest.raises(UnsupportedModelError, match="does not depend"):
        engine.take(BATCH)


def test_a_pickled_model_holds_nothing_unnoised():
    model, x = build("mlp, in place")
    clean = len(pickle.dumps(model))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        loss_of(model, x).backward()
        during = pickle.dumps(model)
    assert x.numpy().tobytes() not in during
    engine.detach()
    assert len(pickle.dumps(model)) == clean


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.BatchNorm1d(3), "BatchNorm1d.*GroupNorm"),
        (lambda: nn.BatchNorm1d(3, affine=False), "BatchNorm1d"),
        (lambda: nn.SyncBatchNorm(3), "SyncBatchNorm"),
        (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), "InstanceNorm1d"),
        (lambda: nn.LSTM(3, 3), "DPLSTM"),
        (lambda: nn.GRU(3, 3), "DPGRU"),
        (lambda: nn.RNN(3, 3), "DPRNN"),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "DPMultiheadAttention"),
        (lambda: nn.Bilinear(2, 2, 2), None),
    ],
)
def test_layers_that_cannot_be_private_are_refused_by_name(model, words):
    wrapped = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"odd": model()}))
    if words is None:
        assert len(find_units(wrapped)) == 2  # refused when it is called with two tensors
        return
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        find_units(wrapped)
    assert "'1.odd'" in str(caught.value)


def test_a_module_that_functorch_cannot_do_is_refused_by_name():
    class Dropping(Scale):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x))

    model = nn.Sequential(nn.Linear(5, 4), Dropping(4))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        loss = loss_of(model, torch.randn(BATCH, 5))
        with pytest.raises(UnsupportedModelError, match=r"'1' \(Dropping\).*functorch"):
            loss.backward()


def test_normalisation_by_frozen_statistics_is_fine():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False).eval())
    assert len(find_units(model)) == 1


def test_parameters_without_a_layer_are_refused_by_name():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.temperature = nn.Parameter(torch.ones(()))

    with pytest.raises(UnsupportedModelError, match="'temperature'"):
        find_units(Root())


def test_a_module_with_statistics_of_its_own_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("seen", torch.zeros(2))

    with pytest.raises(UnsupportedModelError, match=r"'0'.*'0.weight'"):
        find_units(nn.Sequential(Odd()))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrised_layers_are_refused():
    """Their layer still is of its old class, and its weight is no parameter any more."""
    for layer in (nn.Linear(5, 3), nn.Conv1d(1, 2, 2)):
        model = nn.Sequential(nn.utils.weight_norm(layer))
        with pytest.raises(UnsupportedModelError, match=r"'weight_g', 'weight_v', as"):
            GradientEngine(model, max_grad_norm=1.0)
    # One that goes by Opacus' rule is found out when it is first used.
    model = nn.Sequential(nn.utils.weight_norm(nn.InstanceNorm1d(2, affine=True)))
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()

    def step():
        with engine.recording():
            model(torch.randn(BATCH, 2, 5)).square().mean().backward()
        engine.add_chunk(BATCH)

    with pytest.raises(UnsupportedModelError, match="weight_norm"):
        step()


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(UnsupportedModelError, match="no trainable parameter"):
        GradientEngine(nn.Linear(2, 2).requires_grad_(False), max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (nn.Linear(4, 2), lambda m, x: m(x.reshape(2 * BATCH, 4))),
        (nn.Linear(4, 2), lambda m, x: m(x[0, 0])),
        (nn.Linear(4, 2), lambda m, x: m(x.transpose(0, 1))),
        (nn.Linear(4, 2), lambda m, x: m(x.mean(0, keepdim=True))),
        (nn.Bilinear(4, 4, 2), lambda m, x: m(x[:, 0], x[:, 1])),
    ],
)
def test_a_layer_whose_batch_cannot_be_seen_is_refused(model, call):
    wrapped = nn.ModuleDict({"layer": model})
    engine = GradientEngine(wrapped, max_grad_norm=1.0)
    engine.attach()

    def step():
        with engine.recording():
            call(model, torch.randn(BATCH, 2, 4)).mean().backward()
        engine.take(BATCH)

    with pytest.raises(UnsupportedModelError, match="'layer'"):
        step()


# ---------------------------------------------------------------- the formulas


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_the_two_ways_to_a_linear_norm_agree(batch, time, size_in, size_out, bias):
    generator = torch.Generator().manual_seed(time)
    a = torch.randn(batch, time, size_in, generator=generator, dtype=torch.float64)
    g = torch.randn(batch, time, size_out, generator=generator, dtype=torch.float64)
    weight, bias_grad = linear_per_sample(a, g, bias=bias)
    expected = weight.flatten(1).square().sum(1)
    if bias:
        expected = expected + bias_grad.square().sum(1)
    torch.testing.assert_close(linear_ghost_squares(a, g, bias=bias), expected)
    weights = torch.rand(batch, generator=generator, dtype=torch.float64)
    total, bias_total = linear_weighted_sum(a, g, weights, bias=bias)
    torch.testing.assert_close(total, torch.einsum("b,boi->oi", weights, weight))
    assert (bias_total is None) == (not bias)


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=9), st.floats(1e-6, 1e6))
def test_clipping_keeps_its_law(norms, bound):
    norms = torch.tensor(norms)
    factors = clip_factor(norms, max_grad_norm=bound)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert (factors * norms <= bound * (1 + 1e-6)).all()
    assert (factors[norms <= bound * (1 - 1e-6)] == 1).all()


def test_clipping_needs_a_bound():
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="max_grad_norm"):
            clip_factor(torch.ones(1), max_grad_norm=bound)
