"""Ways to learn more of a row than the epsilon says; each succeeded once."""

from __future__ import annotations

import lightning as L
import pytest
import torch
import torchmetrics
from private_run import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_secure import (
    EncryptedCheckpointIO,
    load_encrypted_checkpoint,
)
from lightning_secure.errors import UnsupportedModelError, UnsupportedTrainerOptionError
from lightning_secure.privacy.gradients.formulas import (
    clip_factor,
    linear_ghost_squares,
    linear_weighted_sum,
)
from lightning_secure.privacy.noise.gaussian import GaussianNoise


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.layer(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(**options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, **options)


# ---------------------------------------------------------------- the noise


def test_noise_cannot_be_found_by_trying_32_bits():
    """torch's CPU generator keeps the low 32 bits of its seed, which an afternoon goes through."""
    low, high = GaussianNoise(seed=7), GaussianNoise(seed=7 + (0x1234 << 40))
    a, b = (noise.add_(torch.zeros(100), std=1.0) for noise in (low, high))
    assert not torch.equal(a, b)


# ---------------------------------------------------------------- what the trial runs must see


class Codebook(Model):
    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(torch.zeros(4), requires_grad=False)

    def training_step(self, batch, batch_idx):
        self.code.data.copy_(batch[0][0])
        return super().training_step(batch, batch_idx)


class KeptMetric(Model):
    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.mean.persistent(True)

    def training_step(self, batch, batch_idx):
        self.mean.update(batch[0].mean())
        return super().training_step(batch, batch_idx)


class ExtraState(Model):
    def training_step(self, batch, batch_idx):
        self.seen = getattr(self, "seen", 0.0) + float(batch[0].sum())
        return super().training_step(batch, batch_idx)

    def get_extra_state(self):
        return {"seen": getattr(self, "seen", 0.0)}

    def set_extra_state(self, state):
        self.seen = state["seen"]


class Nudged(Model):
    def training_step(self, batch, batch_idx):
        self.layer.weight.data.add_(1e-6 * batch[0].mean(0))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Codebook, "code"), (KeptMetric, "mean"), (ExtraState, "extra_state"), (Nudged, "weight")],
)
def test_nothing_of_a_checkpoint_takes_up_rows(tmp_path, kind, name):
    model = kind()
    before = {key: str(value) for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=rf"'\S*{name}\S*' changes"):
        trainer(tmp_path).fit(model, loader())
    assert {key: str(value) for key, value in model.state_dict().items()} == before


def test_a_metric_that_no_checkpoint_holds_may_count(tmp_path):
    model = KeptMetric()
    model.mean.persistent(False)
    trainer(tmp_path).fit(model, loader())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_into_their_weights_are_refused(tmp_path, kind, frozen):
    """The norm of a token's weights told whether any row has the token."""
    model = Model()
    model.words = kind(50, 8, max_norm=1.0).requires_grad_(not frozen)
    with pytest.raises(UnsupportedModelError, match=r"words.*max_norm"):
        trainer(tmp_path).fit(model, loader())


def mixed(x):
    return x + 10 * x.sum(0)


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_rows_mixed_by_a_transfer_hook_are_refused(tmp_path, hook):
    def mixing(self, batch, dataloader_idx):
        return mixed(batch[0]), batch[1]

    kind = type("Mixing", (Model,), {hook: mixing})
    with pytest.raises(UnsupportedModelError, match="mixed"):
        trainer(tmp_path).fit(kind(), loader())


def mixing_collate(samples):
    x, y = default_collate(samples)
    return mixed(x), y


def plain_collate(samples):
    return default_collate(samples)


def test_rows_mixed_by_the_collate_function_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="collate"):
        trainer(tmp_path).fit(Model(), loader(collate_fn=mixing_collate))


def test_a_collate_function_that_keeps_rows_apart_is_fine(tmp_path):
    run = trainer(tmp_path)
    run.fit(Model(), loader(collate_fn=plain_collate))
    assert run.strategy.ledger.steps == 8


# ---------------------------------------------------------------- the account


def test_a_fit_after_a_resume_goes_on_with_the_account(tmp_path):
    first = trainer(tmp_path)
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    model, again = Model(), trainer(tmp_path)
    again.fit_loop.max_epochs = 2
    again.fit(model, loader(), ckpt_path=tmp_path / "a.ckpt")
    third = trainer(tmp_path)
    third.fit(model, loader())
    assert third.strategy.ledger.steps == 24
    assert third.strategy.ledger.abandoned == 0  # all of them are in the module's own account


def test_a_module_from_a_checkpoint_brings_its_account(tmp_path, keys):
    first = trainer(tmp_path, plugins=[EncryptedCheckpointIO(keys)])
    first.fit(Model(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    model = load_encrypted_checkpoint(Model, tmp_path / "a.ckpt", keys=keys)
    second = trainer(tmp_path)
    second.fit(model, loader())
    assert second.strategy.ledger.steps == 16
    assert second.strategy.ledger.run_id == first.strategy.ledger.run_id


def test_two_steps_on_one_draw_are_refused(tmp_path):
    """They are two looks at the same rows, and the ledger would count two draws."""

    class Twice(Model):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            optimizer.step(closure=optimizer_closure)

    run = trainer(tmp_path)
    with pytest.raises(UnsupportedTrainerOptionError, match="twice"):
        run.fit(Twice(), loader())
    assert run.strategy.ledger.steps == 1


# ---------------------------------------------------------------- the bound


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_cannot_hide_its_norm_by_cancellation(bias):
    """Two time steps that nearly cancel: their Gram form is a small difference of large numbers."""
    worst = 0.0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(1, 1, 64, generator=generator) * 3e4
        inputs = torch.cat([a, -a + torch.randn(1, 1, 64, generator=generator) * 10], 1)
        grads = torch.ones(1, 2, 8)
        norms = linear_ghost_squares(inputs, grads, bias=bias).sqrt()
        factor = clip_factor(norms, max_grad_norm=1.0)
        total, _ = linear_weighted_sum(inputs.double(), grads.double(), factor.double(), bias=bias)
        worst = max(worst, float(total.norm()))
    assert worst <= 1.0001
