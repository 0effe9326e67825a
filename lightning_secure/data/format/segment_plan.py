"""Into how many segments the rows of a shard go."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from lightning_secure.data.format.columns import ColumnData, Schema, segment_lengths
from lightning_secure.errors import DataError


def plan_segments(
    columns: Mapping[str, ColumnData],
    records: int,
    schema: Schema,
    segment_bytes: int,
    *,
    per_segment: int | None = None,
) -> tuple[int, int, int]:
    """Return how many segments there are, how many rows each holds, and its plaintext length."""
    length_of = segment_lengths(schema, columns)
    decided, per_segment = per_segment is not None, per_segment or records
    while True:
        starts = range(0, records, per_segment)
        # Rows of one size need one look, at the first segment.
        length = max(
            length_of(start, min(start + per_segment, records))
            for start in (starts[:1] if schema.fixed else starts)
        )
        if decided or length <= segment_bytes or per_segment == 1:
            break
        per_segment = max(1, min(per_segment - 1, per_segment * segment_bytes // length))
    if length > MAX_SEGMENT_BYTES or len(starts) > MAX_SEGMENTS:
        raise DataError(
            f"the rows need {len(starts)} segments of {length} bytes, and a shard can have "
            f"{MAX_SEGMENTS} of {MAX_SEGMENT_BYTES}. Nothing of them was written. Choose larger "
            "segments or smaller shards, or split the rows."
        )
    return len(starts), per_segment, length
