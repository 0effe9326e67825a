"""Reading columns that lie under keys of their own, in shards that hold the same rows."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_secure.crypto.entries import ColumnGroup, SplitEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, PartitionKey
from lightning_secure.data.format import ColumnData, Header, Schema
from lightning_secure.data.shard import ShardReader
from lightning_secure.data.storage import Storage
from lightning_secure.errors import ShardCorruptedError, WrongKeyError

__all__ = ["GroupedReader", "OpenGroups", "schema_of"]


def schema_of(entry: SplitEntry) -> Schema:
    """Return all columns of a split, in the order of a sample's fields."""
    columns = [column for group in entry.all_groups for column in group.schema]
    if entry.groups:
        by_name = {str(column["name"]): column for column in columns}
        columns = [by_name[name] for name in entry.order]
    return Schema.from_json(columns)


class OpenGroups:
    """The groups of a split that some columns need, with their keys.

    Args:
        manifest: Verified.
        split: Name of a split that it has.
        keys: Releases the partitions' keys, with one call for each that is needed.
        names: The columns that are wanted, all of them in the split.
        root: Where the dataset lies, for messages.

    Raises:
        WrongKeyError: A needed partition was not sealed for this provider's key. The message
            names the columns to leave out.
    """

    def __init__(
        self, manifest: Manifest, split: str, keys: KeyProvider, *, names: Sequence[str]
    ) -> None:
        self._dataset_id = manifest.dataset_id
        self._groups: list[tuple[ColumnGroup, Schema, PartitionKey]] = []
        entry = manifest.splits[split]
        for group in entry.all_groups:
            if set(group.column_names).isdisjoint(names):
                continue
            try:
                key = manifest.open_partition(group.partition, keys)
            except WrongKeyError as error:
                rest = [name for name in names if name not in group.column_names]
                if not entry.groups:
                    raise
                raise WrongKeyError(
                    f"columns {list(group.column_names)} of split {split!r} are sealed under "
                    f"partition {group.partition!r}, which this key does not open: {error}"
                    + (f" Pass columns={rest} to read the others." if rest else "")
                ) from None
            self._groups.append((group, Schema.from_json(group.schema), key))

    def reader(self, storage: Storage, shard: int) -> ShardReader | GroupedReader:
        """Open one shard of each group; raises ShardCorruptedError if one was altered."""
        readers: list[ShardReader] = []
        try:
            for group, schema, key in self._groups:
                entry = group.shards[shard]
                readers.append(
                    ShardReader(
                        storage,
                        entry,
                        key=key.open(entry),
                        schema=schema,
                        dataset_id=self._dataset_id,
                    )
                )
            return readers[0] if len(readers) == 1 else GroupedReader(readers)
        except BaseException:
            for reader in readers:
                reader.close()
            raise


class GroupedReader:
    """Several open shards that hold different columns of the same rows, read as one.

    Args:
        readers: One a group, at least one. They are closed with this one.

    Raises:
        ShardCorruptedError: Their segments do not hold the same rows.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = tuple(readers)
        rows = {(reader.header.records, reader.header.records_per_segment) for reader in readers}
        if len(rows) != 1:
            raise ShardCorruptedError(
                "the shards of a split's groups of columns do not hold the same rows in each "
                "segment; nothing from them was returned."
            )

    @property
    def header(self) -> Header:
        """The first shard's header; what it says of rows holds for all."""
        return self._readers[0].header

    def read_segment(self, index: int) -> dict[str, ColumnData]:
        """Return the columns of one segment's rows.

        Raises:
            ShardCorruptedError: A segment was altered since its shard was opened.
        """
        columns: dict[str, ColumnData] = {}
        for reader in self._readers:
            columns.update(reader.read_segment(index))
        return columns

    def close(self) -> None:
        """Release the files."""
        for reader in self._readers:
            reader.close()
