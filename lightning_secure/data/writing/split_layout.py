"""Division of a split into shards: by the keys of columns, and by the subjects of rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_secure.crypto.attributes import seal_attributes
from lightning_secure.crypto.entries import ColumnGroup, ShardEntry, SplitEntry
from lightning_secure.crypto.keys import DataKey, KeyProvider, WrappedKey
from lightning_secure.crypto.parsing import NAME_PATTERN
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import Column, ColumnData, Schema
from lightning_secure.data.format.segment_plan import plan_segments
from lightning_secure.data.shards.shard import seal_shard
from lightning_secure.data.writing.subjects import SubjectPseudonyms
from lightning_secure.errors import ConfigError, DataError


class SplitLayout:
    """The keys of a split that is being sealed, and what is sealed under which.

    Args:
        split: Name of the split, and of its own partition.
        column_keys: For each column under a key of its own, the name of that key. Its partition
            is ``SPLIT.KEY``.
        subject_column: The column that says whose a row is, or None.

    Raises:
        ConfigError: if a name is not one that a partition may have.

    Segment ``i`` of the shards of every group of columns holds the same rows.
    """

    def __init__(
        self, split: str, column_keys: Mapping[str, str], subject_column: str | None
    ) -> None:
        self._split = split
        self._subject_column = subject_column
        self._partition_of = {column: f"{split}.{key}" for column, key in column_keys.items()}
        for key in column_keys.values():
            if not NAME_PATTERN.fullmatch(key) or not NAME_PATTERN.fullmatch(f"{split}.{key}"):
                raise ConfigError(
                    f"column_keys names a key {key!r}: together with the split's name it must be "
                    "1 to 64 letters, digits, '.', '_' and '-'. Nothing was sealed."
                )
        #: The partitions, the split's own first.
        self.partitions = tuple(dict.fromkeys([split, *self._partition_of.values()]))
        self._keys: dict[str, PartitionKey] = {}
        #: Each partition's key, wrapped for the sealer.
        self.wrapped: dict[str, tuple[WrappedKey, ...]] = {}
        self._pseudonyms: SubjectPseudonyms | None = None
        self._subject_key: bytes | None = None
        self._dataset_id = b""

    def create_keys(
        self,
        dataset_id: bytes,
        keys: KeyProvider,
        *,
        own: tuple[PartitionKey, tuple[WrappedKey, ...]],
    ) -> None:
        """Make the keys of the partitions besides ``own``, with one call to the provider each."""
        self._dataset_id = dataset_id
        self._keys[self._split], self.wrapped[self._split] = own
        for name in self.partitions[1:]:
            self._keys[name], self.wrapped[name] = PartitionKey.create(dataset_id, name, keys)
        if self._subject_column is not None:
            key = DataKey.generate()
            self._pseudonyms = SubjectPseudonyms(key)
            self._subject_key = self._keys[self._split].seal_subject_key(key)

    @property
    def by_subject(self) -> bool:
        """Whether each shard holds the rows of one subject."""
        return self._subject_column is not None

    def subjects_of(self, columns: Mapping[str, Any]) -> list[bytes]:
        """Return the pseudonym of each row's subject, or nothing if none are asked for.

        Raises:
            DataError: if the column is absent, or a value does not name a subject.
        """
        if self._pseudonyms is None or self._subject_column is None:
            return []
        return self._pseudonyms.of_column(columns, self._subject_column)

    def groups(self, schema: Schema) -> dict[str, Schema]:
        """Return the columns of each partition, in the order of :attr:`partitions`.

        Raises:
            DataError: if a column under a key of its own is absent, or no other column is left.
        """
        if missing := self._partition_of.keys() - set(schema.names):
            raise DataError(
                f"column_keys names {sorted(missing)}, which the rows do not have: a renamed "
                "column would be sealed under the split's key. Nothing of this call was sealed."
            )
        columns: dict[str, list[Column]] = {name: [] for name in self.partitions}
        for column in schema.columns:
            columns[self._partition_of.get(column.name, self._split)].append(column)
        if not columns[self._split]:
            raise DataError(
                "column_keys gives every column a key of its own; one column at least stays under "
                "the split's key. Nothing of this call was sealed."
            )
        return {name: Schema(tuple(group)) for name, group in columns.items()}

    def tasks(
        self,
        folder: Path,
        columns: Mapping[str, ColumnData],
        *,
        records: int,
        schema: Schema,
        number: int,
        segment_bytes: int,
        subject: bytes | None = None,
        uuid: bytes | None = None,
    ) -> Iterator[Callable[[], ShardEntry]]:
        """Return what seals rows into one new file for each group of columns, in order.

        Args:
            folder: The split's folder.
            columns: The rows, all columns.
            records: Number of rows, at least 1.
            schema: All columns.
            number: Position of the shards in their split.
            segment_bytes: Plaintext length that segments should not exceed, all groups together.
            subject: The pseudonym of the one whose rows they are.
            uuid: Names the shard, if there is one group only.

        Raises:
            DataError: if a row cannot be sealed, see
                :func:`~lightning_secure.data.shards.shard.seal_shard`.
        """
        groups = self.groups(schema)
        per_segment = None
        if len(groups) > 1:
            _, per_segment, _ = plan_segments(columns, records, schema, segment_bytes)
        for partition, group in groups.items():
            seal = functools.partial(
                seal_shard,
                folder,
                {name: columns[name] for name in group.names},
                records=records,
                schema=group,
                dataset_id=self._dataset_id,
                number=number,
                segment_bytes=segment_bytes,
                partition=self._keys[partition],
                records_per_segment=per_segment,
                uuid=uuid if len(groups) == 1 else None,
            )
            yield functools.partial(_of_subject, seal, subject)

    def split_entry(
        self, schema: Schema, entries: Sequence[ShardEntry], attributes: Mapping[str, str]
    ) -> SplitEntry:
        """Return the manifest's description of what :meth:`tasks` wrote, call after call."""
        own, *others = (
            ColumnGroup(
                partition=partition,
                schema=tuple(group.to_json()),
                shards=tuple(entries[index :: len(self.partitions)]),
            )
            for index, (partition, group) in enumerate(self.groups(schema).items())
        )
        return SplitEntry(
            partition=own.partition,
            schema=own.schema,
            shards=own.shards,
            attributes=seal_attributes(attributes, self._keys[self._split]),
            groups=tuple(others),
            order=schema.names if others else (),
            subject_key=self._subject_key,
        )


def _of_subject(seal: Callable[[], ShardEntry], subject: bytes | None) -> ShardEntry:
    return dataclasses.replace(seal(), subject=subject)
