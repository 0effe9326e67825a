"""Rows that were taken for a split and are in no shard yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_secure.anonymize import AnonymizationReport
from lightning_secure.anonymize.plan import Applied
from lightning_secure.anonymize.tally import Prepared, Tally
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from lightning_secure.data.format.columns import ColumnData, Schema, segment_lengths
from lightning_secure.data.format.convert import (
    convert_column,
    count_rows,
    infer_column,
    joined,
    require_names,
)
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.split_layout import SplitLayout
from lightning_secure.data.writing.subjects import by_subject, taken
from lightning_secure.errors import DataError


class PendingRows:
    """Checks rows as they come, and hands them on in portions of one shard each.

    Args:
        layout: Of the split.
        keys: The source of the keys of pseudonyms.
        options: Of the sealing.

    Attributes:
        schema: The columns, once they are known.
        rows: How many are held.
        unseen: How many rows were sealed before and are missing in the report.
    """

    def __init__(self, layout: SplitLayout, keys: KeyProvider, options: SealOptions) -> None:
        anonymize = options.anonymize
        self.schema = options.schema
        self.rows = self.unseen = 0
        self._layout = layout
        self._shard_bytes = options.shard_bytes
        self._plan = anonymize
        self._anonymizer = anonymize.bind(keys) if anonymize is not None else None
        self._tally = Tally(anonymize) if anonymize is not None else None
        self._allow_nonfinite = options.allow_nonfinite
        self._bytes = 0
        self._parts: list[Mapping[str, ColumnData]] = []
        self._subjects: list[bytes] = []

    @property
    def report(self) -> AnonymizationReport | None:
        """The plan's report so far; None without a plan."""
        return None if self._tally is None else self._tally.report(unseen=self.unseen)

    @property
    def described(self) -> dict[str, str]:
        """The operators on columns, for the manifest."""
        plan = self._plan.describe() if self._plan is not None else {}
        return {f"anonymize.{name}": text for name, text in plan.items()}

    @property
    def remarks(self) -> dict[str, str]:
        """The operators on columns, and the report, for the manifest."""
        report = self.report
        return self.described | (report.attributes if report is not None else {})

    def recount(self, columns: Mapping[str, Any]) -> None:
        """Look again at the next of the rows that were sealed before.

        Raises:
            DataError: if the rows are not what was sealed, or are more than that.
        """
        rows = count_rows(columns)
        if rows > self.unseen:
            raise DataError(
                f"{rows} rows were given to be looked at again, and {self.unseen} are left that "
                "were sealed before. They were not counted."
            )
        applied = self._anonymized(columns)
        part = self._converted(self._schema_of(applied.columns), applied.columns, copy=False)
        prepared = self._prepared(columns, applied, part, rows)
        self.unseen -= rows
        self._count(prepared)

    def _count(self, prepared: Prepared | None) -> None:
        if self._tally is not None and prepared is not None:
            self._tally.add(prepared)

    def _anonymized(self, columns: Mapping[str, Any]) -> Applied:
        if self._anonymizer is None:
            return Applied(dict(columns), {})
        return self._anonymizer.run(columns)

    def _prepared(
        self,
        columns: Mapping[str, Any],
        applied: Applied,
        part: Mapping[str, Any],
        rows: int,
    ) -> Prepared | None:
        # Values are counted as shards hold them, where 1, 1.0 and True are one number.
        if self._tally is None:
            return None
        return self._tally.prepared(columns, Applied(dict(part), applied.found), rows=rows)

    def _schema_of(self, columns: Mapping[str, Any]) -> Schema:
        schema = self.schema or Schema(
            tuple(infer_column(name, values) for name, values in columns.items())
        )
        require_names(columns.keys(), schema.names)
        return schema

    def _converted(
        self, schema: Schema, columns: Mapping[str, Any], *, copy: bool, first_row: int = 0
    ) -> dict[str, ColumnData]:
        return {
            column.name: convert_column(
                column,
                columns[column.name],
                allow_nonfinite=self._allow_nonfinite,
                first_row=first_row,
                copy=copy,
            )
            for column in schema.columns
        }

    @property
    def full(self) -> bool:
        """Whether there is enough for a shard."""
        return self._bytes >= self._shard_bytes

    def take(self, columns: Mapping[str, Any], *, copy: bool, first_row: int) -> None:
        """Take many rows at once.

        Args:
            columns: For each column its values.
            copy: Whether the memory may be used for something else after the call.
            first_row: Number of the first one in the split, for errors.

        Raises:
            DataError: if a column is missing or unknown, or a value does not fit. No row was taken.
        """
        rows = count_rows(columns)
        if rows == 0:
            return
        subjects = self._layout.subjects_of(columns)
        applied = self._anonymized(columns)
        schema = self._schema_of(applied.columns)
        self._layout.groups(schema)
        part = self._converted(schema, applied.columns, copy=copy, first_row=first_row)
        length_of = segment_lengths(schema, part)
        if length_of(0, rows) > MAX_SEGMENT_BYTES:
            longest = max(length_of(row, row + 1) for row in range(rows))
            if longest > MAX_SEGMENT_BYTES:
                raise DataError(
                    f"a row takes {longest} bytes, and a segment can have {MAX_SEGMENT_BYTES}. "
                    "Nothing of this call was sealed. Split the row, or store a reference to it."
                )
        prepared = self._prepared(columns, applied, part, rows)
        self.schema = schema
        self._parts.append(part)
        self._subjects += subjects
        self.rows += rows
        self._bytes += length_of(0, rows)
        self._count(prepared)

    def portions(
        self, schema: Schema, *, last: bool
    ) -> Iterator[tuple[dict[str, ColumnData], int, bytes | None]]:
        """Hand on rows for one shard after another; what is left is less than a shard.

        Args:
            schema: The columns.
            last: Whether nothing is left.

        Yields:
            The columns of some rows, their number, and whose they are, if that is asked for.
        """
        columns = {name: joined([part[name] for part in self._parts]) for name in schema.names}
        self._parts = []
        rows, start = self.rows, 0
        # A segment has one row at least, so that many rows never need too many segments.
        per_shard = max(1, rows * self._shard_bytes // max(1, self._bytes))
        per_shard = min(per_shard, MAX_SEGMENTS)
        while not self._layout.by_subject and (
            rows - start >= per_shard or (last and start < rows)
        ):
            stop = min(start + per_shard, rows)
            chosen = {name: values[start:stop] for name, values in columns.items()}
            self.rows -= stop - start
            yield chosen, stop - start, None
            start = stop
        if self._layout.by_subject:
            for subject, own in by_subject(self._subjects, per_shard):
                chosen = {name: taken(values, own) for name, values in columns.items()}
                self.rows -= len(own)
                yield chosen, len(own), subject
            self._subjects, start = [], rows
        # Cloned, so that the rest of a large batch does not keep all of it in memory.
        rest = {
            name: values[start:].clone() if isinstance(values, Tensor) else values[start:]
            for name, values in columns.items()
        }
        self._parts = [rest] if start < rows else []
        self.rows = rows - start
        self._bytes = segment_lengths(schema, rest)(0, rows - start)

    def forget(self) -> None:
        """Let go of all rows."""
        self._parts, self._subjects = [], []
        self.rows = self._bytes = 0
