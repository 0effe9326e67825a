"""Conversion of users' values (numbers, arrays, tensors, text) to what a shard holds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from lightning_secure.data.format.columns import DTYPE_NAMES, DTYPES, Column, ColumnData
from lightning_secure.errors import DataError

_UNTOUCHED: Final = "Nothing of this call was sealed."
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_INT64_MAX: Final = np.iinfo(np.int64).max


class Ragged(list[Tensor]):
    """Tensors, one a row, whose first dimension may differ even where these happen to agree."""

    def __getitem__(self, index: Any) -> Any:
        """Return a row, or rows as the same kind of list."""
        value = super().__getitem__(index)
        return Ragged(value) if isinstance(index, slice) else value


def count_rows(columns: Mapping[str, Sequence[Any]]) -> int:
    """Return the common length of the columns.

    Raises:
        DataError: if there is no column, or columns differ in length.

    >>> count_rows({"x": [1.0, 2.0], "y": [0, 1]})
    2
    """
    if not isinstance(columns, Mapping):
        raise DataError(
            "rows must be a mapping from column names to values, not a "
            f"{type(columns).__name__}. {_UNTOUCHED}"
        )
    for name, values in columns.items():
        if not isinstance(name, str):
            raise DataError(
                f"a column's name must be text, not a {type(name).__name__}. {_UNTOUCHED}"
            )
        single = isinstance(values, str | bytes) or getattr(values, "ndim", 1) == 0
        if single or not hasattr(values, "__len__"):
            raise DataError(
                f"column {name!r} was given one {type(values).__name__} where a call needs a "
                f"sequence with one value a row. {_UNTOUCHED}"
            )
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise DataError(
            "a call needs at least one column, and all columns of one length, not of lengths "
            f"{sorted(lengths)}. {_UNTOUCHED}"
        )
    return lengths.pop()


def require_names(given: Collection[str], names: Sequence[str]) -> None:
    """Raise DataError unless ``given`` are the columns' names, in any order."""
    if set(given) == set(names):
        return
    unknown = ", ".join(repr(name) for name in given if name not in names)
    missing = ", ".join(repr(name) for name in names if name not in given)
    raise DataError(
        f"the rows have {'unknown columns ' + unknown if unknown else 'no unknown columns'} and "
        f"{'lack ' + missing if missing else 'lack none'}; the split's columns are fixed by its "
        f"first row or its schema. {_UNTOUCHED}"
    )


def infer_column(name: str, values: Any) -> Column:
    """Return the column that ``values``, which are not empty, look like.

    Raises:
        DataError: if the values' type cannot be stored.

    >>> infer_column("age", [34, 51])
    Column(name='age', kind='tensor', dtype='int64', shape=())
    """
    if isinstance(values, Ragged):
        dtype = _known(name, str(values[0].dtype).removeprefix("torch."))
        return Column(name, "ragged", dtype, tuple(values[0].shape[1:]))
    rows = _normalised(name, values)
    if isinstance(rows, Tensor):
        return Column(name, "tensor", DTYPE_NAMES[rows.dtype], tuple(rows.shape[1:]))
    first = rows[0]
    if isinstance(first, str):
        return Column(name, "string")
    if isinstance(first, bytes):
        return Column(name, "bytes")
    if isinstance(first, Tensor):
        alike = all(isinstance(row, Tensor) and row.shape == first.shape for row in rows)
        shape = tuple(first.shape)
        dtype = DTYPE_NAMES[first.dtype]
        return Column(name, "tensor" if alike else "ragged", dtype, shape if alike else shape[1:])
    array = _array(name, rows)
    return Column(name, "tensor", _known(name, str(array.dtype)), array.shape[1:])


def convert_column(
    column: Column, values: Any, *, allow_nonfinite: bool, first_row: int, copy: bool = True
) -> ColumnData:
    """Return ``values`` in the form that a shard holds.

    Args:
        column: What they must be.
        values: A tensor, an array or a sequence.
        allow_nonfinite: Whether NaN and infinities may pass.
        first_row: Number of the first value's row in its split, for errors.
        copy: Whether the result must not share memory with ``values``.

    Raises:
        DataError: if a value is of another type. The message names the column and never a value.

    >>> column = infer_column("age", [34, 51])
    >>> convert_column(column, [34, 51], allow_nonfinite=False, first_row=0)
    tensor([34, 51])
    """
    rows = _normalised(column.name, values)
    if column.kind in ("string", "bytes"):
        kind = str if column.kind == "string" else bytes
        if isinstance(rows, Tensor) or not all(isinstance(row, kind) for row in rows):
            raise _mismatch(column, f"something that is not {kind.__name__}")
        if kind is str and any(_SURROGATE.search(row) for row in rows):
            raise _mismatch(column, "a lone surrogate (half of a character), which UTF-8 has not")
        return cast("ColumnData", rows)
    if column.kind == "ragged":
        for number, row in enumerate(rows):
            if not isinstance(row, Tensor) or row.ndim == 0 or row.shape[1:] != column.shape:
                raise _mismatch(column, "a row of another shape")
            _check(column, row, allow_nonfinite, first_row + number)
        return [row.clone() for row in rows] if copy else list(rows)
    tensor = _batched(column, rows)
    if tensor.shape[1:] != column.shape:
        raise _mismatch(column, f"rows of shape {tuple(tensor.shape[1:])}")
    _check(column, tensor, allow_nonfinite, first_row)
    if not copy:
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def joined(parts: Sequence[ColumnData]) -> ColumnData:
    """Return one column of all rows of ``parts``, in order."""
    if isinstance(parts[0], Tensor):
        return torch.cat(cast("list[Tensor]", parts))
    return cast("ColumnData", [value for part in parts for value in part])


