from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_secure.data.format.columns import DTYPES, Column
from lightning_secure.data.format.convert import convert_column, count_rows, infer_column, joined
from lightning_secure.errors import DataError


def convert(column, values, **options):
    return convert_column(column, values, **{"allow_nonfinite": False, "first_row": 100, **options})


@pytest.mark.parametrize(
    ("values", "column"),
    [
        (np.zeros((4, 3), "float32"), Column("x", "tensor", "float32", (3,))),
        (torch.zeros(4, 2, dtype=torch.bfloat16), Column("x", "tensor", "bfloat16", (2,))),
        (np.zeros(4, bool), Column("x", "tensor", "bool")),
        ([1, 2], Column("x", "tensor", "int64")),
        ([1.5, 2], Column("x", "tensor", "float64")),
        ([[1.5, 2], [3, 4]], Column("x", "tensor", "float64", (2,))),
        ([True, False], Column("x", "tensor", "bool")),
        ([np.float32(1), np.float32(2)], Column("x", "tensor", "float32")),
        (["a", "b"], Column("x", "string")),
        (np.array(["a", "bcd"]), Column("x", "string")),
        (np.array(["a", "b"], dtype=object), Column("x", "string")),
        ([b"a"], Column("x", "bytes")),
        ([np.zeros(3, "uint8")] * 2, Column("x", "tensor", "uint8", (3,))),
        ([torch.zeros(3, 2), torch.zeros(5, 2)], Column("x", "ragged", "float32", (2,))),
    ],
)
def test_columns_are_read_off_the_values(values, column):
    assert infer_column("x", values) == column
    assert len(convert(column, values)) == len(values)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(2, "complex64"),
        np.zeros(2, "datetime64[s]"),
        np.array([b"ab"]),
        np.zeros(2, ">f4"),
        [None, 1],
        [object()],
        [1j],
        torch.zeros(2, dtype=torch.complex64),
        [[1, 2], "a"],
        [2**70],
    ],
)
def test_values_that_cannot_be_stored_are_refused(values):
    with pytest.raises(DataError) as caught:
        infer_column("x", values)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (Column("x", "string"), ["a", 1]),
        (Column("x", "string"), np.zeros(2)),
        (Column("x", "bytes"), ["a"]),
        (Column("x", "tensor", "float32"), ["a"]),
        (Column("x", "tensor", "float32", (3,)), np.zeros((2, 4), "float32")),
        (Column("x", "tensor", "float32", (3,)), np.zeros((2, 3), "float64")),
        (Column("x", "tensor", "int64"), [1.5]),
        (Column("x", "tensor", "int64"), [True]),
        (Column("x", "tensor", "bool"), [0, 1]),
        (Column("x", "tensor", "uint8"), [256]),
        (Column("x", "tensor", "uint8"), [-1]),
        (Column("x", "tensor", "int64"), [2**63]),
        (Column("x", "tensor", "int64"), [2**64 - 1, 1]),
        (Column("x", "tensor", "int8"), [2**64 - 1]),
        (Column("x", "tensor", "float32"), [np.float64(1), np.float64(2)]),
        (Column("x", "tensor", "float32", (2,)), [np.zeros(2, "float32"), np.zeros(3, "float32")]),
        (Column("x", "tensor", "float32", (2,)), [np.zeros(2, "float32"), 1.0]),
        (Column("x", "ragged", "float32"), [np.zeros(2, "float64")]),
        (Column("x", "ragged", "float32"), [np.float32(1)]),
        (Column("x", "ragged", "float32", (2,)), [np.zeros((2, 3), "float32")]),
        (Column("x", "ragged", "float32"), [torch.tensor(1.0)]),
    ],
)
def test_values_of_another_type_are_refused(column, values):
    with pytest.raises(DataError, match="'x'") as caught:
        convert(column, values)
    assert "Nothing of this call was sealed" in str(caught.value)


def test_python_numbers_take_the_columns_precision():
    assert convert(Column("x", "tensor", "float16"), [1, 2.5]).dtype == torch.float16
    assert convert(Column("x", "tensor", "float32", (2,)), [[1, 2.5]]).dtype == torch.float32
    assert convert(Column("x", "tensor", "uint8"), [0, 255]).tolist() == [0, 255]
    assert convert(Column("x", "tensor", "bfloat16"), [1, 2]).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_row_of_a_nan_is_named_and_its_value_is_not(bad):
    values = np.ones((5, 2), "float32")
    values[3, 1] = bad
    with pytest.raises(DataError, match="row 103") as caught:
        convert(Column("x", "tensor", "float32", (2,)), values)
    assert "1.0" not in str(caught.value)
    assert convert(Column("x", "tensor", "float32", (2,)), values, allow_nonfinite=True) is not None
    ragged = [np.ones(2, "float32"), np.array([bad], "float32")]
    with pytest.raises(DataError, match="row 101"):
        convert(Column("x", "ragged", "float32"), ragged)


def test_what_is_kept_is_a_copy():
    array, tensor = np.ones((2, 2), "float32"), torch.ones(2, 2)
    column = Column("x", "tensor", "float32", (2,))
    kept = [convert(column, array), convert(column, tensor)]
    ragged = [tensor]
    kept.append(convert(Column("x", "ragged", "float32", (2,)), ragged)[0])
    array[:], tensor[:] = 9, 9
    assert all(bool((item == 1).all()) for item in kept)


def test_what_need_not_be_copied_is_not():
    tensor = torch.ones(2, 2)
    column = Column("x", "tensor", "float32", (2,))
    assert convert(column, tensor, copy=False).data_ptr() == tensor.data_ptr()
    (row,) = convert(Column("x", "ragged", "float32", (2,)), [tensor], copy=False)
    assert row.data_ptr() == tensor.data_ptr()
    assert convert(column, tensor.T, copy=False).is_contiguous()


def test_memory_that_cannot_be_written_is_fine():
    array = np.ones((2, 2), "float32")
    array.flags.writeable = False
    assert (
        convert(Column("x", "tensor", "float32", (2,)), array, copy=False).tolist() == [[1, 1]] * 2
    )


def test_tensors_that_require_grad_and_are_not_contiguous_are_fine():
    values = torch.ones(3, 4, requires_grad=True).T
    kept = convert(Column("x", "tensor", "float32", (3,)), values)
    assert kept.is_contiguous()
    assert not kept.requires_grad


def test_columns_must_be_equally_long():
    assert count_rows({"a": [1, 2], "b": [3, 4]}) == 2
    for columns in ({}, {"a": [1], "b": [1, 2]}, {"a": "text"}, {"a": 1}, {1: [1]}, [1]):
        with pytest.raises(DataError):
            count_rows(columns)


def test_parts_are_joined():
    assert joined([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]
    assert joined([["a"], ["b", "c"]]) == ["a", "b", "c"]


def test_every_storable_dtype_is_known():
    assert len(DTYPES) == 10


def test_half_a_character_is_refused_and_not_shown():
    with pytest.raises(DataError, match=r"'note'.*lone surrogate.*sealed") as caught:
        convert(Column("note", "string"), ["fine", "Mary \ud800 Quant"])
    assert "Mary" not in str(caught.value)
    assert caught.value.__context__ is None
