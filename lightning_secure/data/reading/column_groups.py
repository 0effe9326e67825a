"""Reading columns that lie under keys of their own, in shards that hold the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from lightning_secure.crypto.attributes import open_attributes
from lightning_secure.crypto.entries import ColumnGroup, ShardEntry, SplitEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import ColumnData, Schema
from lightning_secure.data.format.header import HEADER_BYTES, Header
from lightning_secure.data.shards.shard import ShardReader
from lightning_secure.data.storage import Storage
from lightning_secure.errors import ShardCorruptedError, WrongKeyError


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

    Raises:
        WrongKeyError: if a needed partition was not sealed for this provider's key. The message
            names the columns to leave out.
    """

    def __init__(
        self, manifest: Manifest, split: str, keys: KeyProvider, *, names: Sequence[str]
    ) -> None:
        self._dataset_id = manifest.dataset_id
        self._attributes = manifest.splits[split].attributes
        self._all = manifest.splits[split].all_groups
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

    @property
    def schemas(self) -> tuple[Schema, ...]:
        """The columns of each group that is open, in order."""
        return tuple(schema for _, schema, _ in self._groups)

    @property
    def attributes(self) -> dict[str, str]:
        """The manifest's remarks on the split; encrypted ones, if its own columns are open."""
        keys = {group.partition: key for group, _, key in self._groups}
        return open_attributes(self._attributes, keys.get(self._all[0].partition))

    @property
    def entries(self) -> Sequence[ShardEntry]:
        """The shards of the split's first group; those of all groups hold the same rows."""
        return self._all[0].shards

    def segment_bytes(self, shard: int, reader: OpenShard) -> int:
        """Return the plaintext of one segment of a shard, of all groups together, in bytes.

        It does not depend on which groups are open: two runs that read other columns of a split
        have the same order of its rows. Of groups that are not open it is known on average.
        """
        if len(self._all) == 1:
            return reader.header.segment_bytes
        entries = [group.shards[shard] for group in self._all]
        # Segments of a split's groups hold the same rows, so there are as many of each.
        return max(1, sum(entry.size - HEADER_BYTES for entry in entries) // entries[0].segments)

    def reader(self, storage: Storage, shard: int) -> OpenShard:
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
        readers: One a group, in the order of :attr:`OpenGroups.schemas`.

    Raises:
        ShardCorruptedError: if the shards' segments do not hold the same rows.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = tuple(readers)
        rows = {(reader.header.records, reader.header.records_per_segment) for reader in readers}
        if len(rows) != 1:
            raise ShardCorruptedError(
                "the shards of a split's groups of columns do not hold the same rows in each "
                "segment; nothing from them was returned."
            )

    @property
    def header(self) -> Header:
        """The first shard's header; what it says of rows holds for all."""
        return self.readers[0].header

    def read_segment(self, index: int) -> dict[str, ColumnData]:
        """Return the columns of one segment's rows.

        Raises:
            ShardCorruptedError: if a segment was altered since its shard was opened.
        """
        columns: dict[str, ColumnData] = {}
        for reader in self.readers:
            columns.update(reader.read_segment(index))
        return columns


#: The shards that hold the same rows, of each group that is open.
OpenShard: TypeAlias = ShardReader | GroupedReader
