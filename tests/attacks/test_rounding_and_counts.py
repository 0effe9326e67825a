"""What low bits, numbers of rows, and things that come after the preflight would tell."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.errors import BudgetExhaustedError, UnsupportedModelError
from lightning_secure.metrics import PrivateMean
from lightning_secure.privacy.accounting.pld import epsilon_by
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.released.step_metrics import RowMean, StepMetrics
from lightning_secure.strategies.private import PrivateStrategy

ROWS = 32


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(5, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(tmp_path, model, *, dp=None, epochs=1, validate=False, strategy=None, **options):
    config = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0, **(dp or {})}
    trainer = L.Trainer(
        strategy=PrivateStrategy(DPConfig(**config), **(strategy or {})),
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    trainer.fit(model, loader, loader if validate else None)
    return trainer


# ---------------------------------------------------------------- low bits


@pytest.mark.parametrize("secure", [False, True])
def test_noise_where_no_row_came_is_as_fine_as_elsewhere(secure):
    """In single precision, it would show by its last bits whether any row has used a layer."""
    layer = nn.Linear(3, 3).double()
    engine = GradientEngine(layer, max_grad_norm=1.0)
    engine.release(GaussianNoise(secure=secure), noise_multiplier=1.0, expected_batch_size=8)
    for parameter in layer.parameters():
        assert not torch.equal(parameter.grad, parameter.grad.float().double())


def test_secure_noise_of_metrics_is_rounded_once(monkeypatch):
    """Rounded before it is scaled and added, its bits tell what it was added to."""
    drawn = GaussianNoise(secure=True)
    z = torch.tensor([1.0 + 2.0**-40, -3.0 + 2.0**-40], dtype=torch.float64)
    # Numbers whose last bits show where they are rounded; a real draw seldom has them.
    monkeypatch.setattr(GaussianNoise, "_next", lambda self, most, dtype: z[:most].to(dtype))
    metric = RowMean(noise_multiplier=3.0, entry="a", bounds=(-1.0, 1.0))
    metrics = StepMetrics({"a": metric}, max_grad_norm=1.0)
    sums = torch.tensor([-3.0])
    (value,) = metrics.release(sums, drawn, expected_batch_size=1).values()
    assert float(value) == 3 * 2.0**-40
    assert sums == -3.0


def test_metrics_of_the_module_have_secure_noise():
    """On any device: the ledger says so of all noise of such a run, and it is two numbers."""
    assert PrivateMean(bounds=(0, 1), noise_multiplier=1.0)._noise._secure


def test_a_loss_in_bfloat16_is_refused(tmp_path):
    """It counts to 256: of 257 rows, each gradient is another one than of 256."""

    class Short(Model):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).bfloat16().sum(1).mean()

    with pytest.raises(UnsupportedModelError, match="bfloat16"):
        fit(tmp_path, Short())


# ---------------------------------------------------------------- how many rows were drawn


class Logs(Model):
    """Logs something public that differs from step to step."""

    def training_step(self, batch, batch_idx):
        first = float(self.global_step == 0)
        self.log("first", first, on_epoch=True, on_step=False)
        self.log("own", first, on_epoch=True, on_step=False, batch_size=len(batch[0]))
        self.log("sum", 1.0, on_epoch=True, on_step=False, reduce_fx="sum")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("expected", "chunk"), [(8, 2), (8, 32), (1, 2)])
def test_a_public_metric_is_not_weighed_by_the_rows_of_a_step(tmp_path, expected, chunk):
    """Its mean over an epoch would tell how many each step has drawn."""
    dp = {"max_physical_batch_size": chunk, "expected_batch_size": expected, "insecure_seed": 0}
    public = {"public_metrics": ["first", "own", "sum"]}
    trainer = fit(tmp_path, Logs(), dp=dp, strategy=public)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    steps = ROWS // expected
    assert found == pytest.approx({"first": 1 / steps, "own": 1 / steps, "sum": steps})


def test_a_number_that_depends_on_how_many_rows_there_are_is_not_released(tmp_path):
    class Counts(Model):
        def training_step(self, batch, batch_idx):
            losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            return {"loss": losses.mean(), "many": losses.detach() * 0 + float(len(losses) > 3)}

    metrics = {"many": RowMean(noise_multiplier=9.0, entry="many", bounds=(0.0, 1.0))}
    with pytest.raises(UnsupportedModelError, match="how many rows"):
        fit(tmp_path, Counts(), strategy={"released_metrics": metrics})


# ---------------------------------------------------------------- past the checks


def test_hooks_of_parameters_see_no_gradient_of_the_trials(tmp_path):
    """As loggers put them there to draw histograms of gradients."""
    seen, model = [], Model()
    model.net.weight.register_hook(seen.append)
    model.net.bias.register_post_accumulate_grad_hook(seen.append)
    fit(tmp_path, model)
    assert not seen
    model.net(torch.ones(1, 5)).sum().backward()
    assert len(seen) == 2, "the hooks are the user's, and stay"


class Awakened(Model):
    """Has frozen statistics, and lets go of them in the middle of the run."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False).eval()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(self.norm(batch[0])), batch[1])

    def on_train_epoch_start(self):
        self.norm.train(self.current_epoch > 0)


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_statistics_that_thaw_later_are_refused_there(tmp_path):
    model = Awakened()
    with pytest.raises(UnsupportedModelError, match="'norm'"):
        fit(tmp_path, model, epochs=2)
    assert not model.norm.running_mean.any()


class Spends(Model):
    """Releases something in a step, of what was left for that step."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            values = torch.ones(ROWS)
            self.trainer.strategy.release(
                values, bounds=(0, 1), noise_multiplier=4.0, public_rows=ROWS
            )
        return super().training_step(batch, batch_idx)


def test_a_release_in_the_middle_of_a_step_leaves_that_step_its_budget(tmp_path):
    model = Spends()
    step = [(1.0, 0.25, 3)]
    budget = epsilon_by("rdp", step, delta=1e-5) + 0.01  # three steps, and nothing else
    dp = {"target_epsilon": budget, "accountant": "rdp"}
    with pytest.raises(BudgetExhaustedError):
        fit(tmp_path, model, dp=dp)
    assert model.trainer.strategy.ledger.epsilon() <= budget


def test_a_metric_whose_noise_is_known_spends_everything(tmp_path):
    class Known(Model):
        def __init__(self):
            super().__init__()
            self.mean = PrivateMean(
                bounds=(0, 1), noise_multiplier=9.0, public_rows=ROWS, insecure_seed=1
            )

        def validation_step(self, batch, batch_idx):
            self.mean(batch[0][:, 0])
            self.log("mean", self.mean)

    trainer = fit(tmp_path, Known(), validate=True)
    assert trainer.strategy.ledger.epsilon() == float("inf")
