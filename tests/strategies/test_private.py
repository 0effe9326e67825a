from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.strategies.options import require_optimizers
from lightning_secure.strategies.private import PrivateStrategy

ROWS = 64


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 5, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Model(L.LightningModule):
    """An ordinary module that notes what it sees."""

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        self.lr = lr
        self.sizes = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    def train_dataloader(self):
        return DataLoader(rows(), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(1), batch_size=16)


def config(**changes):
    defaults = {"noise_multiplier": 1.0, "delta": 1e-5, "max_grad_norm": 1.0}
    return DPConfig(**{**defaults, **changes})


def quiet(**changes):
    """No noise and repeatable draws."""
    return config(noise_multiplier=None, insecure_noise_off=True, insecure_seed=3, **changes)


def trainer(tmp_path, dp=None, **options):
    strategy = options.pop("strategy", None) or PrivateStrategy(dp or config())
    return L.Trainer(
        **{
            "strategy": strategy,
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        }
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- ordinary modules


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_the_boring_model_trains(tmp_path, precision):
    class Boring(BoringModel):
        def loss(self, preds, labels=None):
            return super().loss(preds.float(), labels)

        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch.to(self.layer.weight.dtype), batch_idx)

    model = Boring()
    before = weights(model).clone()
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(model, datamodule=BoringDataModule())
    assert run.global_step == 64
    assert run.strategy.ledger.steps == 64
    assert 0 < run.strategy.ledger.epsilon() < 5
    assert not torch.equal(weights(model).float(), before.float())


def test_a_step_is_one_step_however_many_chunks_it_has(tmp_path):
    seen = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            assert isinstance(batch, ExpectedBatch)
            seen.append(batch_idx)

    model = Model()
    run = trainer(tmp_path, quiet(max_physical_batch_size=3), callbacks=[Count()])
    run.fit(model)
    assert run.global_step == run.strategy.ledger.steps == 8
    assert seen == [0, 1, 2, 3] * 2
    real = model.sizes
    assert max(real) <= 5  # the preflight's trial rows; chunks have three
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 2


@pytest.mark.parametrize("chunk", [2, 5, 1000])
def test_chunks_do_not_change_the_result(tmp_path, chunk):
    def trained(size):
        model = Model()
        trainer(tmp_path, quiet(max_physical_batch_size=size)).fit(model)
        return weights(model)

    torch.testing.assert_close(trained(chunk), trained(7), rtol=1e-5, atol=1e-7)


