"""What weights are computed in, and what overflows: never the rows' affair."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure import DPConfig, PrivateStrategy
from lightning_secure.errors import UnsupportedModelError, UnsupportedTrainerOptionError
from lightning_secure.privacy.gradients.engine import GradientEngine

ROWS, BOUND = 32, 0.5


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        self.seen = None

    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        self.seen = out.dtype
        return F.cross_entropy(out.float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(*, huge=()):
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()
    x[list(huge)] = 1e5  # infinite in float16
    return TensorDataset(x, y)


def half(scaler=None):
    """Given as a plugin: told by name, Lightning takes bfloat16 instead on a CPU."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def fitted(tmp_path, options, *, kind=Model, dataset=None, **config):
    model = kind()
    run = L.Trainer(
        strategy=PrivateStrategy(
            DPConfig(
                delta=1e-5, max_grad_norm=BOUND, insecure_noise_off=True, insecure_seed=3, **config
            )
        ),
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    run.fit(model, DataLoader(dataset or data(), batch_size=8))
    return run, model


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return weights(fitted(tmp_path_factory.mktemp("exact"), {"precision": "64-true"})[1])


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        ({"precision": "32-true"}, torch.float32, 1e-6),
        ({"precision": "bf16-mixed"}, torch.bfloat16, 1e-3),
        ({"precision": "bf16-true"}, torch.bfloat16, 1e-2),
        ({**half(), "scale": 2.0**12}, torch.float16, 1e-4),
        ({"precision": "32-true", "scale": 2.0**12}, torch.float32, 1e-6),
    ],
)
def test_every_precision_comes_to_the_same_weights(tmp_path, exact, options, dtype, tolerance):
    options = dict(options)
    run, model = fitted(tmp_path, options, loss_scale=options.pop("scale", None))
    assert model.seen == dtype
    assert run.global_step == run.strategy.ledger.steps == 8
    torch.testing.assert_close(weights(model), exact, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- the scale of float16


def test_a_scale_that_follows_the_gradients_is_refused(tmp_path):
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=True)):
        with pytest.raises(UnsupportedTrainerOptionError, match="loss_scale"):
            fitted(tmp_path, half(scaler))


def test_a_fixed_scale_never_changes_and_is_in_no_checkpoint(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3, growth_interval=1)
    run, _ = fitted(tmp_path, half(scaler), loss_scale=2.0**12)
    assert run.precision_plugin.scaler is None
    assert scaler.get_scale() == 2.0**3  # the user's own is as it was
    state = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    assert "MixedPrecision" not in state


def test_rows_that_overflow_are_left_out_and_the_step_is_taken(tmp_path):
    """Skipped, it would tell whether such a row was drawn."""
    huge = [1, 2, 3]

    class Without(Model):
        """The same draws, in which those rows have no gradient."""

        def training_step(self, batch, batch_idx):
            x, y = batch
            kept = x[:, 0] < 1e4
            out = self.net(torch.where(kept[:, None], x, 0))
            each = F.cross_entropy(out, y, reduction="none")
            return torch.where(kept, each, out.detach().sum(1) * 0).mean()

    steps, found = [], []
    for kind in (Model, Without):
        run, model = fitted(
            tmp_path, half(), kind=kind, dataset=data(huge=huge), loss_scale=2.0**12
        )
        steps.append(run.global_step)
        found.append(weights(model))
    assert steps == [8, 8]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_small_gradients_survive_by_the_scale():
    def norm(scale, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
        engine = GradientEngine(model, max_grad_norm=1.0, loss_scale=scale)
        engine.attach()
        with engine.recording(rows=4):
            with torch.autocast("cpu", torch.float16, enabled=dtype is torch.float16):
                out = model(torch.ones(4, 5))
            engine.scaled(1e-9 * out.float().sum(1).mean(), 4).backward()
        return sum(record.squares() for record in engine.take(4)).sqrt()

    exact = norm(1.0, torch.float32)
    assert (norm(1.0, torch.float16) < 1e-5 * exact).all()  # they are zero
    torch.testing.assert_close(norm(2.0**12, torch.float16), exact, rtol=0.02, atol=0)


# ---------------------------------------------------------------- how many rows there are


def summed(rows, dtype, *, bound, factor):
    """The clipped sum of rows that are all alike, of which one gradient has norm one."""
    model = nn.Linear(1, 1, bias=False)
    engine = GradientEngine(nn.Sequential(model), max_grad_norm=bound)
    engine.attach()
    with engine.recording(rows=rows):
        with torch.autocast("cpu", dtype):
            out = model(torch.ones(rows, 1))
        engine.scaled(factor * out.float().mean(), rows).backward()
    engine.add_chunk(rows)
    (total,) = engine._sums.values()
    return float(total)


@pytest.mark.parametrize(
    ("dtype", "rows", "factor"),
    [(torch.bfloat16, range(250, 400, 7), 1.0), (torch.float16, range(1, 9), 65000.0)],
)
def test_one_more_row_does_not_round_the_others_anew(dtype, rows, factor):
    """Backward from a mean, each is divided by their number, and rounded or out of range by it."""
    for number in rows:
        before = summed(number, dtype, bound=2 * factor, factor=factor)
        after = summed(number + 1, dtype, bound=2 * factor, factor=factor)
        assert after - before == pytest.approx(factor, rel=1e-3)


def test_a_loss_in_float16_is_refused(tmp_path):
    class Short(Model):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).half().mean()

    with pytest.raises(UnsupportedModelError, match="float16"):
        fitted(tmp_path, half(), kind=Short, loss_scale=2.0**12)
