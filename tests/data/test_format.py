from __future__ import annotations

import dataclasses
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_secure.crypto.segments import MAX_SEGMENTS
from lightning_secure.data.format.columns import (
    DTYPES,
    Column,
    Schema,
    decode_segment,
    encode_segment,
    segment_lengths,
)
from lightning_secure.data.format.header import HEADER_BYTES, Header
from lightning_secure.errors import DataError, IntegrityError, ShardCorruptedError

HEADER = Header(
    dataset_id=bytes(range(16)),
    shard_uuid=bytes(range(16, 32)),
    shard_number=3,
    segments=4,
    records=37,
    records_per_segment=10,
    segment_bytes=400,
    schema_digest=bytes(32),
    commitment=b"\1" * 32,
)
SIZE = HEADER_BYTES + 3 * 416 + 296


def test_a_header_comes_back():
    packed = HEADER.pack()
    assert len(packed) == HEADER_BYTES
    assert Header.unpack(packed, size=SIZE) == HEADER
    assert [HEADER.records_in(i) for i in range(4)] == [10, 10, 10, 7]
    assert HEADER.segment_offset(2) == HEADER_BYTES + 2 * 416


def test_the_header_lies_where_the_format_says():
    packed = HEADER.pack()
    assert packed[:8] == b"LSECSHRD"
    fields = {8: (2, 1), 10: (2, 1), 12: (4, 0), 48: (4, 3), 52: (4, 4), 56: (8, 37)}
    fields |= {64: (4, 10), 68: (4, 400)}
    for offset, (length, value) in fields.items():
        assert int.from_bytes(packed[offset : offset + length], "little") == value
    assert packed[16:48] == bytes(range(32))
    assert packed[72:136] == bytes(32) + b"\1" * 32
    assert not any(packed[136:])


@pytest.mark.parametrize("offset", [0, 7, 8, 9, 10, 12, 15, 136, 2000, HEADER_BYTES - 1])
def test_an_unknown_header_is_refused(offset):
    packed = bytearray(HEADER.pack())
    packed[offset] ^= 0x40
    with pytest.raises(ShardCorruptedError):
        Header.unpack(bytes(packed), size=SIZE)


@pytest.mark.parametrize(
    "changes",
    [
        {"segments": 0},
        {"segments": 5},
        {"segments": MAX_SEGMENTS + 1},
        {"records": 0},
        {"records": 30},
        {"records": 41},
        {"records_per_segment": 0},
        {"records_per_segment": 13},
        {"segment_bytes": 0},
        {"segment_bytes": 200},
        {"segment_bytes": 2**26},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(changes):
    packed = dataclasses.replace(HEADER, **changes).pack()
    with pytest.raises(ShardCorruptedError, match="contradicts"):
        Header.unpack(packed, size=SIZE)


@pytest.mark.parametrize("size", [0, HEADER_BYTES, HEADER_BYTES + 3 * 416 + 16, SIZE + 121])
def test_a_header_that_contradicts_the_size_is_refused(size):
    with pytest.raises(ShardCorruptedError, match="contradicts"):
        Header.unpack(HEADER.pack(), size=size)


def test_a_short_header_is_refused():
    with pytest.raises(ShardCorruptedError, match="not a shard"):
        Header.unpack(HEADER.pack()[:-1], size=SIZE)


# ---------------------------------------------------------------- columns and schemas


@pytest.mark.parametrize(
    "column",
    [
        ("x", "tensor", "complex64", ()),
        ("x", "tensor", "float32", (0,)),
        ("x", "tensor", "float32", (-1,)),
        ("x", "tensor", "float32", (2.0,)),
        ("x", "tensor", "float32", (2**31,)),
        ("x", "pickle", "uint8", ()),
        ("x", "string", "float32", ()),
        ("x", "bytes", "uint8", (3,)),
        ("x", "tensor", "uint8", (2**13, 2**13)),
        ("x", "ragged", "int8", (1,) * 61),
        ("", "string"),
        ("a\nb", "string"),
        ("a" * 129, "string"),
    ],
)
def test_a_column_that_cannot_be_stored_is_refused(column):
    with pytest.raises(DataError):
        Column(*column)


def test_a_schema_needs_columns_with_names_of_their_own():
    with pytest.raises(DataError):
        Schema(())
    with pytest.raises(DataError):
        Schema((Column("x", "string"), Column("x", "bytes")))


def test_a_schema_travels_as_json():
    schema = Schema((Column("x", "tensor", "float32", (3, 4)), Column("id", "string")))
    assert Schema.from_json(schema.to_json()) == schema
    assert Schema.from_json(schema.to_json()).digest == schema.digest
    assert schema.names == ("x", "id")
    assert not schema.fixed


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"name": "x", "kind": "string", "dtype": "uint8"},
        {"name": 1, "kind": "string", "dtype": "uint8", "shape": []},
        {"name": "x", "kind": ["string"], "dtype": "uint8", "shape": []},
        {"name": "x", "kind": "string", "dtype": None, "shape": []},
        {"name": "x", "kind": "string", "dtype": "uint8", "shape": "3"},
        {"name": "x", "kind": "string", "dtype": "uint8", "shape": [], "more": 1},
        {"name": "x", "kind": "tensor", "dtype": "object", "shape": []},
        {"name": "x", "kind": "tensor", "dtype": "float32", "shape": [2**31 - 1] * 3},
        {"name": "x", "kind": "ragged", "dtype": "float32", "shape": [1] * 61},
    ],
)
def test_a_malformed_schema_is_refused(entry):
    with pytest.raises(IntegrityError) as caught:
        Schema.from_json([entry])
    assert caught.value.__context__ is None


# ---------------------------------------------------------------- segments

shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def tables(draw):
    """A schema and rows for it."""
    rows = draw(st.integers(1, 6))
    columns, values = [], {}
    for number in range(draw(st.integers(1, 4))):
        name = f"c{number}"
        kind = draw(st.sampled_from(["tensor", "ragged", "bytes", "string"]))
        if kind == "bytes":
            columns.append(Column(name, kind))
            values[name] = draw(st.lists(st.binary(max_size=9), min_size=rows, max_size=rows))
        elif kind == "string":
            columns.append(Column(name, kind))
            texts = st.text(st.characters(codec="utf-8"), max_size=9)
            values[name] = draw(st.lists(texts, min_size=rows, max_size=rows))
        else:
            dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(shapes)
            columns.append(Column(name, kind, dtype, shape))
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

            def some(*size, dtype=dtype, generator=generator):
                return (torch.randn(size, generator=generator) * 9).to(DTYPES[dtype])

            if kind == "tensor":
                values[name] = some(rows, *shape)
            else:
                lengths = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
                values[name] = [some(length, *shape) for length in lengths]
    return Schema(tuple(columns)), values, rows


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return len(a) == len(b) and all(
        same(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@given(tables(), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_rows_come_back(table, padding):
    schema, values, rows = table
    plaintext = encode_segment(schema, values)
    assert len(plaintext) == segment_lengths(schema, values)(0, rows)
    decoded = decode_segment(schema, bytearray(plaintext), records=rows)
    assert all(same(values[name], decoded[name]) for name in schema.names)
    if not schema.fixed:
        padded = bytearray(plaintext + bytes(padding))
        assert all(
            same(values[n], v) for n, v in decode_segment(schema, padded, records=rows).items()
        )


@given(tables())
@settings(max_examples=50, deadline=None)
def test_the_lengths_of_parts_are_known_without_encoding(table):
    schema, values, rows = table
    length_of = segment_lengths(schema, values)
    for start in range(rows):
        part = {name: column[start:rows] for name, column in values.items()}
        assert len(encode_segment(schema, part)) == length_of(start, rows)


@given(tables(), st.data())
@settings(max_examples=150, deadline=None)
def test_content_that_does_not_fit_is_refused_and_nothing_else_happens(table, data):
    """What an honest sealer never writes: every change ends in one error, or in rows."""
    schema, values, rows = table
    plaintext = bytearray(encode_segment(schema, values))
    if data.draw(st.booleans()) and plaintext:
        place = data.draw(st.integers(0, len(plaintext) - 1))
        plaintext[place] ^= data.draw(st.integers(1, 255))
    else:
        cut = data.draw(st.integers(0, len(plaintext)))
        plaintext = plaintext[:cut] + bytearray(b"\x55" * data.draw(st.integers(0, 3)))
    try:
        decoded = decode_segment(schema, plaintext, records=rows)
    except ShardCorruptedError:
        return
    assert all(len(decoded[name]) == rows for name in schema.names)


def text_segment(*offsets, payload=b"ab"):
    table = struct.pack(f"<{len(offsets)}I", *offsets)
    return bytearray(table.ljust(-(-len(table) // 8) * 8, b"\0") + payload)


@pytest.mark.parametrize(
    "plaintext",
    [
        text_segment(0, 1),  # table too short
        text_segment(1, 1, 2),  # does not begin at 0
        text_segment(0, 2, 1),  # goes back
        text_segment(0, 1, 9),  # past the end
        text_segment(0, 1, 2, payload=b"a\xff"),  # not UTF-8
        text_segment(0, 1, 2, payload=b"ab\0\1"),  # something in the padding
        bytearray(),
    ],
)
def test_a_bad_table_of_strings_is_refused(plaintext):
    with pytest.raises(ShardCorruptedError) as caught:
        decode_segment(Schema((Column("s", "string"),)), plaintext, records=2)
    assert caught.value.__context__ is None  # a UnicodeDecodeError would carry the bytes


def test_fixed_rows_have_no_padding():
    schema = Schema((Column("x", "tensor", "uint8", (3,)),))
    assert same(
        decode_segment(schema, bytearray(6), records=2)["x"], torch.zeros(2, 3, dtype=torch.uint8)
    )
    for length in (5, 7):
        with pytest.raises(ShardCorruptedError):
            decode_segment(schema, bytearray(length), records=2)


def test_rows_without_elements_are_rows():
    schema = Schema((Column("r", "ragged", "float32", (2,)),))
    plaintext = encode_segment(schema, {"r": [torch.empty(0, 2), torch.empty(0, 2)]})
    decoded = decode_segment(schema, plaintext, records=2)["r"]
    assert [tuple(row.shape) for row in decoded] == [(0, 2), (0, 2)]


def test_tensors_are_views_and_aligned():
    schema = Schema((Column("b", "tensor", "bool"), Column("x", "tensor", "float64", (2,))))
    values = {"b": torch.tensor([True, False, True]), "x": torch.arange(6.0).double().view(3, 2)}
    plaintext = encode_segment(schema, values)
    decoded = decode_segment(schema, plaintext, records=3)["x"]
    assert isinstance(decoded, torch.Tensor)
    assert decoded.data_ptr() % 8 == 0
    plaintext[8:16] = struct.pack("<d", 41.0)
    assert decoded[0, 0] == 41.0


def test_half_a_character_is_refused_and_not_shown():
    schema = Schema((Column("note", "string"),))
    with pytest.raises(DataError, match="string column") as caught:
        segment_lengths(schema, {"note": ["Mary \ud800 Quant"]})
    assert "Mary" not in str(caught.value)
    assert caught.value.__context__ is None
    with pytest.raises(DataError, match="lone surrogates"):
        Column("note \udfff", "string")
