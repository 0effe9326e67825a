"""Sealing a Ray dataset: parts on the workers, one manifest by the driver.

Ray tells its makers how it is used unless told otherwise; here it is told otherwise.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported

from lightning_secure.anonymize import AnonymizationPlan, AnonymizationReport
from lightning_secure.crypto.attributes import seal_attributes
from lightning_secure.crypto.entries import ShardEntry, SplitEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.manifests.commit import commit_split, open_or_start
from lightning_secure.data.manifests.garbage import remove_unnamed
from lightning_secure.data.manifests.new_split import require_free
from lightning_secure.data.manifests.rollback_pins import ManifestPin, Pins
from lightning_secure.data.shards.shard import ShardReader
from lightning_secure.data.sources.arrow import NullRule, Stack, require_rules
from lightning_secure.data.sources.tables import table_source
from lightning_secure.data.storage import LocalStorage
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.data.writing.resume import SealingState
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.writer import SplitWriter
from lightning_secure.errors import DataError, IntegrityError, MissingExtraError

if TYPE_CHECKING:
    import pyarrow as pa

    _Base: Any = object
else:
    try:
        from ray.data import Datasink as _Base
    except ImportError:  # the class can be named, and says what is missing when it is used
        _Base = None

#: Each task numbers its shards in a range of its own, so that their order does not depend on which
#: task is done first, and a task that is tried again numbers them as before.
_SHARDS_PER_TASK: Final = 4096
_MOST_TASKS: Final = 2**32 // _SHARDS_PER_TASK


class EncryptedShardDatasink(_Base or object):  # type: ignore[misc] # ray ships few types
    """Seals a Ray dataset as one split: ``dataset.write_datasink(EncryptedShardDatasink(...))``.

    Args:
        root: The dataset's folder, on storage that the driver and all workers share.
        split: Name of the split.
        keys: Guards the split's key, and signs the manifest. It travels to the workers as
            configuration, never as a key: each unwraps the split's key for itself, so the provider
            must be able to unwrap there.
        segment_bytes: Plaintext length of a segment, in bytes; each read of a row reads one.
        shard_bytes: Plaintext length of a shard, in bytes; each worker holds one in memory.
        schema: The columns. By default each task reads them off its first rows, and all must agree.
        anonymize: The plan for identifying columns, applied on the workers before a row is
            encrypted.
        allow_nonfinite: Whether NaN and infinities are sealed rather than refused.
        replace: Whether an existing split of this name may be replaced.
        min_generation: The oldest generation of the dataset that is built on; the driver checks,
            at the start and under the lock at the end.
        manifest_digest: The only manifest that is built on, as SHA-256 in hexadecimal.
        columns: The columns to take, in order; all by default.
        types: Types by column, where the dataset's own are not meant.
        stack: Columns of numbers that become one, by its name.
        nulls: The rule for nulls, by column; those of other columns are refused.

    Raises:
        ConfigError: if an argument is wrong, the split exists, or the folder cannot be written.
        MissingExtraError: if Ray is not installed.
        IntegrityError: if the folder holds a manifest that is not this provider's, or not what was
            pinned.

    Guarantees:
        The split is in the manifest with every row of the dataset once, or not at all. A task that
        died and was tried again counts once; what its first try wrote is removed. The driver opens
        every shard before it signs. Shards are in the order of Ray's tasks, which is the order of
        the rows where the dataset's context has ``execution_options.preserve_order`` set.

    What Ray holds is not encrypted: blocks lie in its object store, and on the disk of a node that
    spills them. Key uses on the workers are not in the driver's audit log.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str,
        keys: KeyProvider,
        segment_bytes: int = 65536,
        shard_bytes: int = 64 * 1024 * 1024,
        schema: Schema | None = None,
        anonymize: AnonymizationPlan | None = None,
        allow_nonfinite: bool = False,
        replace: bool = False,
        min_generation: int | None = None,
        manifest_digest: str | None = None,
        columns: list[str] | None = None,
        types: Mapping[str, str] | None = None,
        stack: Mapping[str, Stack] | None = None,
        nulls: Mapping[str, NullRule] | None = None,
    ) -> None:
        if _Base is None:
            raise MissingExtraError(
                "EncryptedShardDatasink needs ray, which is not installed. Nothing was sealed. "
                "pip install 'lightning-secure[ray]'"
            )
        self._root = folder_of(root).absolute()
        self._split = split
        self._keys = keys
        self._options = SealOptions(
            segment_bytes=segment_bytes,
            shard_bytes=shard_bytes,
            schema=schema,
            anonymize=anonymize,
            allow_nonfinite=allow_nonfinite,
            replace=replace,
            pin=ManifestPin(min_generation, manifest_digest),
        )
        self._reading: dict[str, Any] = {
            "columns": columns,
            "types": types,
            "stack": stack,
            "nulls": nulls,
        }
        require_rules(types or {}, nulls or {})
        self._pins = Pins(self._options.pin)
        # A writer knows which arguments are wrong; this one seals nothing.
        SplitWriter(self._root, split, keys, self._options).abort()
        self._dataset = open_or_start(self._root, split, keys, pins=self._pins)
        _, self._wrapped = PartitionKey.create(self._dataset.dataset_id, split, keys)
        # A folder of its own: whatever a dead task left there is not another sealing's.
        self._folder = self._root / f"{split[:40]}.{secrets.token_hex(8)}"

    def on_write_start(self, schema: Any = None) -> None:
        """Make the folder for the shards; called by Ray on the driver."""
        self._folder.mkdir()

    def write(self, blocks: Iterable[Any], ctx: Any) -> dict[str, Any]:
        """Seal the rows of one task, on a worker, and return what the manifest needs to know."""
        part = _Part(self, task=ctx.task_idx)
        with part:
            for columns in self._columns(blocks, part):
                part.take(columns, copy=False)
        return {
            "task": ctx.task_idx,
            "schema": part.columns,
            "shards": [entry.to_json() for entry in part.entries],
            "dropped": part.dropped,
            "remarks": dict(part.remarks),
            "report": part.report.text if part.report is not None else None,
        }

    def on_write_complete(self, write_result: Any) -> None:
        """Open every shard, and sign one manifest for all; called by Ray on the driver.

        Raises:
            DataError: if there are no rows, or tasks disagree about the columns.
            IntegrityError: if a shard is not there, or rows are missing or doubled.
        """
        parts = sorted(write_result.write_returns, key=lambda part: int(part["task"]))
        dropped = sum(int(part["dropped"]) for part in parts)
        parts = [part for part in parts if part["shards"]]
        shards = tuple(ShardEntry.from_json(entry) for part in parts for entry in part["shards"])
        partition = self._check(parts, shards, int(write_result.num_rows), dropped)
        attributes = {**parts[0]["remarks"], **_reported(parts)}
        entry = SplitEntry(
            partition=self._split,
            schema=tuple(parts[0]["schema"]),
            shards=shards,
            attributes=seal_attributes(attributes, partition),
        )
        commit_split(
            self._root,
            self._split,
            entry,
            partitions={self._split: self._wrapped},
            keys=self._keys,
            replace=self._options.replace,
            pins=self._pins,
        )
        self._clear()  # of tasks that died

    def on_write_failed(self, error: Exception) -> None:
        """Remove what was written, unless a manifest names it; called by Ray on the driver."""
        # Ray calls this for an error after the commit as well, and then the rows stand.
        if not self._clear():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _clear(self) -> list[str]:
        """Remove the files that no manifest names; return those that are still there."""
        if not self._folder.is_dir():
            return []
        files = [f"{self._folder.name}/{path.name}" for path in self._folder.iterdir()]
        return remove_unnamed(self._root, files, keys=self._keys)

    def _check(
        self, parts: list[dict[str, Any]], shards: tuple[ShardEntry, ...], rows: int, dropped: int
    ) -> PartitionKey:
        require_free(self._dataset, self._root, self._split, replace=self._options.replace)
        if not parts:
            raise DataError(
                f"the dataset has no rows for split {self._split!r}, and an empty split is most "
                "often a mistake upstream. The dataset was left as it was."
            )
        if different := _different(part["schema"] for part in parts):
            raise DataError(
                f"the tasks found different columns in their rows: {'; '.join(different)}. Convert "
                "them before they are written, or pass schema= or types=. The dataset was left as "
                "it was."
            )
        numbers = [entry.number for entry in shards]
        sealed = sum(entry.records for entry in shards)
        if len(set(numbers)) != len(numbers) or sealed + dropped != rows:
            raise IntegrityError(
                f"Ray reports {rows} rows, and the tasks sealed {sealed} and left out {dropped}: "
                "some are missing or doubled. The dataset was left as it was."
            )
        partition = _open(self._dataset, self._split, self._wrapped, self._keys)
        schema = Schema.from_json(parts[0]["schema"])
        for entry in shards:
            ShardReader(
                LocalStorage(self._root),
                entry,
                key=partition.open(entry),
                schema=schema,
                dataset_id=self._dataset.dataset_id,
            ).close()
        return partition

    def _types_of_nulls(self, table: pa.Table) -> dict[str, str]:
        """Return the schema's types for the columns of a block that hold nulls only."""
        schema, rules = self._options.schema, self._reading["nulls"] or {}
        if schema is None:
            return {}
        scalar = {
            column.name: column.dtype if column.kind == "tensor" else column.kind
            for column in schema.columns
            if not column.shape and column.kind != "ragged" and column.dtype != "bfloat16"
        }
        return {
            field.name: scalar[field.name]
            for field in table.schema
            if str(field.type) == "null" and field.name in rules and field.name in scalar
        }

    def _columns(self, blocks: Iterable[Any], part: _Part) -> Iterator[dict[str, Any]]:
        from ray.data.block import BlockAccessor

        for block in blocks:
            table = _plain(BlockAccessor.for_block(block).to_arrow())
            if table.num_rows == 0:
                continue
            options = {name: value for name, value in self._reading.items() if value is not None}
            # Of a block in which a column holds nulls only, Arrow knows no type.
            options["types"] = {**self._types_of_nulls(table), **options.get("types", {})}
            source = table_source(table, **options)
            source.planned(self._options.anonymize)
            part.remarks = {**source.remarks, **part.remarks}
            yield from source.batches()
            part.dropped += source.dropped