def _normalised(name: str, values: Any) -> Tensor | list[Any]:
    """Return a CPU tensor of a storable dtype, or a list in which arrays became such tensors."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind in "OU":
            return _normalised(name, values.tolist())
        _known(name, str(values.dtype))
        # asarray, not ascontiguousarray: that one turns the shape () into (1,).
        array = np.asarray(values, order="C")
        # torch warns of read-only memory, which is what Arrow and mapped files are.
        return torch.as_tensor(array if array.flags.writeable else array.copy())
    if isinstance(values, Tensor):
        _known(name, str(values.dtype).removeprefix("torch."))
        return values.detach().cpu()
    return [
        _normalised(name, value) if isinstance(value, Tensor | np.ndarray) else value
        for value in values
    ]


def _batched(column: Column, rows: Tensor | list[Any]) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    if all(isinstance(row, Tensor) and row.shape == column.shape for row in rows):
        return torch.stack(rows)
    if any(isinstance(row, Tensor) for row in rows):
        raise _mismatch(column, "rows of different shapes; declare it as ragged in a Schema")
    array = _array(column.name, rows)
    if str(array.dtype) == column.dtype:
        return torch.as_tensor(array)
    # Plain Python numbers have no precision of their own: they take the column's.
    target = DTYPES[column.dtype]
    floating = target.is_floating_point
    if target is torch.bool or array.dtype.kind not in ("iuf" if floating else "iu"):
        raise _mismatch(column, "a value of another type")
    if not _plain(rows):
        raise _mismatch(column, f"{array.dtype} values")
    # A uint64 that int64 cannot hold would wrap around.
    wraps = not floating and array.dtype == np.uint64 and bool((array > _INT64_MAX).any())
    tensor = torch.as_tensor(array.astype("float64" if floating else "int64"))
    if wraps or (not floating and bool((tensor.to(target) != tensor).any())):
        raise _mismatch(column, "a number that its dtype cannot hold")
    return tensor.to(target)


def _array(name: str, rows: list[Any]) -> np.ndarray[Any, Any]:
    array = None
    with contextlib.suppress(ValueError, OverflowError):
        array = np.asarray(rows)
    if array is None:  # outside the handler: its error may repeat the values
        raise DataError(f"column {name!r} mixes values of different shapes. {_UNTOUCHED}")
    return array


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(item) for item in value)
    return type(value) in (int, float)


def _known(name: str, dtype: str) -> str:
    if dtype not in DTYPES:
        raise DataError(
            f"column {name!r} holds {dtype}, which cannot be stored; {', '.join(DTYPES)}, text "
            f"and bytes can. {_UNTOUCHED}"
        )
    return dtype


def _check(column: Column, tensor: Tensor, allow_nonfinite: bool, first_row: int) -> None:
    if DTYPE_NAMES[tensor.dtype] != column.dtype:
        raise _mismatch(column, f"{DTYPE_NAMES[tensor.dtype]} values")
    if allow_nonfinite or not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    row = first_row
    if column.kind == "tensor":
        row += int((~finite.reshape(len(tensor), -1).all(1)).nonzero()[0])
    raise DataError(
        f"column {column.name!r} has a NaN or an infinity in row {row}: it would turn the "
        f"gradients of a whole batch into NaN. {_UNTOUCHED} Impute it or drop the row, or pass "
        "allow_nonfinite=True if the model masks such values."
    )


def _mismatch(column: Column, found: str) -> DataError:
    expected: str = column.kind
    if column.kind in ("tensor", "ragged"):
        expected = f"a {column.kind} column of {column.dtype}, shape {column.shape}"
    return DataError(f"column {column.name!r} is {expected} and was given {found}. {_UNTOUCHED}")
