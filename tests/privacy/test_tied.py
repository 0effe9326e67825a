"""A table of vectors that is a linear layer's weight as well."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums, per_sample_norms
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.rules import embedding, layer_rule
from lightning_secure.privacy.gradients.rules.embedding import EmbeddingUnit
from lightning_secure.privacy.gradients.rules.layer_rule import Way
from lightning_secure.privacy.gradients.rules.linear import LinearUnit

BATCH, TIME, WORDS, SIZE = 5, 6, 13, 4


class Language(nn.Module):
    """Words to words; the options say how often and where the weight is used."""

    def __init__(self, *, padding=None, bias=False, twice=False, pooled=False, third=False):
        super().__init__()
        self.table = nn.Embedding(WORDS, SIZE, padding_idx=padding)
        self.inner = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, WORDS, bias=bias)
        self.head.weight = self.table.weight
        self.twice, self.pooled = twice, pooled
        self.third = nn.Linear(SIZE, WORDS) if third else None
        if self.third is not None:
            self.third.weight = self.table.weight

    def forward(self, tokens):
        x = torch.tanh(self.inner(self.table(tokens)))
        if self.twice:
            x = x * self.table(tokens.flip(1)) + self.head(x)[..., :SIZE]
        out = self.head(x.mean(1, keepdim=True) if self.pooled else x)
        return out if self.third is None else out * self.third(x)


def loss_of(model, tokens):
    out = model(tokens)
    return (out.sin() * torch.arange(1.0, WORDS + 1)).sum((1, 2)).mean()


def prepared(**options):
    torch.manual_seed(0)
    model = Language(**options).double()
    tokens = torch.randint(0, 4, (BATCH, TIME))  # few words, so that they come again
    reference = []
    for sample in tokens:
        model.zero_grad()
        loss_of(model, sample[None]).backward()
        reference.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    with engine.recording():
        loss_of(model, tokens).backward()
    return model, engine.take(BATCH), reference


def refuse_tables(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a gradient as large as the table was formed for a sample")

    # A result does not show by which way it came.
    monkeypatch.setattr(EmbeddingUnit, "per_sample", refused)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 0},
        {"padding": 2, "bias": True},
        {"twice": True, "padding": 1},
        {"pooled": True},
        {"third": True},  # the two layers differ in their biases, so this one is instantiated
    ],
    ids=str,
)
def test_norms_and_sums_are_exact(options, monkeypatch):
    if "third" not in options:
        refuse_tables(monkeypatch)
    model, records, reference = prepared(**options)
    norms = torch.tensor(
        [sum(g.square().sum() for g in grads).sqrt() for grads in reference], dtype=torch.float64
    )
    torch.testing.assert_close(per_sample_norms(records), norms, rtol=1e-9, atol=0)
    bound = float(norms.median())
    sums = {}
    add_clipped_sums(sums, records, max_grad_norm=bound)
    for place, parameter in enumerate(model.parameters()):
        parts = zip(reference, norms, strict=True)
        expected = sum(grads[place] * min(1.0, bound / float(norm)) for grads, norm in parts)
        torch.testing.assert_close(sums[parameter], expected, rtol=1e-9, atol=1e-12)


def test_uses_that_cancel_are_not_rounded_away(monkeypatch):
    """Both uses are large and their sum is small: a norm that is too small would not be clipped."""
    # What counts for parts that cancel within one use would hide what is asked here.
    for module in (layer_rule, embedding):
        monkeypatch.setattr(module, "cancelling", lambda dtype: 0.0)
    table = nn.Embedding(3, 64)
    head = nn.Linear(64, 3, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head})
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    unit = engine.units[1]  # its norm by the product, without the bound of a ghost norm
    unit._way = Way("product", kept=False)
    torch.manual_seed(0)
    x = torch.randn(32, 4, 64) * 100
    tokens = torch.zeros(32, 4, dtype=torch.long)
    with engine.recording():
        # The table's row 0 gets -x, the head's row 0 gets +x, and a little more.
        loss = -(table(tokens) * x).sum() + head(x)[..., 0].sum() + table(tokens).sum() * 1e-3
        (loss / 32).backward()
    norms = per_sample_norms(engine.take(32))
    exact = 64**0.5 * 4 * 1e-3
    assert (norms >= exact * 0.99).all()


def test_a_head_of_a_large_vocabulary_is_neither_kept_nor_formed():
    unit = LinearUnit.of("head", nn.Linear(64, 5000, bias=False))
    ways = unit.ways(torch.randn(2, 8, 64), torch.randn(2, 8, 5000))
    assert [way.form for way in ways] == [""]


class Padded(nn.Module):
    """Two tables of one weight, of which one pads."""

    def __init__(self):
        super().__init__()
        self.one = nn.Embedding(WORDS, SIZE)
        self.other = nn.Embedding(WORDS, SIZE, padding_idx=2)
        self.other.weight = self.one.weight

    def forward(self, tokens):
        return self.one(tokens) + 2 * self.other((tokens + 1) % 4)


def test_each_use_of_a_table_has_its_own_padding():
    torch.manual_seed(0)
    model, tokens = Padded().double(), torch.randint(0, 4, (BATCH, TIME))
    engine = GradientEngine(model, max_grad_norm=1e9)
    engine.attach()
    with engine.recording(rows=BATCH):
        engine.scaled(model(tokens).square().sum((1, 2)).mean(), BATCH).backward()
    engine.add_chunk(BATCH)
    (total,) = engine._sums.values()
    engine.detach()
    model(tokens).square().sum().backward()
    torch.testing.assert_close(total, model.one.weight.grad)
