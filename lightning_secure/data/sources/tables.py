"""Tables: Arrow, pandas, Parquet and CSV, all of them through Arrow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lightning_secure.anonymize import AnonymizationPlan, Keep
from lightning_secure.data.sources.arrow import (
    NullRule,
    Stack,
    arrow_type,
    convert_batch,
    require_rules,
)
from lightning_secure.data.sources.source import (
    BATCH_BYTES,
    Batch,
    Checksum,
    Source,
    extra,
    files_identity,
)
from lightning_secure.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_LEFT: Final = "Nothing of the split was put into the dataset."
_STEP: Final = 8192


class TableSource(Source):
    """Rows of one table.

    Args:
        open_batches: Returns the table's batches from the first on, each time it is called.
        fields: Columns of the table and their types.
        what: Names the table in errors.
        identity: Returns what changes whenever the table does, or None.
        rows: How many there are, if known.
        columns: The columns to take, in order; all by default.
        types: Types by column, where the table's own are not meant.
        stack: Columns of numbers that become one, by its name.
        nulls: The rule for nulls, by column; those of other columns are refused.

    Raises:
        ConfigError: if names contradict each other or the table.
        MissingExtraError: if pyarrow is not installed.
    """

    def __init__(
        self,
        open_batches: Callable[[], Iterator[pa.RecordBatch]],
        fields: Mapping[str, pa.DataType],
        *,
        what: str,
        identity: Callable[[], str | None],
        rows: int | None = None,
        columns: Sequence[str] | None = None,
        types: Mapping[str, str] | None = None,
        stack: Mapping[str, Stack] | None = None,
        nulls: Mapping[str, NullRule] | None = None,
    ) -> None:
        self._open_batches = open_batches
        self._what = what
        self._identity = identity
        self._stack = dict(stack or {})
        self._nulls = dict(nulls or {})
        self._typed = dict(types or {})
        require_rules(self._typed, self._nulls)
        stacked = [name for group in self._stack.values() for name in group.columns]
        chosen = dict.fromkeys([*(fields if columns is None else columns), *stacked])
        self._types = {name: self._typed.get(name) for name in chosen}
        self._dates: Mapping[str, bool] | None = None
        #: Rows that a rule for nulls left out, of those that were read so far.
        self.dropped = 0
        self._rows = None if "drop" in self._nulls.values() else rows
        self._fields = fields
        self._check()

    def _check(self) -> None:
        unknown = [
            name for name in [*self._types, *self._typed, *self._nulls] if name not in self._fields
        ]
        if unknown:
            raise ConfigError(
                f"{self._what} has no column {', '.join(map(repr, dict.fromkeys(unknown)))}. "
                "Nothing was sealed."
            )
        stacked = [name for group in self._stack.values() for name in group.columns]
        left = [name for name in self._types if name not in stacked]
        if twice := {name for name in stacked if stacked.count(name) > 1}:
            raise ConfigError(f"columns {sorted(twice)} stand twice in the stacks; name each once.")
        if taken := set(self._stack) & set(left):
            raise ConfigError(
                f"stacks {sorted(taken)} have names of other columns; choose other names."
            )

    @property
    def rows(self) -> int | None:
        """The number of rows, if it is known before they are read."""
        return self._rows

    @property
    def remarks(self) -> Mapping[str, str]:
        """The units of dates that became numbers, and the rules for nulls."""
        pa = extra("pyarrow", "tables", what="a table")
        result = {}
        for name, wanted in self._types.items():
            kind = arrow_type(wanted) if wanted else self._fields[name]
            dated = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
            if dated and not (self._dates or {}).get(name):
                result[f"unit.{name}"] = f"{kind} since 1970-01-01"
        for name, rule in self._nulls.items():
            result[f"nulls.{name}"] = "drop" if rule == "drop" else "fill"
        for name, group in self._stack.items():
            result[f"stack.{name}"] = f"{group.dtype} of {', '.join(group.columns)}"
        return result

    def planned(self, plan: AnonymizationPlan | None) -> Source:
        """Return the source with dates left as dates where ``plan`` makes something of them."""
        if plan is None:
            return self
        stacked = {name for group in self._stack.values() for name in group.columns}
        if both := sorted(stacked & plan.columns.keys()):
            raise ConfigError(
                f"column {', '.join(map(repr, both))} is stacked and named by the anonymisation "
                "plan, which would no longer find it. Nothing was sealed."
            )
        self._dates = {
            name: not isinstance(operator, Keep) for name, operator in plan.columns.items()
        }
        return self

    def shown(self, plan: AnonymizationPlan) -> Source:
        """Return the source with dates left as dates, also those that ``plan`` forgets."""
        self.planned(plan)
        self._dates = dict.fromkeys(self._types, True)
        return self

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield the rows; those before ``start`` are read and thrown away."""
        row = passed = 0
        for batch in self._guarded():
            first, row = row, row + batch.num_rows
            # Without a rule that drops rows, a batch before the start need not be looked at.
            if "drop" not in self._nulls.values() and row <= start:
                passed = row
                continue
            columns = convert_batch(
                batch, first_row=first, types=self._types, nulls=self._nulls, dates=self._dates
            )
            count = len(next(iter(columns.values())))
            self.dropped += batch.num_rows - count
            skip = max(0, min(count, start - passed))
            passed += count
            if skip < count:
                yield self._stacked({name: values[skip:] for name, values in columns.items()})

    def identity(self) -> str | None:
        """Return what changes whenever the table does, or what is made of it."""
        base = self._identity()
        options = [self._types, self._stack, self._nulls]
        return None if base is None else f"{base} {options!r}"

    def _stacked(self, columns: Batch) -> Batch:
        for name, group in self._stack.items():
            parts = [columns.pop(part) for part in group.columns]
            for part, values in zip(group.columns, parts, strict=True):
                if not (isinstance(values, np.ndarray) and values.ndim == 1):
                    raise DataError(f"column {part!r} is stacked and holds no numbers. {_LEFT}")
            with np.errstate(over="ignore"):  # an infinity is refused later on
                columns[name] = np.stack(parts, axis=1).astype(group.dtype)
        return columns

    def _guarded(self) -> Iterator[pa.RecordBatch]:
        pa = extra("pyarrow", "tables", what="a table")
        batches: Iterator[Any] | None = None
        row = 0
        while True:
            batch = None
            try:
                if batches is None:
                    batches = self._open_batches()
                batch = next(batches, None)
                failed = False
            except (pa.ArrowException, OSError):
                failed = True
            if failed:  # outside the handler: Arrow's errors repeat the values
                raise DataError(
                    f"{self._what} cannot be read beyond row {row}: it is damaged, or a value does "
                    f"not fit the type of its column; types={{name: type}} sets types. {_LEFT}"
                )
            if batch is None:
                return
            row += batch.num_rows
            yield batch


