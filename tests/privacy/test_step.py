"""The private step by itself: a plain loop takes it, and no Lightning."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_secure.errors import LedgerError, PrivacyError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.collective import Single
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.sampling import Chunk, LogicalBatch
from lightning_secure.privacy.step import PrivateStep, Surroundings

BOUND, EXPECTED = 0.3, 4


class Loop:
    """A model, its step, and what is around it."""

    def __init__(self, collective=None, **config):
        torch.manual_seed(0)
        self.model = nn.Linear(5, 2)
        self.rows = torch.randn(6, 5), torch.tensor([0, 1, 0, 1, 1, 0])
        self.config = DPConfig(
            **{"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": BOUND, **config}
        )
        self.step = PrivateStep(self.config, collective or Single(), public=(), released={})
        self.step.ledger = Ledger(
            delta=1e-5,
            max_grad_norm=BOUND,
            noise_multiplier=self.config.noise_multiplier or 0.0,
            insecure=self.config.insecure,
            public=PublicNumbers(
                dataset_size=100,
                dataset_size_declared=True,
                expected_batch_size=EXPECTED,
                steps_per_epoch=25,
            ),
        )
        self.step.begin_fit(GradientEngine(self.model, max_grad_norm=BOUND))

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def draw(self, *sizes):
        parts = zip(*(rows[: sum(sizes)].split(sizes) for rows in self.rows), strict=True)
        chunks = (Chunk(size, data) for size, data in zip(sizes, parts, strict=True))
        self.step.drawn = LogicalBatch(chunks)

    def take(self):
        return self.step.take(
            Surroundings(
                model=self.model,
                device=torch.device("cpu"),
                require_turn=lambda: None,
                on_device=lambda data: data,
                run=self.loss,
                run_trial=self.loss,
                backward=torch.Tensor.backward,
                optimized=lambda: list(self.model.parameters()),
                muted=nullcontext,
                fetch=lambda *_: None,
                stateful=list,
                checkpoint=dict,
                checkpoint_alone=dict,
            )
        )


def by_hand(loop, rows):
    """The clipped sum of the rows' gradients over the expected size."""
    total = [torch.zeros_like(p) for p in loop.model.parameters()]
    for x, y in zip(*(part[:rows] for part in loop.rows), strict=True):
        grads = torch.autograd.grad(loop.loss((x[None], y[None])), list(loop.model.parameters()))
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for part, grad in zip(total, grads, strict=True):
            part += grad * min(1.0, BOUND / float(norm))
    return [part / EXPECTED for part in total]


def test_it_knows_no_lightning():
    code = (
        "import sys, lightning_secure.privacy.step\n"
        "import lightning_secure.privacy.sharding\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'lightning', 'lightning_fabric', 'pytorch_lightning'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (2, 2, 2)])
def test_without_noise_a_step_is_the_clipped_sum(sizes):
    loop = Loop(noise_multiplier=None, insecure_noise_off=True)
    loop.draw(*sizes)
    told, published = loop.take()
    assert bool(told.isnan())
    assert published == {}
    for parameter, gradient in zip(loop.model.parameters(), by_hand(loop, 6), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_nothing_is_charged_or_released_before_the_second_part():
    loop = Loop()
    loop.draw(6)
    taking = loop.take()
    next(taking)
    assert loop.step.ledger.steps == 0
    assert all(p.grad is None or not p.grad.any() for p in loop.model.parameters())
    next(taking)
    assert loop.step.ledger.steps == 1
    assert all(p.grad.any() for p in loop.model.parameters())


def test_a_step_that_cannot_be_charged_is_not_released():
    loop = Loop()
    loop.draw(6)

    def record():
        raise LedgerError("the disk is full")

    loop.step.ledger.record = record  # as where the journal cannot be written
    taking = loop.take()
    next(taking)
    before = [p.grad for p in loop.model.parameters()]
    with pytest.raises(LedgerError, match="disk is full"):
        next(taking)
    assert all(p.grad is grad for p, grad in zip(loop.model.parameters(), before, strict=True))


def test_a_draw_is_taken_once():
    loop = Loop()
    loop.draw(6)
    next(loop.take())
    with pytest.raises(UnsupportedTrainerOptionError, match="evaluated twice"):
        next(loop.take())


def test_a_draw_of_nothing_is_a_step_of_noise():
    loop = Loop()
    loop.step.drawn = LogicalBatch([])
    told, _ = loop.take()
    assert bool(told.isnan())
    assert loop.step.ledger.steps == 1
    assert all(p.grad.any() for p in loop.model.parameters())


class Silent(Single):
    """Says that another process adds the noise, where there is none."""

    adds_noise = False


def test_a_process_that_forgets_the_noise_releases_nothing():
    loop = Loop(Silent())
    loop.draw(6)
    taking = loop.take()
    next(taking)
    with pytest.raises(PrivacyError, match="0 processes added noise"):
        next(taking)
    assert all(p.grad is None or not p.grad.any() for p in loop.model.parameters())


def test_after_a_fit_nothing_of_it_is_left():
    loop = Loop()
    loop.draw(6)
    next(loop.take())
    loop.draw(6)
    assert loop.step.end_fit()
    assert loop.step.drawn is loop.step.engine is None
    assert not loop.step.end_fit()
    with pytest.raises(PrivacyError, match="not set up"):
        next(loop.take())
