"""What trial runs are compared with takes little memory, and is not what they change."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_secure.privacy.checks.snapshot import copied, difference, preserved


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained(model):
    """Take a step with momentum, and return the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return optimizer


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [tensor for item in items for tensor in tensors(item)]


def test_weights_and_moments_are_copied_once(model):
    optimizer = trained(model)
    checkpoint = {"state_dict": model.state_dict(), "optimizers": [optimizer.state_dict()]}
    with preserved(model, [optimizer]) as kept:
        copies = tensors(copied(checkpoint, kept.of))
        again = tensors(copied(checkpoint, kept.of))
    assert len(copies) == 9 + 6
    assert all(one is other for one, other in zip(copies, again, strict=True))
    theirs = {tensor.data_ptr() for tensor in tensors(checkpoint)}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in copies)


def test_what_changes_is_seen_and_put_back(model):
    optimizer = trained(model)
    before = copied({"m": model.state_dict(), "o": optimizer.state_dict()})
    with preserved(model, [optimizer]) as kept:
        inside = copied({"m": model.state_dict(), "o": optimizer.state_dict()}, kept.of)
        assert difference(before, inside) is None
        for parameter in model.parameters():
            parameter.data += 1
        optimizer.state_dict()["state"][0]["momentum_buffer"].add_(1)
        now = copied({"m": model.state_dict(), "o": optimizer.state_dict()}, Tensor.detach)
        assert difference(inside["m"], now["m"]) == "0.weight"
        assert difference(inside["o"], now["o"]) == "state.0.momentum_buffer"
    after = copied({"m": model.state_dict(), "o": optimizer.state_dict()})
    assert difference(before, after) is None


def test_a_part_is_not_taken_for_the_whole(model):
    weight = model[0].weight
    parts = {
        "rows": weight.detach()[:2],
        "turned": weight.detach().T,
        "bits": weight.view(torch.int32),
    }
    with preserved(model) as kept:
        assert difference(copied(parts), copied(parts, kept.of)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is done")
def test_memory_between_what_is_held_goes_back_to_the_system():
    script = """
from pathlib import Path
from lightning_secure.privacy.checks.snapshot import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

pieces = [bytearray(60_000) for _ in range(2_000)]
pieces = pieces[::50]
before = resident()
return_freed_memory()
print(before - resident())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True)
    assert int(run.stdout) > 60_000_000
