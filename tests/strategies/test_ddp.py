"""Two processes on the CPU that train together."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from launch import launch
from lightning.pytorch.strategies import StrategyRegistry
from scenarios import rows
from torch import nn
from torch.nn import functional as F

from lightning_secure.errors import ConfigError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.collective import answered
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.sampling import PoissonBatchSampler, seed_of_rank
from lightning_secure.strategies.ddp import PrivateDDPStrategy
from lightning_secure.strategies.fsdp import PrivateFSDPStrategy
from lightning_secure.strategies.private import PrivateStrategy
from lightning_secure.strategies.registry import register_strategies

results = partial(launch, Path(__file__).parent / "ddp_run.py")
CONFIG = DPConfig(noise_multiplier=1000.0, delta=1e-5, max_grad_norm=0.3)


# ---------------------------------------------------------------- the sum


@pytest.fixture(scope="module")
def without_noise(tmp_path_factory):
    return results(tmp_path_factory.mktemp("quiet"), "quiet", "layers")


@pytest.fixture(scope="module")
def quiet(without_noise):
    return without_noise["quiet"]


@pytest.mark.parametrize("clipping", ["quiet", "layers"])
def test_both_processes_together_are_dp_sgd_by_hand(without_noise, clipping):
    """The draws of both, clipped and averaged by functorch as one batch."""
    quiet = without_noise[clipping]
    layers, bound = (["0.", "2."], 0.3 / 2**0.5) if clipping == "layers" else ([""], 0.3)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.utils.vector_to_parameters(quiet[0]["first"].clone(), net.parameters())
    x, y, _ = rows().tensors

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(net, parameters, (x[None],)), y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    sizes = []
    for one, other in zip(quiet[0]["drawn"], quiet[1]["drawn"], strict=True):
        drawn = one + other
        sizes.append((len(one), len(other)))
        if not drawn:
            continue
        parameters = {n: p.detach() for n, p in net.named_parameters()}
        grads = per_sample(parameters, x[drawn], y[drawn])
        for layer in layers:
            own = [(n, p) for n, p in net.named_parameters() if n.startswith(layer)]
            norms = sum(grads[name].flatten(1).square().sum(1) for name, _ in own).sqrt()
            factors = (bound / norms).clamp(max=1)
            for name, parameter in own:
                parameter.data -= 0.1 * torch.einsum("b,b...->...", factors, grads[name]) / 8
    assert sizes[0][1] == 0 < sizes[0][0]  # an empty draw in one process
    assert sizes[2] == (0, 0)  # and in both
    by_hand = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(quiet[0]["weights"], by_hand, rtol=1e-6, atol=1e-6)
    assert torch.equal(quiet[0]["weights"], quiet[1]["weights"])


def test_all_begin_with_the_weights_of_the_first_process(quiet):
    assert torch.equal(quiet[0]["first"], quiet[1]["first"])


def test_the_batch_size_is_that_of_one_device(quiet):
    assert [rank["public"] for rank in quiet] == [(8, 33, 5)] * 2  # twice the loader's four


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_row_is_drawn_by_one_process_at_the_same_rate(world):
    samplers = [
        PoissonBatchSampler(
            5, sample_rate=0.3, steps=3000, seed=seed_of_rank(1, rank), rank=rank, world_size=world
        )
        for rank in range(world)
    ]
    counts = torch.zeros(5)
    for draws in zip(*samplers, strict=True):
        together = [row for draw in draws for row in draw]
        assert len(set(together)) == len(together)
        counts[together] += 1
    assert ((counts / 3000 - 0.3).abs() < 5 * (0.21 / 3000) ** 0.5).all()


# ---------------------------------------------------------------- the noise and the account


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return results(tmp_path_factory.mktemp("noisy"), "noisy", "resumed")


def test_all_have_the_same_weights_to_the_bit(noisy):
    one, other = noisy["noisy"]
    assert torch.equal(one["grads"], other["grads"])
    assert torch.equal(one["weights"], other["weights"])
    assert one["wrapped"] == "Model"


def test_the_noise_is_in_the_sum_once(noisy):
    grads = noisy["noisy"][0]["grads"] * 8 / (1000 * 0.3)
    assert 0.92 < float(grads.std()) < 1.08  # 660 numbers; twice the variance would be 1.41
    assert (torch.corrcoef(grads) - torch.eye(len(grads))).abs().max() < 0.55


def test_processes_draw_apart_whatever_seed_everything_was_given(noisy):
    one, other = (rank["drawn"] for rank in noisy["noisy"])
    assert all(row % 2 == 0 for draw in one for row in draw)
    assert all(row % 2 == 1 for draw in other for row in draw)
    assert [[row + 1 for row in draw] for draw in one] != other


def test_there_is_one_account_and_one_journal(noisy):
    one, other = noisy["noisy"]
    assert one["ledger"] == other["ledger"]
    assert [release[2] for release in one["ledger"]["releases"]] == [10]
    assert one["journals"] == [f"{one['ledger']['run_id']}.journal"]
    saved = torch.load(one["saved"], weights_only=True)
    assert Ledger.from_checkpoint(saved).state_dict() == one["ledger"]


def test_metrics_of_validation_are_those_of_all_rows(noisy):
    for rank in noisy["noisy"]:
        assert rank["metrics"]["val_loss"] == pytest.approx(rank["by_hand"], rel=1e-5)
        assert rank["metrics"]["constant_epoch"] == 1.0
        assert "withheld" not in rank["metrics"]


def test_a_run_goes_on_with_its_account(noisy):
    one, other = noisy["resumed"]
    assert one["ledger"] == other["ledger"]
    assert one["ledger"]["run_id"] == noisy["noisy"][0]["ledger"]["run_id"]
    assert [release[2] for release in one["ledger"]["releases"]] == [15]
    assert torch.equal(one["weights"], other["weights"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_goes_on_in_another_number_of_processes(noisy):
    path = Path(noisy["noisy"][0]["saved"])

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(rows(), batch_size=4, shuffle=True)
    trainer = L.Trainer(
        strategy=PrivateStrategy(CONFIG), accelerator="cpu", max_epochs=4, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=path.parent.parent,
    )  # fmt: skip
    trainer.fit(Model(), loader, ckpt_path=path, weights_only=True)
    ledger = trainer.strategy.ledger
    assert (ledger.public.expected_batch_size, ledger.public.steps_per_epoch) == (8, 5)
    assert ledger.steps == 20 + 5  # the other branch's epoch is paid for as well


# ---------------------------------------------------------------- failing together

ELSEWHERE = ("PrivacyError", "another process of this run has failed")


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("fails_later", ELSEWHERE, ("ValueError", "out of memory")),
        ("fails_outside", ("PrivacyError", "has gone"), ("ValueError", "outside of the step")),
        ("contrastive", *[("UnsupportedModelError", "rows are mixed in the loss")] * 2),
        ("gathers", *[("UnsupportedModelError", "exchanges something with other")] * 2),
        ("uneven", *[("UnsupportedTrainerOptionError", "is 33 on rank 0, 34 on rank 1")] * 2),
        ("clipped", *[("UnsupportedTrainerOptionError", "gradient_clip_val")] * 2),
        ("journal", ("LedgerError", "cannot be begun"), ELSEWHERE),
        ("promises", *[("UnsupportedTrainerOptionError", "DPConfig(max_grad_norm=) is 0.3")] * 2),
    ],
)
def test_what_fails_in_one_process_fails_in_all(tmp_path, name, first, second):
    ranks = results(tmp_path, name)[name]
    for rank, (kind, text) in zip(ranks, (first, second), strict=True):
        assert rank["raised"] is not None
        assert rank["raised"][0] == kind
        assert text in rank["raised"][1]
        assert rank["seconds"] < 20
        assert rank["steps"] == (2 if name.startswith("fails") else 0)


def test_where_one_process_is_terminated_all_end_at_once(tmp_path):
    """Its scheduler ends one machine; no process waits for the timeout of 15 seconds."""
    first, second = results(tmp_path, "terminated")["terminated"]
    assert first["raised"][0] == "PrivacyError"
    assert second["raised"][0] == "SIGTERMException"
    assert max(first["seconds"], second["seconds"]) < 14


def test_memory_that_runs_out_is_not_taken_for_a_process_that_has_gone():
    def full():
        raise torch.OutOfMemoryError("no room for all weights")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        answered(full)


def test_the_budget_stops_all_at_the_same_step(tmp_path):
    one, other = results(tmp_path, "budget")["budget"]
    assert one["raised"] is other["raised"] is None
    ledger = Ledger.from_state_dict(one["ledger"])
    assert one["steps"] == other["steps"] == ledger.steps > 0
    assert ledger.epsilon() <= 4.0


def test_a_metric_of_the_module_is_one_release_that_all_have_paid_for(tmp_path):
    found = results(tmp_path, "metrics", "too_dear")
    one, other = found["metrics"]
    assert one["accuracy"] == other["accuracy"]
    assert len(set(one["accuracy"])) == 2
    step, accuracy = (1.0, 8 / 33), (9.0, 1.0)
    paid = [(*step, 5), (*accuracy, 1), (*step, 5), (*accuracy, 2)]
    assert one["releases"] == other["releases"] == paid
    assert sorted(one["journal"]) == [(*step, 10), (*accuracy, 3)]
    for rank in (one, other):  # which have numbers of chunks of their own
        assert rank["in_steps"]
        assert all(map(math.isnan, rank["in_steps"]))
    for rank in found["too_dear"]:
        assert all(map(math.isnan, rank["accuracy"]))
        assert rank["releases"] == [(*step, 10)]


def test_no_process_publishes_a_value_with_noise_of_its_own():
    with pytest.raises(UnsupportedTrainerOptionError, match="Nothing was released"):
        PrivateDDPStrategy(CONFIG).release(torch.ones(3), bounds=(0, 1), noise_multiplier=1.0)


# ---------------------------------------------------------------- names


@pytest.fixture
def _registry():
    before = dict(StrategyRegistry)
    yield
    StrategyRegistry.clear()
    StrategyRegistry.update(before)


@pytest.mark.usefixtures("_registry")
def test_a_name_needs_a_promise_and_then_stands_for_it():
    for name in ("private", "private_ddp"):
        with pytest.raises(ConfigError, match="there is no default"):
            L.Trainer(strategy=name, accelerator="cpu", logger=False)
    with pytest.raises(ConfigError, match="takes a DPConfig, not dict"):
        register_strategies({"target_epsilon": 3.0})
    register_strategies(CONFIG, public_metrics=["lr"])
    for name, kind in (("private", PrivateStrategy), ("private_ddp", PrivateDDPStrategy)):
        strategy = L.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False).strategy
        assert type(strategy) is kind
        assert strategy.config is CONFIG
        assert "lr" in strategy._step.public


@pytest.mark.parametrize("kind", [PrivateDDPStrategy, PrivateFSDPStrategy])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"find_unused_parameters": True}, "'find_unused_parameters'. .*wraps no torch DDP"),
        ({"released_metrics": {}, "what": 1}, "'released_metrics', 'what'. .*PrivateStrategy"),
    ],
)
def test_an_argument_that_is_not_known_is_named(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        kind(CONFIG, **options)


@pytest.mark.parametrize("options", [{"clipping": "adaptive"}, {"mechanism": "banded", "bands": 2}])
def test_what_one_process_would_have_to_do_for_all_is_refused(options):
    with pytest.raises(UnsupportedTrainerOptionError, match="PrivateDDPStrategy does not"):
        PrivateDDPStrategy(replace(CONFIG, **options))
