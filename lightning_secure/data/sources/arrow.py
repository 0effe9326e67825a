"""Conversion of a batch of an Arrow table to the columns that are sealed. Nothing is guessed.

A null is refused, or treated by a declared rule; it never turns into a NaN. What a type becomes:

- bool, integers, floats: themselves; uint16 and uint32 the next wider signed type; uint64 int64, if
  each value fits
- text and categories (dictionaries): text; binary: bytes
- dates and timestamps: int64, counted in their own unit since 1970-01-01 (UTC where they have a
  zone), which the manifest names; or dates, where an anonymisation plan makes something of them
- fixed-size lists and tensors of numbers: tensors; lists of numbers: ragged tensors
- all else (decimals, times of day, durations, structs, maps, unions): refused
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from lightning_secure.data.format.columns import DTYPES
from lightning_secure.data.format.convert import Ragged
from lightning_secure.data.sources.source import Batch, extra
from lightning_secure.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_LEFT: Final = "Nothing of the split was put into the dataset."


@dataclass(frozen=True)
class Fill:
    """Rule for nulls: this value takes their place.

    Attributes:
        value: A value of the column's type.

    >>> from lightning_secure.data.sources import open_source
    >>> import pyarrow as pa
    >>> table = pa.table({"age": [34, None]})
    >>> list(open_source(table, nulls={"age": Fill(0)}).batches())
    [{'age': array([34,  0])}]
    """

    value: Any


#: The fate of a null: its row is left out, or a value takes its place.
NullRule = Literal["drop"] | Fill


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Columns of numbers that become one: a row of it is a vector.

    Attributes:
        columns: Names, in order.
        dtype: Element type of the vector.

    Raises:
        ConfigError: if there is no column, one is named twice, or the type cannot be stored.

    >>> from lightning_secure.data.sources import open_source
    >>> import pyarrow as pa
    >>> table = pa.table({"height": [1.5, 1.75], "weight": [60.0, 80.0]})
    >>> source = open_source(table, stack={"x": Stack(columns=("height", "weight"))})
    >>> next(source.batches())["x"].tolist()
    [[1.5, 60.0], [1.75, 80.0]]
    """

    columns: tuple[str, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.columns or len(set(self.columns)) != len(self.columns):
            raise ConfigError(
                f"Stack(columns=) must name at least one column, and each once, not {self.columns}."
            )
        if self.dtype not in DTYPES or self.dtype == "bfloat16":
            raise ConfigError(f"Stack(dtype={self.dtype!r}) is not a type that can be stored.")


def arrow_type(name: str) -> pa.DataType:
    """Return the Arrow type for a name in ``columns``; raises ConfigError for unknown ones."""
    pa = extra("pyarrow", "tables", what="a table")
    types = {"bytes": "binary", "date": "date32", "bool": "bool_"}
    known = {*DTYPES, "bytes", "date", "string", "timestamp"} - {"bfloat16"}
    if name not in known:
        raise ConfigError(f"column type {name!r} is none of {', '.join(sorted(known))}.")
    result: Any = (
        pa.timestamp("us") if name == "timestamp" else getattr(pa, types.get(name, name))()
    )
    return result


def require_rules(types: Mapping[str, str], nulls: Mapping[str, NullRule]) -> None:
    """Refuse types and rules for nulls that do not exist.

    Raises:
        ConfigError: if a type or a rule is unknown; the message names the column.
    """
    for name, kind in types.items():
        try:
            arrow_type(kind)
        except ConfigError as error:
            reason = str(error)
        else:
            continue
        raise ConfigError(f"types: column {name!r} has no such type: {reason}")
    for name, rule in nulls.items():
        if rule != "drop" and not isinstance(rule, Fill):
            raise ConfigError(
                f"nulls: the rule for column {name!r} must be 'drop' or Fill(value), not a "
                f"{type(rule).__name__}."
            )


def convert_batch(
    batch: pa.RecordBatch,
    *,
    first_row: int,
    types: Mapping[str, str | None],
    nulls: Mapping[str, NullRule],
    dates: Mapping[str, bool] | None,
) -> Batch:
    """Return the columns of a batch, without the rows that a rule leaves out.

    Args:
        batch: The rows.
        first_row: Number of the first of them in the source, for errors.
        types: The columns to take, in order, with the type to convert to, or None.
        nulls: Rule by column.
        dates: By column, whether its dates stay dates rather than become numbers. A column of dates
            that is not named is refused. None: all become numbers.

    Raises:
        DataError: if a column is absent or of a type that cannot be stored, or there is a null or a
            value that does not fit.
    """
    pa = extra("pyarrow", "tables", what="a table")
    pc = extra("pyarrow.compute", "tables", what="a table")
    arrays: dict[str, Any] = {}
    keep = None
    for name, wanted in types.items():
        array = batch.column(name)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if wanted is not None:
            array = _cast(name, array, arrow_type(wanted))
        if pa.types.is_null(array.type) and name in nulls:
            array = array.cast(_type_of_nothing(nulls[name]))
        if array.null_count:
            rule = nulls.get(name)
            missing = array.is_null()
            if rule == "drop":
                keep = pc.invert(missing) if keep is None else pc.and_(keep, pc.invert(missing))
            elif isinstance(rule, Fill):
                array = pc.fill_null(array, _scalar(name, rule, array.type))
            else:
                row = first_row + int(np.argmax(missing.to_numpy(zero_copy_only=False)))
                raise DataError(
                    f"column {name!r} has a null in row {row}, counted from 0. {_LEFT} Impute it, "
                    "or declare what nulls of this column mean: nulls={...: 'drop'} leaves the row "
                    "out, Fill(value) puts a value there."
                )
        arrays[name] = array
    if keep is not None:
        arrays = {name: array.filter(keep) for name, array in arrays.items()}
    return {name: _values(name, array, dates) for name, array in arrays.items()}


def _values(name: str, array: pa.Array, dates: Mapping[str, bool] | None) -> Any:
    pa = extra("pyarrow", "tables", what="a table")
    is_a = pa.types
    kind = array.type
    if is_a.is_string(kind) or is_a.is_large_string(kind) or is_a.is_string_view(kind):
        return array.to_pylist()
    if is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_fixed_size_binary(kind):
        return array.to_pylist()
    if is_a.is_date(kind) or is_a.is_timestamp(kind):
        return _dates(name, array, dates)
    if isinstance(kind, pa.FixedShapeTensorType):
        _without_nulls(name, array.storage.flatten())
        return array.to_numpy_ndarray()
    if is_a.is_list(kind) or is_a.is_large_list(kind):
        lengths = array.value_lengths().to_pylist()
        flat = _numbers(name, _without_nulls(name, array.flatten()))
        return Ragged(torch.split(torch.from_numpy(flat.copy()), lengths))
    if is_a.is_fixed_size_list(kind):
        inner = _values(name, _without_nulls(name, array.flatten()), {})
        if isinstance(inner, np.ndarray):
            return inner.reshape(len(array), kind.list_size, *inner.shape[1:])
        raise _refused(name, kind)
    return _numbers(name, array)


def _numbers(name: str, array: pa.Array) -> np.ndarray[Any, Any]:
    pa = extra("pyarrow", "tables", what="a table")
    kind = array.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _refused(name, kind)
    wider = {pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}
    if kind in wider:
        array = _cast(name, array, wider[kind])
    result: np.ndarray[Any, Any] = array.to_numpy(zero_copy_only=False)
    return result


def _dates(name: str, array: pa.Array, dates: Mapping[str, bool] | None) -> Any:
    pa = extra("pyarrow", "tables", what="a table")
    if dates is not None and name not in dates:
        raise DataError(
            f"column {name!r} holds dates, which can identify people, and the anonymisation plan "
            f"does not name it; use Keep() if it may be sealed as it is. {_LEFT}"
        )
    if dates is not None and dates[name]:
        # Coarser than a microsecond is what every operator makes of a date.
        if pa.types.is_timestamp(array.type):
            array = array.cast(pa.timestamp("us", array.type.tz), safe=False)
        return array.to_pylist()
    if pa.types.is_date32(array.type):
        array = array.cast(pa.int32())
    return array.cast(pa.int64()).to_numpy()


def _type_of_nothing(rule: NullRule) -> pa.DataType:
    """Return a type for a column that holds nulls only, which has none of its own."""
    pa = extra("pyarrow", "tables", what="a table")
    kind: Any = pa.int8()  # of rows that are all left out
    if isinstance(rule, Fill):
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):
            kind = pa.scalar(rule.value).type
    return kind


def _cast(name: str, array: pa.Array, wanted: pa.DataType) -> pa.Array:
    pa = extra("pyarrow", "tables", what="a table")
    try:
        return array.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass  # outside the handler: its error repeats a value
    raise DataError(
        f"column {name!r} is {array.type} and has a value that {wanted} cannot hold. {_LEFT}"
    )


def _scalar(name: str, rule: Fill, wanted: pa.DataType) -> pa.Scalar[Any]:
    pa = extra("pyarrow", "tables", what="a table")
    try:
        return pa.scalar(rule.value, type=wanted)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"nulls: the Fill value for column {name!r} is not a {wanted}. {_LEFT}")


def _without_nulls(name: str, array: pa.Array) -> pa.Array:
    if array.null_count:
        raise DataError(f"column {name!r} has a list with a null in it. {_LEFT}")
    return array


def _refused(name: str, kind: pa.DataType) -> DataError:
    return DataError(
        f"column {name!r} is {kind}, which cannot be sealed as it is: convert it to numbers or "
        f"text, or leave it out. {_LEFT}"
    )
