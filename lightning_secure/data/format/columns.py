"""The format of a shard, to the byte. ``docs/format.md`` says the same for a second reader.

A shard is a header of 4096 bytes and then segments, each ``ciphertext || tag (16)``. Every segment
but the last has the same plaintext length, so segment ``i`` is at a computed offset. Inside a
segment the columns lie one after another, so that one decryption yields views of whole columns.
There is no pickle anywhere. All integers are unsigned and little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_secure.crypto.encoding import canonical_json, utf8
from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES
from lightning_secure.errors import DataError, IntegrityError, ShardCorruptedError

_ALIGNMENT: Final = 8
_MAX_DIMENSIONS: Final = 60  # numpy knows 64
_MAX_COLUMNS: Final = 4096
_NAME: Final = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,128}")

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}

Kind = Literal["tensor", "ragged", "bytes", "string"]
#: One column of many rows: a tensor, or one value a row where rows differ in length.
ColumnData = Tensor | Sequence[Tensor] | Sequence[bytes] | Sequence[str]


@dataclass(frozen=True)
class Column:
    """Name and type of one column.

    Attributes:
        name: 1 to 128 characters without control characters and lone surrogates.
        kind: ``tensor``: the same shape in each row. ``ragged``: a tensor whose first dimension
            differs between rows. ``bytes`` and ``string``: one value of any length a row.
        dtype: Element type: bool, uint8, int8, int16, int32, int64, float16, bfloat16, float32 or
            float64; uint8 for ``bytes`` and ``string``.
        shape: Shape of one row of ``tensor``; of one element along the first dimension of
            ``ragged``; empty for ``bytes`` and ``string``.

    Raises:
        DataError: if the combination does not describe a column.

    >>> Column("x", "tensor", "float32", (3, 32, 32)).item_bytes
    12288
    """

    name: str
    kind: Kind
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise DataError(
                "a column name must have 1 to 128 characters, no control characters and no lone "
                "surrogates."
            )
        plain = self.kind in ("bytes", "string") and (self.dtype, self.shape) == ("uint8", ())
        if not plain and (self.kind not in ("tensor", "ragged") or self.dtype not in DTYPES):
            raise DataError(
                f"column {self.name!r} has no storable type (kind {self.kind!r}, dtype "
                f"{self.dtype!r}). Tensors may be of {', '.join(DTYPES)}; there are also 'bytes' "
                "and 'string' columns."
            )
        if not all(type(size) is int and 0 < size < 2**31 for size in self.shape):
            raise DataError(f"column {self.name!r} has a dimension that is not positive.")
        if len(self.shape) > _MAX_DIMENSIONS or self.item_bytes > MAX_SEGMENT_BYTES:
            raise DataError(
                f"column {self.name!r} has more than {_MAX_DIMENSIONS} dimensions, or more than "
                f"{MAX_SEGMENT_BYTES} bytes a row, which no segment holds."
            )

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one row of a tensor, or of one element along a variable first dimension."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """Element type as torch names it."""
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """Return the form that manifests hold.

        >>> Column("x", "tensor", "float32", (3,)).to_json()
        {'name': 'x', 'kind': 'tensor', 'dtype': 'float32', 'shape': [3]}
        """
        return {
            "name": self.name,
            "kind": self.kind,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }


@dataclass(frozen=True)
class Schema:
    """The columns of a split, in order.

    Raises:
        DataError: if there is no column, or two have one name.

    >>> schema = Schema((Column("x", "tensor", "float32", (3,)), Column("note", "string")))
    >>> schema.names, schema.fixed
    (('x', 'note'), False)
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        if not 0 < len(names) <= _MAX_COLUMNS or len(set(names)) != len(names):
            raise DataError("a schema needs 1 to 4096 columns with names of their own.")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.name for column in self.columns)

    @cached_property
    def fixed(self) -> bool:
        """Whether every row takes the same number of bytes."""
        return all(column.kind == "tensor" for column in self.columns)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON of the columns; stands in each shard's header."""
        return hashlib.sha256(canonical_json(self.to_json())).digest()

    def to_json(self) -> list[dict[str, Any]]:
        """Return the form that manifests hold."""
        return [column.to_json() for column in self.columns]

    @classmethod
    def from_json(cls, value: Sequence[Mapping[str, Any]]) -> Self:
        """Parse what :meth:`to_json` wrote.

        Raises:
            IntegrityError: if the value does not describe columns: its signer was not this
                package, or was at fault.

        >>> schema = Schema((Column("x", "tensor", "float32", (3,)),))
        >>> Schema.from_json(schema.to_json()) == schema
        True
        """
        types = {"name": str, "kind": str, "dtype": str, "shape": list}
        schema = None
        if all({name: type(item) for name, item in entry.items()} == types for entry in value):
            with contextlib.suppress(DataError):
                schema = cls(
                    tuple(Column(**{**entry, "shape": tuple(entry["shape"])}) for entry in value)
                )
        if schema is None:
            raise IntegrityError(
                "the manifest's schema does not describe columns that this version knows. Nothing "
                "was read."
            )
        return schema