def _different(schemas: Iterable[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the columns in which schemas differ, and in what."""
    tables = [{str(column["name"]): column for column in schema} for schema in schemas]
    found = []
    for name in dict.fromkeys(name for table in tables for name in table):
        forms = dict.fromkeys(_form(table.get(name)) for table in tables)
        if len(forms) > 1:
            found.append(f"column {name!r} is {', '.join(f'{form} in some' for form in forms)}")
    if not found and len({tuple(table) for table in tables}) > 1:
        found.append("the columns stand in another order in some")
    return found


def _form(column: Mapping[str, Any] | None) -> str:
    if column is None:
        return "missing"
    if column["kind"] in ("bytes", "string"):
        return str(column["kind"])
    shape = f" of shape {tuple(column['shape'])}" if column["shape"] else ""
    ragged = "ragged " if column["kind"] == "ragged" else ""
    return f"{ragged}{column['dtype']}{shape}"


class _Part(SplitWriter):
    """Seals the rows of one task, and commits nothing."""

    def __init__(self, sink: EncryptedShardDatasink, *, task: int) -> None:
        if not 0 <= task < _MOST_TASKS:
            raise DataError(f"Ray started more than {_MOST_TASKS} write tasks. Nothing was sealed.")
        self._sink = sink
        self._first_number = task * _SHARDS_PER_TASK
        self.entries: tuple[ShardEntry, ...] = ()
        self.columns: list[dict[str, Any]] = []
        self.dropped = 0
        options = dataclasses.replace(sink._options, replace=True)
        super().__init__(sink._root, sink._split, sink._keys, options)
        self.remarks = self._pending.described
        self._folder = sink._folder

    def _open_dataset(self) -> Manifest:
        return self._sink._dataset

    def _begin(self, dataset: Manifest) -> SealingState:
        sink = self._sink
        partition = _open(dataset, sink._split, sink._wrapped, sink._keys)
        return SealingState(partition, sink._wrapped, folder=sink._folder)

    def close(self) -> None:
        """Seal what remains; a task without rows is none."""
        if self.records:
            super().close()
        else:
            self.abort()

    def _new_split(self, schema: Schema, shards: tuple[ShardEntry, ...]) -> None:
        if len(shards) > _SHARDS_PER_TASK:
            raise DataError(
                f"a task sealed more than {_SHARDS_PER_TASK} shards. Choose larger shards or "
                "smaller tasks. The dataset was left as it was."
            )
        self.entries, self.columns = shards, schema.to_json()


def _reported(parts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the reports of all tasks, as the remark of a split that one of them all is."""
    reports = [AnonymizationReport.parse(part["report"]) for part in parts if part["report"]]
    if not reports:
        return {}
    unknown = "rows of one class may have been sealed by several workers, each of which saw its own"
    return AnonymizationReport.together(reports, unknown=unknown).attributes


def _open(
    dataset: Manifest, split: str, wrapped: tuple[WrappedKey, ...], keys: KeyProvider
) -> PartitionKey:
    partitions = {split: wrapped}
    return dataclasses.replace(dataset, partitions=partitions).open_partition(split, keys)


def _plain(table: pa.Table) -> pa.Table:
    """Return the table with Ray's own tensor columns as Arrow's."""
    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if not isinstance(field.type, pa.BaseExtensionType) or not hasattr(
            field.type, "to_pandas_dtype"
        ):
            continue
        if isinstance(field.type, pa.FixedShapeTensorType):
            continue
        array = table.column(index).combine_chunks()
        values = array.to_numpy(zero_copy_only=False)
        if values.dtype == object:
            if any(value.ndim != 1 for value in values):
                raise DataError(
                    f"column {field.name!r} holds tensors of different shapes; only vectors may "
                    "differ in length. Nothing of the split was put into the dataset."
                )
            plain = pa.array(
                [value.tolist() for value in values], pa.list_(pa.from_numpy_dtype(values[0].dtype))
            )
        else:
            plain = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
        table = table.set_column(index, field.name, plain)
    return table
