"""What went wrong with Opacus wired into Lightning by hand, where no other test tells of it.

``docs/privacy.md`` has the whole table, with the test of each row.
"""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, PrivateStrategy
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.run_contract import begin_ledger


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.MultiheadAttention(5, 1, batch_first=True)
        self.head = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        x = batch[0][:, None]
        return F.cross_entropy(self.head(self.mix(x, x, x)[0][:, 0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Gradients(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in module.parameters()]))


def config(**changes):
    return DPConfig(**{"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, **changes})


def fitted(tmp_path, model, dp, *, rows=32, path=None, spy=None, **options):
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0))
    spy = spy or Gradients()
    run = L.Trainer(
        strategy=PrivateStrategy(dp), accelerator="cpu", logger=False, callbacks=[spy],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        **{"max_epochs": 1, **options},
    )  # fmt: skip
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    run.fit(model, loader, ckpt_path=path, weights_only=True if path else None)
    return run, spy.seen


def test_a_resumed_run_repeats_no_noise(tmp_path):
    """Steps 5 to 8 with the noise of steps 1 to 4: their difference would have none."""
    dp = config(noise_multiplier=1000.0)
    L.seed_everything(42, verbose=False)
    run, first = fitted(tmp_path, Model(), dp)
    L.seed_everything(42, verbose=False)
    path = run.checkpoint_callback.best_model_path
    again, second = fitted(tmp_path, Model(), dp, path=path, max_epochs=2)
    assert again.global_step == len(first) + len(second) == 8
    alike = torch.corrcoef(torch.stack(first + second)) - torch.eye(8)
    assert alike.abs().max() < 0.6


def test_the_divisor_does_not_tell_how_many_rows_there_are(tmp_path):
    """With int(N * rate) for a divisor, one step tells 1000 rows from 999."""

    class Empty(Gradients):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.strategy._step.drawn.chunks = ()

    dp = config(expected_batch_size=8, public_dataset_size=32, insecure_seed=3)
    steps = [fitted(tmp_path, Model(), dp, rows=rows, spy=Empty())[1] for rows in (32, 31)]
    assert len(steps[0]) == 4
    assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))


def test_steps_of_an_epoch_are_no_rounded_fraction():
    """``int(1 / (1 / n))`` is another number for 141 of them."""
    for n in range(1, 2000):
        ledger = begin_ledger(
            config(expected_batch_size=1, delta=1e-9), rows=n, batch_size=1, planned_steps=int
        )
        assert ledger.public.steps_per_epoch == n


def test_a_step_is_released_once_however_often_backward_is_called(tmp_path):
    """A second release of the same sums, with noise of its own, would halve the noise uncharged."""

    class Twice(Model):
        def on_after_backward(self):
            self.trainer.strategy.backward(torch.zeros((), requires_grad=True), None)

    class Charged(Gradients):
        def on_exception(self, trainer, module, exception):
            self.steps = trainer.strategy.ledger.steps

    spy = Charged()
    with pytest.raises(UnsupportedTrainerOptionError, match="a second time"):
        fitted(tmp_path, Twice(), config(), spy=spy)
    assert spy.steps == 1
    assert spy.seen == []


def test_a_second_fit_finds_no_hooks_of_the_first(tmp_path):
    def hooks(model):
        return [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        ]

    quiet = config(noise_multiplier=None, insecure_noise_off=True, insecure_seed=3)
    model, other = Model(), Model()
    before = hooks(model)
    fitted(tmp_path, model, quiet)
    assert hooks(model) == before
    other.load_state_dict(model.state_dict())
    fitted(tmp_path, model, quiet)
    assert hooks(model) == before
    fitted(tmp_path / "other", other, quiet)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
