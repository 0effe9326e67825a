"""Whatever is sealed comes back, bit for bit, in any order, and to the second reader as well."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_secure import Column, EncryptedShardDataset, EncryptedShardWriter, Schema
from lightning_secure.data.format.columns import DTYPES

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def numbers(draw, dtype, *shape):
    """Any bits at all: NaN with a payload, infinities, negative zeros, subnormal numbers."""
    size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype == "bool":
        raw = bytearray(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(raw, dtype=DTYPES[dtype]).view(*shape)


@st.composite
def tables(draw):
    rows = draw(st.integers(1, 40))
    columns, values = [], {}
    names = st.text(st.characters(codec="utf-8", exclude_characters="\x7f", min_codepoint=32))
    names = names.filter(lambda name: 0 < len(name) <= 128)
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        kind = draw(st.sampled_from(["tensor", "ragged", "bytes", "string"]))
        if kind in ("bytes", "string"):
            columns.append(Column(name, kind))
            one = st.binary(max_size=12) if kind == "bytes" else TEXTS
            values[name] = draw(st.lists(one, min_size=rows, max_size=rows))
            continue
        dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
        columns.append(Column(name, kind, dtype, shape))
        if kind == "tensor":
            values[name] = numbers(draw, dtype, rows, *shape)
        else:
            lengths = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
            values[name] = [numbers(draw, dtype, length, *shape) for length in lengths]
    return Schema(tuple(columns)), values, rows


def raw(value):
    if isinstance(value, torch.Tensor):
        return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return value.encode() if isinstance(value, str) else value


@given(tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_rows_come_back_bit_for_bit(keys, table, data):
    schema, values, rows = table
    segment = data.draw(st.sampled_from([1, 16, 100, 4096]))
    shard = segment * data.draw(st.sampled_from([1, 7, 1000]))
    parts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=2))})
    root = Path(tempfile.mkdtemp())
    try:
        with EncryptedShardWriter(
            root, split="train", keys=keys, schema=schema, segment_bytes=segment,
            shard_bytes=shard, allow_nonfinite=True,
        ) as writer:  # fmt: skip
            for start, stop in itertools.pairwise(parts):
                writer.write_batch({name: column[start:stop] for name, column in values.items()})
        sealed = EncryptedShardDataset(root, split="train", keys=keys, output="dict")
        assert sealed.schema == schema
        assert len(sealed) == rows
        order = data.draw(st.lists(st.integers(0, rows - 1), max_size=50))
        found = sealed.__getitems__(order).batch() if order else {}
        for name, column in found.items():
            assert [raw(value) for value in column] == [raw(values[name][row]) for row in order]
            kind = next(c for c in schema.columns if c.name == name)
            if kind.kind in ("tensor", "ragged"):
                assert {value.dtype for value in column} == {kind.torch_dtype}
                assert [v.shape for v in column] == [values[name][row].shape for row in order]
        expected = {name: [raw(value) for value in column] for name, column in values.items()}
        assert reference.read_dataset(root, "train", keys._path) == expected
        sealed.close()
    finally:
        shutil.rmtree(root)


def test_many_rows_in_many_segments(tmp_path, keys):
    x = torch.arange(20_000, dtype=torch.int32).view(10_000, 2)
    names = [f"{i}" * (i % 3) for i in range(10_000)]
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, segment_bytes=64, shard_bytes=16_384
    ) as writer:
        for start in range(0, 10_000, 1_111):
            stop = start + 1_111
            writer.write_batch({"x": x[start:stop], "name": names[start:stop]})
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert sum(shard.segments for shard in data.entry.shards) > 1_000
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(1)).tolist()
    found, texts = data.__getitems__(order).batch()
    assert torch.equal(found, x[torch.tensor(order)])
    assert texts == [names[row] for row in order]


def test_a_tensor_of_bytes_that_says_it_is_boolean_is_sealed_as_truth(tmp_path, keys):
    """Any byte but zero is true for torch; on the disk there is one form of true."""
    odd = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write_batch({"x": odd})
    (x,) = EncryptedShardDataset(tmp_path, split="train", keys=keys).__getitems__(range(4)).batch()
    assert x.view(torch.uint8).tolist() == [0, 1, 1, 1]