def table_source(table: Any, **options: Any) -> TableSource:
    """Return the source of an Arrow table, record batch or reader; a reader is used up.

    >>> import pyarrow as pa
    >>> source = table_source(pa.table({"age": [34, 51]}))
    >>> source.rows, next(source.batches())["age"].tolist()
    (2, [34, 51])
    """
    pa = extra("pyarrow", "tables", what="an Arrow table")
    if isinstance(table, pa.RecordBatchReader):
        return TableSource(
            lambda: iter(table), _fields(table.schema), what="the reader", identity=lambda: None,
            **options,
        )  # fmt: skip
    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    step = max(1, min(_STEP * 8, table.num_rows * BATCH_BYTES // max(1, table.nbytes)))

    def identity() -> str:
        checksum = Checksum()
        sink = pa.PythonFile(_Summing(checksum), mode="w")
        with pa.ipc.new_stream(sink, table.schema) as writer:
            # In batches of one size, so that how the table is chunked does not matter.
            writer.write_table(table.combine_chunks(), max_chunksize=_STEP)
        return f"table:{checksum.hexdigest()}"

    return TableSource(
        lambda: iter(table.to_batches(max_chunksize=step)),
        _fields(table.schema),
        what="the table",
        identity=identity,
        rows=table.num_rows,
        **options,
    )


def pandas_source(frame: Any, **options: Any) -> TableSource:
    """Return the source of a pandas DataFrame; its NaN are nulls, as pandas means them.

    Raises:
        DataError: if the index has a name, or a column mixes types.

    >>> import pandas as pd
    >>> source = pandas_source(pd.DataFrame({"age": [34, 51]}))
    >>> source.rows, next(source.batches())["age"].tolist()
    (2, [34, 51])
    """
    pa = extra("pyarrow", "tables", what="a DataFrame")
    if any(name is not None for name in frame.index.names):
        raise DataError(
            "the DataFrame's index has a name, and an index is not sealed: use reset_index() to "
            "make columns of it, or reset_index(drop=True). Nothing was sealed."
        )
    table = None
    with contextlib.suppress(pa.ArrowException, TypeError, ValueError):
        table = pa.Table.from_pandas(frame, preserve_index=False)
    if table is None:  # outside the handler: its error repeats values
        raise DataError(
            "the DataFrame has a column of mixed types, or two of one name, that Arrow cannot "
            "take. Nothing was sealed."
        )
    return table_source(table, **options)


def parquet_source(path: Path, **options: Any) -> TableSource:
    """Return the source of a Parquet file, or of a folder of them in the order of their names.

    One row group is in memory at a time.

    Raises:
        DataError: if there is no file, one is damaged, or they differ in their columns.
    """
    pa = extra("pyarrow", "tables", what="Parquet")
    pq = extra("pyarrow.parquet", "tables", what="Parquet")
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    schema = None
    rows = 0
    damaged = None
    for part in paths:
        try:
            with pq.ParquetFile(part) as file:
                same = schema is None or file.schema_arrow.equals(schema)
                schema, rows = file.schema_arrow, rows + file.metadata.num_rows
        except (pa.ArrowException, OSError):
            damaged = part
            break
        if not same:
            raise DataError(f"Parquet file {part.name!r} has other columns than the one before it.")
    if damaged is not None or schema is None:
        name = damaged.name if damaged else path.name
        raise DataError(f"Parquet file {name!r} cannot be read. Nothing was sealed.")

    def batches() -> Iterator[Any]:
        for part in paths:
            with pq.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).total_byte_size
                    count = file.metadata.row_group(group).num_rows
                    step = max(1, min(_STEP * 8, count * BATCH_BYTES // max(1, size)))
                    yield from file.iter_batches(batch_size=step, row_groups=[group])

    return TableSource(
        batches,
        _fields(schema),
        what=f"Parquet {path.name!r}",
        identity=lambda: files_identity(paths, root=path),
        rows=rows,
        **options,
    )


def csv_source(path: Path, **options: Any) -> TableSource:
    r"""Return the source of a CSV file with a header line.

    Types are read off the first mebibytes unless ``types`` says them: say ``string`` for codes
    with leading zeros. An empty field is a null, except in columns of text.

    Raises:
        DataError: if the file cannot be read.

    >>> _ = (folder / "rows.csv").write_text("zip,age\n01069,34\n10115,51\n")
    >>> batch = next(csv_source(folder / "rows.csv", types={"zip": "string"}).batches())
    >>> list(batch["zip"]), list(map(int, batch["age"]))
    (['01069', '10115'], [34, 51])
    """
    pa = extra("pyarrow", "tables", what="CSV")
    csv = extra("pyarrow.csv", "tables", what="CSV")
    types = options.get("types") or {}
    convert = csv.ConvertOptions(
        column_types={name: arrow_type(kind) for name, kind in types.items()},
    )

    def opened() -> Any:
        return csv.open_csv(
            path, read_options=csv.ReadOptions(block_size=BATCH_BYTES), convert_options=convert
        )

    schema = None
    try:
        with opened() as reader:
            schema = reader.schema
    except (pa.ArrowException, OSError):
        pass
    if schema is None:  # outside the handler: its error repeats values
        raise DataError(
            f"CSV file {path.name!r} cannot be read, or a value of it does not fit the type of its "
            "column. Nothing was sealed."
        )
    return TableSource(
        lambda: iter(opened()),
        _fields(schema),
        what=f"CSV file {path.name!r}",
        identity=lambda: files_identity([path], root=path),
        **options,
    )


def _fields(schema: pa.Schema) -> dict[str, pa.DataType]:
    if len(set(schema.names)) != len(schema.names):
        raise DataError("the table has two columns of one name. Nothing was sealed.")
    return dict(zip(schema.names, schema.types, strict=True))


class _Summing:
    """A file that keeps a sum of what is written to it."""

    closed = False

    def __init__(self, checksum: Checksum) -> None:
        self._checksum = checksum

    def write(self, data: Any) -> int:
        """Add ``data``."""
        self._checksum.update(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