def test_without_noise_it_is_dp_sgd_by_hand(tmp_path):
    """The same draws, clipped and averaged by functorch."""
    from lightning_secure.privacy.sampling import PoissonBatchSampler

    model = Model()
    by_hand = copy.deepcopy(model.net)
    trainer(tmp_path, quiet(max_grad_norm=0.3), max_epochs=1).fit(model)

    by_hand[1].inplace = False
    x, y = rows().tensors
    sampler = PoissonBatchSampler(ROWS, sample_rate=16 / ROWS, steps=4, seed=3)

    def loss(parameters, x, y):
        out = torch.func.functional_call(by_hand, parameters, (x[None],))
        return F.cross_entropy(out, y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for drawn in sampler:
        parameters = {n: p.detach() for n, p in by_hand.named_parameters()}
        grads = per_sample(parameters, x[drawn], y[drawn])
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
        factors = (0.3 / norms).clamp(max=1)
        for name, parameter in by_hand.named_parameters():
            clipped = torch.einsum("b,b...->...", factors, grads[name])
            parameter.data -= 0.1 * clipped / 16
    torch.testing.assert_close(weights(model.net), weights(by_hand), rtol=1e-5, atol=1e-6)


def test_a_draw_of_nothing_is_a_step_of_pure_noise(tmp_path):
    class Empty(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trainer.strategy._step.drawn.chunks = ()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert math.isnan(outputs["loss"])

    model = Model()
    before = weights(model).clone()
    run = trainer(tmp_path, callbacks=[Empty()], max_epochs=1)
    run.fit(model)
    assert model.sizes == []
    assert run.strategy.ledger.steps == 4
    assert (weights(model) != before).all()


def test_every_step_adds_fresh_noise(tmp_path):
    noise = []

    class Catch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            noise.append(torch.cat([p.grad.flatten() for p in module.parameters()]))

    for _ in range(2):
        L.seed_everything(42, verbose=False)
        dp = config(noise_multiplier=1000.0)
        trainer(tmp_path, dp, callbacks=[Catch()], max_epochs=1).fit(Model())
    matrix = torch.stack(noise)
    assert (torch.corrcoef(matrix) - torch.eye(8)).abs().max() < 0.6
    expected = 1000.0 / 16
    assert 0.8 * expected < matrix.std() < 1.2 * expected


# ---------------------------------------------------------------- what the hooks see


def test_no_hook_sees_a_gradient_before_the_noise(tmp_path):
    """Any grad-norm logger would publish what the account does not contain."""
    seen = {}

    class Spy(Callback):
        def note(self, name, module):
            grads = [p.grad for p in module.parameters()]
            seen.setdefault(name, []).append(
                None if any(g is None for g in grads) else float(sum(g.norm() for g in grads))
            )

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.note("before_zero_grad", module)

        def on_before_backward(self, trainer, module, loss):
            self.note("before_backward", module)

        def on_after_backward(self, trainer, module):
            self.note("after_backward", module)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.note("before_optimizer_step", module)

    class Peeking(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            Spy.note(None, "training_step", self)
            return loss

    trainer(tmp_path, config(noise_multiplier=1e6), callbacks=[Spy()], max_epochs=1).fit(Peeking())
    for name, values in seen.items():
        for value in values:
            # Noise of a million swamps everything that a clipped gradient could add.
            assert value is None or value > 1e4, name
    assert seen["after_backward"] == seen["before_optimizer_step"]
    assert None not in seen["after_backward"]
    assert seen["before_backward"] == [None] * 4


def test_transfer_hooks_run_for_each_chunk(tmp_path):
    calls = []

    class Transfers(Model):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            calls.append(("before", len(batch[0])))
            return batch

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            calls.append(("move", len(batch[0])))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            calls.append(("after", len(x)))
            return x * 2, y

    model = Transfers()
    run = trainer(tmp_path, quiet(max_physical_batch_size=4), max_epochs=1, limit_val_batches=0)
    run.fit(model)
    assert len(calls) % 3 == 0
    rounds = []
    for i in range(0, len(calls), 3):
        names, sizes = zip(*calls[i : i + 3], strict=True)
        assert names == ("before", "move", "after")
        assert len(set(sizes)) == 1
        rounds.append(sizes[0])
    # First the preflight's trial rows, five, two or one; then the chunks, full but for the last,
    # and among them trial rows again.
    first_chunk = rounds.index(4)
    assert set(rounds[:first_chunk]) == {1, 2, 5}
    chunks = [size for size in rounds[first_chunk:] if size != 5]
    assert max(chunks) == 4
    assert sum(chunks) > 16
    assert "_on_before_batch_transfer" not in vars(model)


def test_public_entries_of_a_dict_are_handed_on(tmp_path):
    outputs = []

    class Dicts(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "number": batch_idx, "largest": batch[0].max()}

        def on_train_batch_end(self, output, batch, batch_idx):
            outputs.append(output)

    strategy = PrivateStrategy(quiet(), public_metrics=["number"])
    trainer(tmp_path, strategy=strategy, max_epochs=1).fit(Dicts())
    assert [output["number"] for output in outputs] == [0, 1, 2, 3]
    assert all(set(output) == {"loss", "number"} for output in outputs)


def test_workers_are_kept(tmp_path):
    model = Model()
    loader = DataLoader(
        rows(), batch_size=16, num_workers=1, persistent_workers=True, prefetch_factor=3
    )
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, loader)
    assert run.train_dataloader.num_workers == 1
    assert run.train_dataloader.prefetch_factor == 3
    assert run.strategy.ledger.steps == 8
    del run
    gc.collect()


# ---------------------------------------------------------------- telemetry


def test_training_metrics_are_withheld_and_others_pass(tmp_path, caplog):
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=logger, log_every_n_steps=1)
    with caplog.at_level(logging.WARNING):
        run.fit(Model())
    assert set(run.callback_metrics) == {"val_loss"}
    assert set(run.progress_bar_metrics) <= {"val_loss", "v_num"}
    assert "train_loss" not in Path(logger.log_dir, "metrics.csv").read_text()
    assert caplog.text.count("'train_loss'") == 1


def test_a_metric_that_was_declared_public_passes(tmp_path):
    run = trainer(tmp_path, strategy=PrivateStrategy(config(), public_metrics=["train_loss"]))
    run.fit(Model())
    assert "train_loss" in run.callback_metrics


def test_nothing_can_be_decided_by_a_withheld_metric(tmp_path):
    stop = EarlyStopping("train_loss", check_on_train_epoch_end=True)
    with pytest.raises(RuntimeError, match="train_loss"):
        trainer(tmp_path, callbacks=[stop]).fit(Model())


def test_validation_is_not_touched(tmp_path):
    model = Model()
    run = trainer(tmp_path)
    run.fit(model)
    after = weights(model).clone()
    run.validate(model, verbose=False)
    assert torch.equal(weights(model), after)
    assert run.strategy.ledger.steps == 8


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 1.0}, "max_grad_norm"),
        ({"accumulate_grad_batches": 2}, "expected_batch_size"),
        ({"overfit_batches": 2}, "overfit_batches"),
        ({"precision": "16-true"}, "HalfPrecision"),
    ],
)
def test_trainer_options_that_break_the_promise_are_refused(tmp_path, options, words):
    model = Model()
    before = weights(model).clone()
    with pytest.raises(UnsupportedTrainerOptionError, match=words):
        trainer(tmp_path, **options).fit(model)
    assert torch.equal(weights(model), before.to(weights(model)))


