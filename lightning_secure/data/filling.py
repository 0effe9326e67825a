"""From a decrypted segment to rows in their places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, uint8

from lightning_secure.data.buffers import Ints, Rows
from lightning_secure.data.format import Column, Schema, byte_limits, column_offsets
from lightning_secure.data.groups import GroupedReader, OpenShard
from lightning_secure.data.shard import Scratch, ShardReader

__all__ = ["Filler"]

#: Where the chosen columns begin, the length of the plaintext, and its limits.
_Layout = tuple[list[tuple[str, int]], int, list[tuple[int, int, int]]]


class Filler:
    """Decrypts segments of one split and copies rows of chosen columns out of them.

    Args:
        schemas: The columns of each group that is open, see
            :class:`~lightning_secure.data.groups.OpenGroups`.
        names: The chosen ones, in order.

    It may be used from several threads, each with scratch memory of its own.
    """

    def __init__(self, schemas: Sequence[Schema], names: Sequence[str]) -> None:
        by_name = {column.name: column for schema in schemas for column in schema.columns}
        self.columns: tuple[Column, ...] = tuple(by_name[name] for name in names)
        self._schema = schemas[0]
        self._names = tuple(names)
        self._layouts: dict[int, _Layout] = {}
        #: For several groups, what does each of them.
        self._parts: tuple[Filler, ...] = ()
        if len(schemas) > 1:
            self._parts = tuple(
                Filler([schema], [name for name in names if name in schema.names])
                for schema in schemas
            )

    def fill(
        self,
        rows: Rows,
        reader: OpenShard,
        segment: int,
        scratch: Scratch,
        targets: Ints,
        sources: Ints | None = None,
    ) -> None:
        """Copy rows of one segment to their places.

        Args:
            rows: Where to.
            reader: The segment's shard, of each group.
            segment: Its number.
            scratch: Memory of the calling thread.
            targets: Place of each row.
            sources: Which rows of the segment, in the order of ``targets``. All by default.

        Raises:
            ShardCorruptedError: The segment was altered, in one of the groups. What is in ``rows``
                then is not to be used.
        """
        if isinstance(reader, GroupedReader):
            for part, one in zip(self._parts, reader.readers, strict=True):
                part.fill(rows, one, segment, scratch, targets, sources)
            return
        records = reader.header.records_in(segment)
        if not self._schema.fixed:
            self._fill_slowly(rows, reader, segment, targets, sources)
            return
        layout = self._layouts.get(records)
        if layout is None:
            offsets, length = column_offsets(self._schema, records)
            places = [(n, offsets[n]) for n in self._names]
            layout = self._layouts[records] = places, length, byte_limits(self._schema, records)
        plaintext = reader.decrypt(segment, scratch)
        # As decode_segment does, which need not be called here: the layout is known.
        if len(plaintext) != layout[1] or any(
            np.frombuffer(plaintext, np.uint8, end - start, start).max() > largest
            for start, end, largest in layout[2]
        ):
            raise reader.corrupted(f"segment {segment} does not fit the schema")
        rows.put(layout[0], targets, plaintext, records, sources)

    def _fill_slowly(
        self, rows: Rows, reader: ShardReader, segment: int, targets: Ints, sources: Ints | None
    ) -> None:
        columns = reader.read_segment(segment)
        for name in self._names:
            values = columns[name]
            if isinstance(values, Tensor):
                raw = values.contiguous().view(-1).view(uint8).numpy()
                rows.put([(name, 0)], targets, raw, len(values), sources)
            else:
                chosen = range(len(values)) if sources is None else sources.tolist()
                rows.put_values(name, targets, [values[row] for row in chosen])
