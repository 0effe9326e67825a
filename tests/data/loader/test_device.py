from __future__ import annotations

import torch

from lightning_secure.data.loader.device import on_device


class Stream:
    """Stands in for a CUDA stream, which this machine may not have; it records who waits when."""

    def __init__(self):
        self.log = []

    def copy(self, batch):
        number = int(batch["x"])
        self.log.append(("copy", number))
        return {"x": batch["x"].clone()}, number

    def hand_over(self, batch, done):
        assert int(batch["x"]) == done
        self.log.append(("wait", done))


def test_the_next_copy_is_under_way_before_a_batch_is_handed_over():
    stream = Stream()
    source = ({"x": torch.tensor(i)} for i in range(3))
    for batch in on_device(source, stream):
        stream.log.append(("use", int(batch["x"])))
    assert stream.log == [
        ("copy", 0), ("copy", 1), ("wait", 0), ("use", 0),
        ("copy", 2), ("wait", 1), ("use", 1), ("wait", 2), ("use", 2),
    ]  # fmt: skip


def test_no_batch_is_no_copy():
    assert list(on_device([], Stream())) == []