def test_a_gradient_scaler_is_refused(tmp_path):
    plugin = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UnsupportedTrainerOptionError, match="MixedPrecision"):
        trainer(tmp_path, plugins=[plugin]).fit(Model())


@pytest.mark.parametrize(
    ("option", "words"), [("devices", "devices=1"), ("num_nodes", "num_nodes=2")]
)
def test_more_than_one_device_is_refused(tmp_path, option, words):
    with pytest.raises(UnsupportedTrainerOptionError, match=words):
        trainer(tmp_path, **{option: 2})
    assert trainer(tmp_path).num_nodes == 1


def loaders():
    data = rows()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from data

    weighted = torch.utils.data.WeightedRandomSampler(torch.ones(ROWS), ROWS)
    again = torch.utils.data.RandomSampler(data, replacement=True)
    some = torch.utils.data.RandomSampler(data, num_samples=10)
    batches = [[0, 1], [2, 3]]
    return {
        "iterable": DataLoader(Stream(), batch_size=4),
        "weighted": DataLoader(data, batch_size=4, sampler=weighted),
        "with replacement": DataLoader(data, batch_size=4, sampler=again),
        "some": DataLoader(data, batch_size=4, sampler=some),
        "own batches": DataLoader(data, batch_sampler=batches),
        "no batching": DataLoader(data, batch_size=None),
        "a list": [data[0]],
    }


@pytest.mark.parametrize("name", loaders())
def test_loaders_whose_rate_would_be_wrong_are_refused(tmp_path, name):
    with pytest.raises(UnsupportedTrainerOptionError, match="plain DataLoader"):
        trainer(tmp_path).fit(Model(), loaders()[name])


