from __future__ import annotations

import gc

import numpy as np
import pytest

from lightning_secure.data.format.columns import Column
from lightning_secure.data.reading.batch_buffers import Buffers, Rows

X = Column("x", "tensor", "float32", (2,))


def assembled(buffers, value, count=8):
    rows = Rows([X], count, buffers)
    source = np.full((count, 2), value, "float32")
    rows.put([("x", 0)], np.arange(count), source.view("uint8").reshape(-1), count)
    return rows.values["x"]


def test_memory_is_used_again_once_nobody_looks_at_it():
    buffers = Buffers()
    first = assembled(buffers, 1.0)
    address = first.data_ptr()
    del first
    assert assembled(buffers, 2.0).data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda x: x,
        lambda x: x[3],
        lambda x: x[2:4].view(-1).unsqueeze(0),
        lambda x: x.numpy()[1:],
        lambda x: x.detach(),
        lambda x: x.untyped_storage(),
        lambda x: np.from_dlpack(x),
    ],
)
def test_what_is_kept_is_never_overwritten(keep):
    buffers = Buffers()
    kept = keep(assembled(buffers, 1.0))
    gc.collect()
    others = [assembled(buffers, 2.0) for _ in range(6)]
    del others
    gc.collect()
    for value in range(6):
        assembled(buffers, float(value))
    values = np.asarray(list(kept), dtype="uint8") if not hasattr(kept, "shape") else kept
    if hasattr(kept, "shape"):
        assert (np.asarray(values) == 1.0).all()
    else:
        assert (values.view("float32") == 1.0).all()


def test_a_larger_batch_gets_larger_memory_and_little_is_kept():
    buffers = Buffers()
    assembled(buffers, 1.0, count=2)
    assert assembled(buffers, 2.0, count=100).shape == (100, 2)
    many = [assembled(buffers, 3.0) for _ in range(20)]
    del many
    assert len(buffers._spare["x"]) == 3


@pytest.mark.parametrize(("length", "count"), [(1, 3), (1, 40), (70_000, 3), (70_000, 6)])
def test_rows_go_where_they_belong(length, count):
    column = Column("x", "tensor", "uint8", (length,))
    source = np.random.default_rng(0).integers(0, 256, (count, length), dtype="uint8")
    raw = np.concatenate([np.zeros(5, "uint8"), source.reshape(-1)])
    order = np.random.default_rng(1).permutation(count)
    rows = Rows([column], count, Buffers())
    rows.put([("x", 5)], order, raw, count)
    assert np.array_equal(rows.values["x"].numpy()[order], source)
    some = order[: count - 1]
    rows = Rows([column], count, Buffers())
    rows.put([("x", 5)], np.arange(count - 1), raw, count, some)
    assert np.array_equal(rows.values["x"].numpy()[: count - 1], source[some])
