"""The layers that refusals advise: exact against one backward pass a sample, in float64."""

from __future__ import annotations

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums, per_sample_norms
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.rules.find_units import find_units

BATCH, TIME = 6, 5


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, **options)
        self.first = options.get("batch_first", False)
        self.head = nn.Linear(6 if options.get("bidirectional") else 3, 2)

    def forward(self, x):
        out, _ = self.rnn(x if self.first else x.transpose(0, 1))
        out = out if self.first else out.transpose(0, 1)
        return self.head(out[:, -1] + out[:, 0])


class Attentive(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = DPMultiheadAttention(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x.sin(), x.cos())[0].mean(1))


MODELS = [
    lambda: Recurrent(DPLSTM, batch_first=True),
    lambda: Recurrent(DPLSTM, num_layers=2, bidirectional=True),
    lambda: Recurrent(DPGRU, batch_first=True, num_layers=2, bias=False),
    lambda: Recurrent(DPRNN),
    Attentive,
    lambda: Attentive(bias=False, dropout=0.0),
]


def loss_of(model, x):
    return model(x).square().sum(1).mean()


@pytest.mark.parametrize("make", MODELS)
def test_norms_and_clipped_sums_are_exact(make):
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(BATCH, TIME, 4, dtype=torch.float64)
    rows = []
    for row in range(BATCH):
        model.zero_grad()
        loss_of(model, x[row : row + 1]).backward()
        rows.append({p: p.grad.clone() for p in model.parameters()})
    norms = torch.stack([torch.stack([g.norm() for g in r.values()]).norm() for r in rows])
    bound = float(norms.median())

    engine = GradientEngine(model, max_grad_norm=bound)
    engine.attach()
    with engine.recording():
        loss_of(model, x).backward()
    records = engine.take(BATCH)
    torch.testing.assert_close(per_sample_norms(records), norms, rtol=1e-10, atol=0)
    sums = {}
    add_clipped_sums(sums, records, max_grad_norm=bound)
    engine.detach()
    factors = (bound / norms).clamp(max=1)
    for parameter in model.parameters():
        expected = sum(f * r[parameter] for f, r in zip(factors, rows, strict=True))
        torch.testing.assert_close(sums[parameter], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", MODELS)
def test_they_pass_the_trial_runs(make):
    model = make()
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    preflight(
        engine,
        model,
        lambda batch: loss_of(model, batch),
        torch.randn(BATCH, TIME, 4),
        size=BATCH,
        backward=torch.autograd.backward,
    )
    engine.detach()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torchs_own_are_refused_with_the_one_to_use(kind):
    with pytest.raises(UnsupportedModelError, match=rf"opacus.layers.DP{kind}\."):
        find_units(nn.Sequential(getattr(nn, kind)(4, 3)))


def test_packed_sequences_are_refused():
    """Later steps have fewer rows, and it is not said which."""
    model = Recurrent(DPLSTM)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    packed = nn.utils.rnn.pack_padded_sequence(
        torch.randn(BATCH, TIME, 4), [5, 4, 4, 3, 2, 1], batch_first=True
    )
    with engine.recording():
        model.rnn(packed)[1][0].square().sum().backward()
    with pytest.raises(UnsupportedModelError, match="first dimension is not the batch"):
        engine.take(BATCH)
    engine.detach()