def segment_lengths(schema: Schema, columns: Mapping[str, ColumnData]) -> Callable[[int, int], int]:
    """Return a function from a range of rows to the bytes that :func:`encode_segment` makes."""
    totals = {
        column.name: np.cumsum([0, *map(_raw_bytes, columns[column.name])])
        for column in schema.columns
        if column.kind != "tensor"
    }

    def length(start: int, stop: int) -> int:
        position = 0
        for column in schema.columns:
            position = _aligned(position)
            if column.kind == "tensor":
                position += (stop - start) * column.item_bytes
            else:
                total = totals[column.name]
                position = _aligned(position + 4 * (stop - start + 1))
                position += int(total[stop] - total[start])
        return position

    return length


def column_offsets(schema: Schema, records: int) -> tuple[dict[str, int], int]:
    """Return where the columns of a segment of a fixed schema begin, and its length, in bytes.

    >>> schema = Schema((Column("flag", "tensor", "bool"), Column("x", "tensor", "float32", (3,))))
    >>> column_offsets(schema, 2)
    ({'flag': 0, 'x': 8}, 32)
    """
    offsets: dict[str, int] = {}
    position = 0
    for column in schema.columns:
        offsets[column.name] = _aligned(position)
        position = offsets[column.name] + records * column.item_bytes
    return offsets, position


def byte_limits(schema: Schema, records: int) -> list[tuple[int, int, int]]:
    """Return the ranges of a segment of a fixed schema that may not hold any byte.

    Returns:
        Start, end and the largest byte: 0 between columns, 1 in columns of truth values.
    """
    offsets, _ = column_offsets(schema, records)
    limits, position = [], 0
    for column in schema.columns:
        start = offsets[column.name]
        limits.append((position, start, 0))
        position = start + records * column.item_bytes
        if column.dtype == "bool":
            limits.append((start, position, 1))
    return [limit for limit in limits if limit[0] < limit[1]]


