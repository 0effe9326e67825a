"""Two processes on the CPU that train a model that is sharded over both."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from fsdp_run import WithAdam, encrypted, plain_net
from launch import launch
from scenarios import rows
from torch import nn
from torch.nn import functional as F

from lightning_secure.crypto.providers.local import LocalKeyProvider
from lightning_secure.errors import ConfigError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.fsdp import PrivateFSDPStrategy
from lightning_secure.strategies.private import PrivateStrategy

results = partial(launch, Path(__file__).parent / "fsdp_run.py")


# ---------------------------------------------------------------- the sum


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    return results(tmp_path_factory.mktemp("quiet"), "quiet")["quiet"]


def test_both_processes_together_are_dp_sgd_by_hand(quiet):
    """The draws of both, clipped and averaged by functorch as one batch."""
    net = plain_net()
    nn.utils.vector_to_parameters(quiet[0]["first"].clone(), net.parameters())
    x, y, _ = rows().tensors

    def loss(parameters, x, y):
        out = torch.func.functional_call(net, parameters, (x[None],))
        return F.binary_cross_entropy_with_logits(out[:, 0], y[None])

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for one, other in zip(quiet[0]["drawn"], quiet[1]["drawn"], strict=True):
        drawn = one + other
        if not drawn:
            continue
        parameters = {n: p.detach() for n, p in net.named_parameters()}
        grads = per_sample(parameters, x[drawn], y[drawn].float())
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()).sqrt()
        factors = (0.3 / norms).clamp(max=1)
        for name, parameter in net.named_parameters():
            parameter.data -= 0.1 * torch.einsum("b,b...->...", factors, grads[name]) / 8
    by_hand = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(quiet[0]["weights"], by_hand, rtol=1e-6, atol=1e-6)
    assert torch.equal(quiet[0]["weights"], quiet[1]["weights"])
    assert not torch.equal(quiet[0]["weights"], quiet[0]["first"])


def test_processes_have_numbers_of_chunks_of_their_own(quiet):
    one, other = (rank["chunks"] for rank in quiet)
    assert one[0] > other[0] == 0
    assert 0 < one[1] != other[1] > 0
    assert one[2] == other[2] == 0 == one[3] < other[3]


def test_each_process_keeps_a_part_of_the_weights(quiet):
    assert quiet[0]["sharded"][:4] == [(4, 5), (4,), (3, 4), (2,)]
    assert [rank["sharded"][-1] for rank in quiet] == [(1,), (0,)]
    assert [float(rank["shift"]) for rank in quiet] == [0, 0]  # the first one's buffers


def test_shards_that_are_offloaded_are_refused(quiet):
    assert "Leave CPUOffloadPolicy out" in quiet[0]["offloaded"]


# ---------------------------------------------------------------- noise, account, checkpoints


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noisy")
    (folder / "noisy").mkdir()
    LocalKeyProvider.generate(folder / "noisy" / "keys")
    return results(folder, "noisy", "resumed")


def test_the_noise_is_in_the_sum_once(noisy):
    one, other = noisy["noisy"]
    assert torch.equal(one["grads"], other["grads"])
    grads = one["grads"] * 8 / (1000 * 0.3)
    assert grads.shape == (10, 85)
    assert 0.92 < float(grads.std()) < 1.08  # twice the variance would be 1.41
    assert (torch.corrcoef(grads) - torch.eye(len(grads))).abs().max() < 0.55
    halves = grads[:, :20], grads[:, 20:40]  # of one weight, in one process and in the other
    together = torch.stack([half.flatten() for half in halves])
    assert float(torch.corrcoef(together)[0, 1].abs()) < 0.35


def test_a_run_goes_on_with_its_account_weights_and_optimizer(noisy):
    before, after = noisy["noisy"][0], noisy["resumed"]
    for rank in after:
        assert torch.equal(rank["weights"], before["weights"])
        assert torch.equal(rank["momentum"], before["momentum"])
        assert rank["ledger"] == after[0]["ledger"]
    assert after[0]["ledger"]["run_id"] == before["ledger"]["run_id"]
    assert [release[2] for release in after[0]["ledger"]["releases"]] == [15]


class Plain(WithAdam):
    """The same module on one device, where nothing shards it."""

    def configure_model(self):
        pass


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_encrypted_and_goes_on_on_one_device(noisy):
    before, path = noisy["noisy"][0], Path(noisy["noisy"][0]["saved"])
    assert not path.read_bytes().startswith(b"PK")
    io = encrypted(path.parent.parent)
    saved = io.load_checkpoint(path)
    assert Ledger.from_checkpoint(saved).state_dict() == before["ledger"]
    model = Plain()
    model.load_state_dict(saved["state_dict"])
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before["weights"])
    trainer = L.Trainer(
        strategy=PrivateStrategy(DPConfig(noise_multiplier=1000.0, delta=1e-5, max_grad_norm=0.3)),
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, plugins=io,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
        default_root_dir=path.parent.parent,
    )  # fmt: skip
    trainer.fit(Plain(), ckpt_path=path, weights_only=True)
    assert trainer.strategy.ledger.steps == 20 + 5  # the other branch's epoch is paid for as well


# ---------------------------------------------------------------- what is refused, and together


ELSEWHERE = ("PrivacyError", "another process of this run has failed")
REFUSED = {
    "contrastive": [("UnsupportedModelError", "rows are mixed in the loss")] * 2,
    "unsharded": [("UnsupportedModelError", "'net.2.0.weight' is trainable and not sharded")] * 2,
    "nothing": [("UnsupportedModelError", "'net.0.weight' is trainable and not sharded")] * 2,
    "replicated": [("UnsupportedModelError", r"on a mesh of shape (2, 1)")] * 2,
    "alone": [("UnsupportedModelError", r"on a mesh of shape (1,), with 2 processes")] * 2,
    "own_layer": [("UnsupportedModelError", "not given to fully_shard")] * 2,
    "mixed": [("UnsupportedTrainerOptionError", "MixedPrecisionPolicy")] * 2,
    "memory": [("UnsupportedTrainerOptionError", "that is not sharded")] * 2,
    "fails_later": [ELSEWHERE, ("ValueError", "out of memory")],
    "fails_outside": [("PrivacyError", "has gone"), ("ValueError", "outside of the step")],
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    names = ["layers", "bf16", "bf16_mixed", "again", *REFUSED]
    return results(tmp_path_factory.mktemp("refused"), *names)


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_in_one_process_fails_in_all(refused, name):
    for rank, (kind, text) in zip(refused[name], REFUSED[name], strict=True):
        assert rank["raised"] is not None
        assert rank["raised"][0] == kind
        assert text in rank["raised"][1]
        assert rank["steps"] == (2 if name.startswith("fails") else 0)


@pytest.mark.parametrize("name", ["layers", "bf16", "bf16_mixed"])
def test_layers_that_are_sharded_themselves_have_their_rules(refused, name):
    assert [(rank["raised"], rank["steps"]) for rank in refused[name]] == [(None, 5)] * 2


def test_a_step_that_failed_midway_leaves_a_model_that_can_be_trained(refused):
    for rank in refused["again"]:
        assert rank["raised"][0] in ("ValueError", "PrivacyError")
        assert rank["steps"] == 5
        assert torch.isfinite(rank["weights"]).all()
        assert rank["account"] == 2 + 5
        assert rank["changed"] == "LedgerError"


# ---------------------------------------------------------------- names


def test_the_name_needs_a_promise():
    with pytest.raises(ConfigError, match=r"there is no default. Pass .*PrivateFSDPStrategy"):
        L.Trainer(strategy="private_fsdp", accelerator="cpu", logger=False)


def test_what_other_strategies_clip_by_is_refused():
    config = DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=0.3, clipping="per_layer")
    with pytest.raises(UnsupportedTrainerOptionError, match="PrivateFSDPStrategy does not clip by"):
        PrivateFSDPStrategy(config)
