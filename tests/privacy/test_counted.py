"""Means of counted targets: what they are, and that no row changes another's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.gradients.counted_targets import CountedMeans
from lightning_secure.privacy.gradients.engine import GradientEngine

ROWS, TIME, CLASSES = 4, 6, 3
WEIGHTS = torch.tensor([1.0, 2.0, 30.0])


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, TIME, CLASSES, generator=generator)
    targets = torch.randint(0, CLASSES, (ROWS, TIME), generator=generator)
    targets[1, 4:] = -100
    targets[2] = -100
    return logits, targets


@pytest.fixture
def means():
    means = CountedMeans()
    means.by_row = True
    return means


def by_hand(logits, targets, **options):
    each = cross_entropy(logits.mT, targets, reduction="none", **options)
    return (each.sum(1) / (targets != -100).sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHTS}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y, **o: F.cross_entropy(z.mT, y, **o),
        lambda z, y, **o: cross_entropy(z.flatten(0, 1), y.flatten(), **o),
        lambda z, y, **o: nn.CrossEntropyLoss(**o)(z.reshape(-1, CLASSES), y.reshape(-1)),
        lambda z, y, **o: checkpoint(lambda a: cross_entropy(a.mT, y, **o), z, use_reentrant=False),
    ],
)
def test_each_row_has_its_own_mean(means, data, loss, options):
    logits, targets = data
    expected = by_hand(logits, targets, **options)
    logits.requires_grad_()
    with means.applied(ROWS):
        found = loss(logits, targets, **options)
        found.backward()
    torch.testing.assert_close(found, expected)
    given = logits.grad.clone()
    logits.grad = None
    by_hand(logits, targets, **options).backward()
    torch.testing.assert_close(given, logits.grad)
    assert not given[2].any()


def test_nll_loss_too_and_what_is_another_reduction_is_not_touched(means, data):
    logits, targets = data
    logs = logits.log_softmax(2)
    with means.applied(ROWS):
        torch.testing.assert_close(F.nll_loss(logs.mT, targets), by_hand(logits, targets))
        summed = F.nll_loss(logs.mT, targets, WEIGHTS, reduction="sum")
        likely = F.cross_entropy(logits.mT, logits.softmax(2).mT, WEIGHTS)
    torch.testing.assert_close(F.nll_loss(logs.mT, targets, WEIGHTS, reduction="sum"), summed)
    torch.testing.assert_close(F.cross_entropy(logits.mT, logits.softmax(2).mT, WEIGHTS), likely)
    assert means.calls == 1


def test_where_rows_are_not_known_all_targets_are_counted(means, data):
    logits, targets = data
    each = F.cross_entropy(logits.mT, targets, reduction="none")
    means.by_row = False
    with means.applied(ROWS):
        torch.testing.assert_close(F.cross_entropy(logits.mT, targets), each.mean())
        nothing = F.cross_entropy(logits[2].requires_grad_(), targets[2])
    assert float(nothing.detach()) == 0.0
    with means.applied(None):
        torch.testing.assert_close(F.cross_entropy(logits.mT, targets), each.mean())


def test_afterwards_torchs_own_are_back(means, data):
    before = torch._C._nn.cross_entropy_loss, torch._C._nn.nll_loss_nd
    with pytest.raises(ZeroDivisionError), means.applied(ROWS):
        _ = 1 / 0
    assert before == (torch._C._nn.cross_entropy_loss, torch._C._nn.nll_loss_nd)


def settled(loss, rows=7):
    """Return whether rows have their own means, as the preflight has found."""
    torch.manual_seed(0)
    model = nn.Linear(3, CLASSES)
    engine = GradientEngine(model, max_grad_norm=1.0)
    engine.attach()
    batch = torch.randn(rows, 10, 3), torch.randint(0, CLASSES, (rows, 10))
    try:
        preflight(
            engine,
            model,
            lambda b: loss(model(b[0]), b[1]),
            batch,
            size=rows,
            backward=torch.autograd.backward,
        )
    finally:
        engine.detach()
    return engine.means.by_row


def row_by_row(logits, targets):
    return torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, targets, strict=True)]).mean()


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()), True),
        (lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, 3), y[:, 1:].reshape(-1)), True),
        (lambda z, y: F.cross_entropy(z.mT, y, WEIGHTS), True),
        (lambda z, y: F.cross_entropy(z.mean(1), y[:, 0]), True),
        # Ten targets of one row are no two targets of five.
        (row_by_row, False),
        (lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, 3), y.T.reshape(-1)), False),
        (lambda z, y: F.cross_entropy(z.mT, y) + row_by_row(z, y), False),
    ],
)
def test_trial_runs_tell_whose_targets_are_whose(loss, own):
    assert settled(loss) is own


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at its inputs
def test_of_what_is_compiled_all_targets_are_counted():
    loss = torch.compile(lambda z, y: F.cross_entropy(z.mT, y), backend="aot_eager")
    assert not settled(loss)
