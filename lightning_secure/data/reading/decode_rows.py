"""Decoding of a decrypted segment into rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from torch import Tensor, uint8

from lightning_secure.data.format.columns import Column, Schema, byte_limits, column_offsets
from lightning_secure.data.reading.batch_buffers import Ints, Rows
from lightning_secure.data.reading.column_groups import GroupedReader, OpenShard
from lightning_secure.data.shards.scratch import Scratch
from lightning_secure.data.shards.shard import ShardReader

#: Where the chosen columns begin, the length of the plaintext, and its limits.
_Layout = tuple[list[tuple[str, int]], int, list[tuple[int, int, int]]]

#: Plaintext of so many bytes stays in a core's cache.
_TOGETHER_BYTES: Final = 256 * 1024


class Filler:
    """Decrypts segments of one split and copies rows of chosen columns out of them.

    Args:
        schemas: The columns of each group that is open, see
            :class:`~lightning_secure.data.reading.column_groups.OpenGroups`.
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
        *,
        until: int = 0,
    ) -> None:
        """Copy rows of one segment to their places.

        Args:
            rows: Where to.
            reader: The segment's shard, of each group.
            segment: Its number.
            scratch: Memory of the calling thread.
            targets: Place of each row.
            sources: Which rows of the segment, in the order of ``targets``. All by default.
            until: Says that all rows are meant and their places follow one another, and that the
                places from there to this one are free to be written over: the segment is then
                decrypted where its first column belongs, and what lies behind that column in it
                makes way for the next rows.

        Raises:
            ShardCorruptedError: if the segment was altered, in one of the groups. What is in
                ``rows`` must not be used.
        """
        if isinstance(reader, GroupedReader):
            for part, one in zip(self._parts, reader.readers, strict=True):
                part.fill(rows, one, segment, scratch, targets, sources, until=until)
            return
        records = reader.header.records_in(segment)
        if not self._schema.fixed:
            self._fill_slowly(rows, reader, segment, targets, sources)
            return
        layout = self._layout(records)
        columns, length, _ = layout
        out = None
        if until and (first := self._schema.names[0]) in self._names:
            out = rows.span(first, int(targets[0]), until, length)
        plaintext = reader.decrypt(segment, scratch, out)
        self._check(reader, [segment], layout, plaintext)
        if out is not None:
            columns = [(name, offset) for name, offset in columns if name != first]
        rows.put(columns, targets, plaintext, records, sources)

    def gather(
        self,
        rows: Rows,
        reader: OpenShard,
        segments: Ints,
        scratch: Scratch,
        targets: Ints,
        sources: Ints,
    ) -> None:
        """Copy rows of one shard to their places.

        Args:
            rows: Where to.
            reader: The shard, of each group.
            segments: Each row's segment, in order.
            scratch: Memory of the calling thread.
            targets: Place of each row.
            sources: Each row's number in its segment.

        Raises:
            ShardCorruptedError: if a segment was altered. What is in ``rows`` must not be used.
        """
        if isinstance(reader, GroupedReader):
            for part, one in zip(self._parts, reader.readers, strict=True):
                part.gather(rows, one, segments, scratch, targets, sources)
            return
        header = reader.header
        starts = np.flatnonzero(np.diff(segments, prepend=-1))
        numbers = segments[starts].tolist()
        bounds = [*starts.tolist(), len(segments)]
        several = max(1, _TOGETHER_BYTES // header.segment_bytes)
        for first in range(0, len(numbers), several):
            some = numbers[first : first + several]
            ends = bounds[first : first + len(some) + 1]
            records = header.records_in(some[-1])
            alike = self._schema.fixed and records == header.records_per_segment
            if len(some) > 1 and alike:
                chosen = slice(ends[0], ends[-1])
                each = np.repeat(np.arange(len(some)), np.diff(ends))
                layout = self._layout(records)
                columns, length, _ = layout
                together = reader.decrypt_several(some, scratch)
                self._check(reader, some, layout, together)
                rows.gather(
                    columns, targets[chosen], together, length, records, each, sources[chosen]
                )
                continue
            for number, low, high in zip(some, ends, ends[1:], strict=False):
                self.fill(rows, reader, number, scratch, targets[low:high], sources[low:high])

    def _layout(self, records: int) -> _Layout:
        layout = self._layouts.get(records)
        if layout is None:
            offsets, length = column_offsets(self._schema, records)
            places = [(n, offsets[n]) for n in self._names]
            layout = self._layouts[records] = places, length, byte_limits(self._schema, records)
        return layout

    @staticmethod
    def _check(
        reader: ShardReader, segments: list[int], layout: _Layout, plaintext: memoryview
    ) -> None:
        """Look whether segments, one after another, are what their schema says."""
        # As decode_segment does, which need not be called here: the layout is known.
        _, length, limits = layout
        if len(plaintext) != length * len(segments):
            raise reader.corrupted(f"segment {segments[0]} does not fit the schema")
        for first, segment in enumerate(segments if limits else ()):
            if any(
                np.frombuffer(plaintext, np.uint8, end - start, first * length + start).max()
                > largest
                for start, end, largest in limits
            ):
                raise reader.corrupted(f"segment {segment} does not fit the schema")

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