def test_several_training_loaders_are_refused(tmp_path):
    class Two(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    pair = {"a": DataLoader(rows(), 16), "b": DataLoader(rows(), 16)}
    with pytest.raises(UnsupportedTrainerOptionError, match="one training DataLoader"):
        trainer(tmp_path).fit(Two(), pair)


def test_optimizers_that_release_twice_are_refused(tmp_path):
    class Newton(Model):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(UnsupportedTrainerOptionError, match="LBFGS"):
        trainer(tmp_path).fit(Newton())

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    class Sneaky(Model):
        def configure_optimizers(self):
            return Twice(self.parameters(), 0.1)

    run = trainer(tmp_path)
    with pytest.raises(UnsupportedTrainerOptionError, match="twice"):
        run.fit(Sneaky())
    assert run.strategy.ledger.steps == 1


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_not_one_optimizer_is_refused(tmp_path):
    class Nothing(Model):
        def configure_optimizers(self):
            return None

    with pytest.raises(UnsupportedTrainerOptionError, match=r"0 optimizers.*exactly one"):
        trainer(tmp_path).fit(Nothing())
    # Of two, Lightning says so itself before any strategy does; ours does not rely on it.
    two = [torch.optim.SGD(Model().parameters(), 0.1) for _ in range(2)]
    with pytest.raises(UnsupportedTrainerOptionError, match="2 optimizers"):
        require_optimizers(two)


def test_an_optimizer_is_not_told_the_loss(tmp_path):
    """One that chose its step by it would carry un-noised data into the weights."""
    seen = []

    class LineSearch(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            seen.append(float(loss))
            return loss

    class Searching(Model):
        def configure_optimizers(self):
            return LineSearch(self.parameters(), 0.1)

    trainer(tmp_path, max_epochs=1).fit(Searching())
    assert len(seen) == 4
    assert all(math.isnan(loss) for loss in seen)


def test_parameters_that_become_trainable_later_are_refused(tmp_path):
    class Unfreezing(Model):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(True)

    model = Unfreezing()
    run = trainer(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'net\.0\.weight'.*unfrozen"):
        run.fit(model)
    assert run.strategy.ledger.steps == 4


def test_parameters_outside_of_the_model_are_refused(tmp_path):
    outside = nn.Linear(5, 5)

    class Reaching(Model):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((outside(x), y), batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *outside.parameters()], 0.1)

    before = outside.weight.clone()
    with pytest.raises(UnsupportedModelError, match="of the optimizer"):
        trainer(tmp_path).fit(Reaching())
    assert torch.equal(outside.weight, before)


def test_parameters_that_are_frozen_later_stay_as_they_are(tmp_path):
    class Freezing(Model):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[0].requires_grad_(False)
                self.frozen = self.net[0].weight.clone()

    model = Freezing()
    trainer(tmp_path).fit(model)
    assert torch.equal(model.net[0].weight, model.frozen)
    assert not model.net[0].weight.requires_grad


@pytest.mark.parametrize("at_first", [False, True])
def test_parameters_that_are_thawed_within_a_step_get_no_gradient(tmp_path, at_first):
    """Autograd's own, without clipping and noise, stood in them where the optimizer found it."""

    class Thawing(Model):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[0].requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.net[0].requires_grad_(True)
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            self.net[0].requires_grad_(False)

        def optimizer_zero_grad(self, *arguments):
            pass

        def on_train_batch_end(self, *arguments):
            self.net[0].requires_grad_(False)

    model = Thawing()
    model.net[0].requires_grad_(at_first)
    before = model.net[0].weight.detach().clone()
    trainer(tmp_path).fit(model)
    assert torch.equal(model.net[0].weight, before)


def test_manual_optimisation_is_refused(tmp_path):
    class Manual(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedModelError, match="by hand"):
        trainer(tmp_path).fit(Manual())


@pytest.mark.parametrize("output", [None, "loss", {}, torch.ones(3), {"loss": None}])
def test_a_step_without_a_scalar_loss_is_refused(tmp_path, output):
    class Odd(Model):
        def training_step(self, batch, batch_idx):
            return output

    with pytest.raises(UnsupportedModelError, match="scalar"):
        trainer(tmp_path).fit(Odd())


@pytest.mark.filterwarnings("ignore:.*dataloader_iter.*:UserWarning")
def test_a_step_that_fetches_its_own_batches_is_refused(tmp_path):
    class Fetching(Model):
        def training_step(self, dataloader_iter):
            next(dataloader_iter)

    with pytest.raises(UnsupportedModelError, match="dataloader_iter"):
        trainer(tmp_path).fit(Fetching())


def test_what_the_preflight_refuses_is_refused_before_the_first_step(tmp_path):
    class Contrastive(Model):
        def training_step(self, batch, batch_idx):
            z = self.net(batch[0])
            return (z @ z.T).mean()

    model = Contrastive()
    before = weights(model).clone()
    run = trainer(tmp_path)
    with pytest.raises(UnsupportedModelError, match="mixed in the loss"):
        run.fit(model)
    assert torch.equal(weights(model), before)
    assert run.strategy.ledger.steps == 0
    model.net(torch.ones(1, 5)).sum().backward()  # the hooks are off again
    assert model.net[0].weight.grad is not None


# ---------------------------------------------------------------- the budget


def test_a_calibrated_run_spends_its_budget(tmp_path):
    dp = config(noise_multiplier=None, target_epsilon=2.0)
    run = trainer(tmp_path, dp, max_epochs=3)
    run.fit(Model())
    assert run.strategy.ledger.steps == 12
    assert 1.99 < run.strategy.ledger.epsilon() <= 2.0


@pytest.mark.parametrize(
    ("options", "planned", "steps"),
    [
        ({"max_epochs": 3, "limit_train_batches": 2}, None, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, None, 4),
        ({"max_epochs": 5, "max_steps": 7}, None, 7),
        ({"max_epochs": -1, "max_steps": 3}, None, 3),
        ({"max_epochs": 1}, 6, 24),
    ],
)
def test_the_plan_is_what_the_trainer_will_do(tmp_path, options, planned, steps):
    dp = config(noise_multiplier=None, target_epsilon=4.0, planned_epochs=planned)
    run = trainer(tmp_path, dp, **options)
    run.fit(Model())
    account = run.strategy.ledger
    assert account.affords_a_step(4.0) == (planned is not None)
    assert 3.99 < account.epsilon(more_steps=steps - account.steps) <= 4.0


def test_an_endless_run_cannot_be_calibrated(tmp_path):
    dp = config(noise_multiplier=None, target_epsilon=4.0)
    with pytest.raises(ConfigError, match="planned_epochs"):
        trainer(tmp_path, dp, max_epochs=-1).fit(Model())


def test_training_stops_before_the_budget_is_exceeded(tmp_path):
    saved = []

    class Saw(ModelCheckpoint):
        def on_validation_end(self, trainer, module):
            saved.append(trainer.global_step)
            super().on_validation_end(trainer, module)

    run = trainer(tmp_path, config(target_epsilon=4.0), max_epochs=100, callbacks=[Saw(tmp_path)])
    run.fit(Model())
    account = run.strategy.ledger
    assert 0 < account.steps < 400
    assert account.epsilon() <= 4.0 < account.epsilon(more_steps=1)
    assert run.global_step == account.steps == saved[-1]  # validated and saved at the very end


def test_a_run_that_is_made_to_go_on_is_stopped_by_an_error(tmp_path):
    class GoesOn(L.Callback):
        def on_train_batch_end(self, trainer, *rest):
            trainer.should_stop = False

    run = trainer(tmp_path, config(target_epsilon=4.0), max_epochs=100, callbacks=[GoesOn()])
    model = Model()
    with pytest.raises(BudgetExhaustedError, match="not taken"):
        run.fit(model)
    assert run.strategy.ledger.epsilon() <= 4.0


def test_a_run_marked_insecure_is_never_private(tmp_path):
    run = trainer(tmp_path, config(insecure_seed=1))
    run.fit(Model())
    assert run.strategy.ledger.epsilon() == math.inf
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["lightning_secure"]["privacy"]
    assert state["insecure"] == ["insecure_seed"]


def test_a_run_with_secure_noise_says_so(tmp_path, monkeypatch):
    run = trainer(tmp_path, config(secure_noise=True))
    # Neither draws nor noise may come from it.
    monkeypatch.setattr("numpy.random.default_rng", None)
    run.fit(Model())
    path = run.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["lightning_secure"]["privacy"]
    assert state["secure_noise"] is True
    assert run.strategy._step.noise._secure


def test_a_seeded_run_repeats_itself(tmp_path):
    def trained():
        model = Model()
        trainer(tmp_path, config(insecure_seed=5)).fit(model)
        return weights(model)

    assert torch.equal(trained(), trained())


# ---------------------------------------------------------------- checkpoints


def checkpoint_of(run):
    return run.checkpoint_callback.best_model_path


def test_a_resumed_run_goes_on_with_its_account(tmp_path):
    run = trainer(tmp_path)
    run.fit(Model())
    again = trainer(tmp_path, max_epochs=4)
    model = Model()
    again.fit(model, ckpt_path=checkpoint_of(run), weights_only=True)
    assert again.strategy.ledger.steps == again.global_step == 16
    assert again.strategy.ledger.run_id == run.strategy.ledger.run_id
    assert again.strategy.ledger.epsilon() > run.strategy.ledger.epsilon()


def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path):
    every = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    run = trainer(tmp_path, callbacks=[every], max_epochs=1)
    run.fit(Model())
    (middle,) = tmp_path.glob("*step=3.ckpt")
    again = trainer(tmp_path, max_epochs=2, callbacks=[every])
    again.fit(Model(), ckpt_path=middle, weights_only=True)
    assert again.global_step == 8
    assert again.strategy.ledger.steps == 9  # with the one that the first run took after it


def test_every_checkpoint_has_the_account_weights_only_ones_too(tmp_path):
    callback = ModelCheckpoint(tmp_path / "c", save_weights_only=True)
    run = trainer(tmp_path, callbacks=[callback])
    run.fit(Model())
    run.save_checkpoint(tmp_path / "by-hand.ckpt", weights_only=True)
    for path in (callback.best_model_path, tmp_path / "by-hand.ckpt"):
        state = torch.load(path, weights_only=True)
        assert state["lightning_secure"]["privacy"]["releases"] == [[1.0, 0.25, 8]]


@pytest.mark.parametrize("damage", ["removed", "emptied", "garbled", "plain"])
def test_resuming_without_an_account_is_refused(tmp_path, damage):
    run = trainer(tmp_path)
    run.fit(Model())
    state = torch.load(checkpoint_of(run), weights_only=True)
    match damage:
        case "removed":
            del state["lightning_secure"]
        case "emptied":
            state["lightning_secure"] = {}
        case "garbled":
            state["lightning_secure"]["privacy"]["releases"] = "none"
        case _:
            state["lightning_secure"] = None
    torch.save(state, tmp_path / "x.ckpt")
    model = Model()
    before = weights(model).clone()
    with pytest.raises(LedgerError):
        trainer(tmp_path, max_epochs=4).fit(model, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(weights(model), before)


def test_a_checkpoint_without_an_account_can_be_validated(tmp_path):
    plain = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    plain.fit(Model())
    run = trainer(tmp_path)
    run.validate(Model(), ckpt_path=checkpoint_of(plain), verbose=False, weights_only=True)
    assert run.strategy.ledger is None
    run.strategy.connect(Model())


def test_a_run_does_not_resume_under_another_promise(tmp_path):
    run = trainer(tmp_path)
    run.fit(Model())
    for change in ({"max_grad_norm": 2.0}, {"noise_multiplier": 0.5}, {"delta": 1e-3}):
        with pytest.raises(LedgerError, match="another promise"):
            trainer(tmp_path, config(**change), max_epochs=4).fit(
                Model(), ckpt_path=checkpoint_of(run), weights_only=True
            )


def test_a_module_that_was_trained_before_goes_on_with_its_account(tmp_path):
    model = Model()
    trainer(tmp_path).fit(model)
    again = trainer(tmp_path)
    again.fit(model)
    assert again.strategy.ledger.steps == 16
    third = trainer(tmp_path)
    third.fit(copy.deepcopy(model))
    assert third.strategy.ledger.steps == 24
    assert again.strategy.ledger.steps == 16
    fresh = trainer(tmp_path)
    fresh.fit(Model())
    assert fresh.strategy.ledger.steps == 8


def test_a_module_pickled_while_it_trains_holds_nothing_unnoised(tmp_path):
    data = rows().tensors[0]
    pickles = []

    class Pickle(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            pickles.append(pickle.dumps(module.net))

    trainer(tmp_path, callbacks=[Pickle()], max_epochs=1).fit(Model())
    assert pickles
    for row in data:
        assert not any(row.numpy().tobytes() in text for text in pickles)


def test_the_strategy_can_be_used_for_another_model(tmp_path):
    strategy = PrivateStrategy(config())
    # Lightning takes a used strategy again only if the accelerator is left to it.
    first = trainer(tmp_path, strategy=strategy, max_epochs=1, accelerator="auto")
    first.fit(Model())
    second = trainer(tmp_path, strategy=strategy, max_epochs=1, accelerator="auto")
    second.fit(Model())
    assert strategy.ledger.steps == 4


def test_schedules_that_ask_for_the_number_of_steps_get_it(tmp_path):
    class OneCycle(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            self.total = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=self.total)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    model = OneCycle()
    run = trainer(tmp_path, config(noise_multiplier=None, target_epsilon=3.0))
    run.fit(model)
    assert model.total == run.global_step == 8
    assert 2.99 < run.strategy.ledger.epsilon() <= 3.0


def test_dataset_of_lightnings_demos_in_batches(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(BoringModel(), DataLoader(RandomDataset(32, 100), batch_size=10))
    assert run.global_step == 10