def encode_segment(schema: Schema, columns: Mapping[str, ColumnData]) -> bytearray:
    """Lay out rows as one segment's plaintext.

    Args:
        schema: The columns.
        columns: For each name, the rows: a tensor of shape ``(n, *shape)`` of the column's dtype,
            or a sequence of ``n`` tensors, byte strings or strings.

    Returns:
        The plaintext. Each column begins at a multiple of 8 bytes. A column of variable length is
        a table of ``n + 1`` offsets of 4 bytes, in units of its first dimension, and then, again
        at a multiple of 8, the values one after another.
    """
    out = bytearray()
    for column in schema.columns:
        values = columns[column.name]
        _align(out)
        if isinstance(values, Tensor):
            out += _raw(values)
            continue
        parts = [_raw(value) for value in values]
        lengths = [len(part) // column.item_bytes for part in parts]
        out += np.cumsum([0, *lengths], dtype="<u4").tobytes()
        _align(out)
        for part in parts:
            out += part
    return out


def decode_segment(schema: Schema, plaintext: bytearray, *, records: int) -> dict[str, ColumnData]:
    """Return the columns of a segment's plaintext.

    Tensors are views of ``plaintext``, which they keep alive; strings and bytes are copies.

    Raises:
        ShardCorruptedError: if the plaintext is not what :func:`encode_segment` makes of this
            schema and so many records: its sealer was not this package, or was at fault.

    >>> schema = Schema((Column("age", "tensor", "int64"),))
    >>> plaintext = encode_segment(schema, {"age": torch.tensor([34, 51])})
    >>> decode_segment(schema, plaintext, records=2)
    {'age': tensor([34, 51])}
    """
    result: dict[str, ColumnData] = {}
    position = 0
    for column in schema.columns:
        position = _skipped(plaintext, position)
        if column.kind == "tensor":
            end = position + records * column.item_bytes
            _require(end <= len(plaintext))
            result[column.name] = _tensor(plaintext, column, position, records)
        else:
            table_end = position + 4 * (records + 1)
            _require(table_end <= len(plaintext))
            offsets = np.frombuffer(plaintext, "<u4", records + 1, position).astype(np.int64)
            _require(offsets[0] == 0 and bool((np.diff(offsets) >= 0).all()))
            start = _skipped(plaintext, table_end)
            end = start + int(offsets[-1]) * column.item_bytes
            _require(end <= len(plaintext))
            result[column.name] = _variable(plaintext, column, start, offsets)
        position = end
    # Rows of variable length are padded to the shard's one segment length.
    _require(position == len(plaintext) or not schema.fixed)
    _require(_zero(plaintext, position, len(plaintext)))
    return result


def _variable(
    plaintext: bytearray, column: Column, start: int, offsets: npt.NDArray[np.int64]
) -> ColumnData:
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    if column.kind == "ragged":
        values = _tensor(plaintext, column, start, int(offsets[-1]))
        return [values[low:high] for low, high in bounds]
    parts = [bytes(plaintext[start + low : start + high]) for low, high in bounds]
    if column.kind == "bytes":
        return parts
    texts: list[str] = []
    with contextlib.suppress(UnicodeDecodeError):
        texts += [part.decode() for part in parts]
    _require(len(texts) == len(parts))  # outside the handler: its error carries the bytes
    return texts


def _tensor(plaintext: bytearray, column: Column, offset: int, count: int) -> Tensor:
    dtype = column.torch_dtype
    if count == 0:
        return torch.empty((0, *column.shape), dtype=dtype)
    elements = count * column.item_bytes // dtype.itemsize
    flat = torch.frombuffer(plaintext, dtype=dtype, count=elements, offset=offset)
    if dtype is torch.bool:  # any other byte is neither true nor false, and code differs about it
        _require(int(flat.view(torch.uint8).max()) <= 1)
    return flat.view(count, *column.shape)


def _raw(value: Tensor | bytes | str) -> bytes | memoryview:
    if isinstance(value, Tensor):
        raw = value.contiguous().view(-1).view(torch.uint8)
        return (raw != 0 if value.dtype is torch.bool else raw).numpy().data
    return utf8(value, what="a value of a string column") if isinstance(value, str) else value


def _raw_bytes(value: Tensor | bytes | str) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return len(_raw(value))


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _skipped(plaintext: bytearray, position: int) -> int:
    """Return where the next part begins, after looking that nothing hides before it."""
    start = _aligned(position)
    _require(_zero(plaintext, position, min(start, len(plaintext))))
    return start


def _zero(plaintext: bytearray, start: int, stop: int) -> bool:
    return plaintext.count(0, start, stop) == stop - start


def _align(out: bytearray) -> None:
    out += bytes(_aligned(len(out)) - len(out))


def _require(condition: bool) -> None:
    if not condition:
        raise ShardCorruptedError("a segment's content does not fit the schema")
