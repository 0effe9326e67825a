"""A manifest's entries for a split and its shards, with strict conversion to and from JSON."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from lightning_secure.crypto import parsing
from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json
from lightning_secure.errors import IntegrityError

_FILE_PATTERN: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
)


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard as the manifest's signer saw it.

    Attributes:
        file: Path below the dataset's root, one folder deep.
        uuid: 16 random bytes that name the shard.
        number: Position in the split, from 0. Shards that were erased leave gaps.
        records: Rows in the shard.
        segments: Segments in the shard.
        size: Length of the file in bytes.
        header_sha256: Digest of the 4096 header bytes.
        merkle_root: RFC 6962 root over the segments' tags, in order.
        commitment: The key commitment in the header.
        wrapped_key: The data key under the partition key.
        subject: 16 bytes that stand for the one subject whose rows these are, or None.
    """

    file: str
    uuid: bytes
    number: int
    records: int
    segments: int
    size: int
    header_sha256: bytes
    merkle_root: bytes
    commitment: bytes
    wrapped_key: bytes
    subject: bytes | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        value = {
            "file": self.file,
            "uuid": self.uuid.hex(),
            "number": self.number,
            "records": self.records,
            "segments": self.segments,
            "size": self.size,
            "header_sha256": b64encode(self.header_sha256),
            "merkle_root": b64encode(self.merkle_root),
            "commitment": b64encode(self.commitment),
            "wrapped_key": b64encode(self.wrapped_key),
        }
        return value if self.subject is None else {**value, "subject": self.subject.hex()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        fields = parsing.fields(value, cls.__annotations__, "a shard entry", optional=["subject"])
        file = parsing.typed(fields["file"], str, "a shard's file name")
        if not _FILE_PATTERN.fullmatch(file) or ".." in file:
            raise IntegrityError("the manifest names a shard file outside of its dataset.")
        return cls(
            file=file,
            uuid=parsing.hexadecimal(fields["uuid"], 16),
            number=parsing.count(fields["number"]),
            records=parsing.count(fields["records"], least=1),
            segments=parsing.count(fields["segments"], least=1),
            size=parsing.count(fields["size"], least=1),
            header_sha256=b64decode(fields["header_sha256"], what="a header digest", length=32),
            merkle_root=b64decode(fields["merkle_root"], what="a Merkle root", length=32),
            commitment=b64decode(fields["commitment"], what="a key commitment", length=32),
            wrapped_key=b64decode(fields["wrapped_key"], what="a wrapped key"),
            subject=parsing.hexadecimal(fields["subject"], 16) if "subject" in fields else None,
        )


@dataclass(frozen=True, kw_only=True)
class ColumnGroup:
    """Columns of a split that lie in shards of their own, under a key of their own.

    Attributes:
        partition: Name of the partition key under which the shards' keys are wrapped.
        schema: The columns, as JSON values.
        shards: In order. Shard ``i`` of each group of a split holds the same rows.
    """

    partition: str
    schema: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardEntry, ...]

    @property
    def column_names(self) -> tuple[str, ...]:
        """The columns' names, in order."""
        return tuple(str(column.get("name")) for column in self.schema)

    def to_json(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        return {
            "partition": self.partition,
            "schema": [dict(column) for column in self.schema],
            "shards": [shard.to_json() for shard in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        return cls(**_group_fields(parsing.fields(value, cls.__annotations__, "a column group")))


@dataclass(frozen=True, kw_only=True)
class SplitEntry(ColumnGroup):
    """A split of a dataset: its first group of columns, and its further groups.

    Attributes:
        attributes: Signed remarks, for example what was done to which column before sealing.
        groups: Further groups of columns, each under a partition key of its own.
        order: The names of all columns in the order of a sample's fields; empty without
            ``groups``.
        content: The content digest that the split had before its data keys were exchanged, as
            stated by the signer who exchanged them and compared the rows; None if they never were.
        subject_key: The key that makes subjects' ids into pseudonyms, under the partition key;
            None if the rows are not sealed by subject.
    """

    attributes: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[ColumnGroup, ...] = ()
    order: tuple[str, ...] = ()
    content: str | None = None
    subject_key: bytes | None = None

    @property
    def records(self) -> int:
        """Rows in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def all_groups(self) -> tuple[ColumnGroup, ...]:
        """Every group of columns; the first is the split's own."""
        return (self, *self.groups)

    @property
    def partitions(self) -> tuple[str, ...]:
        """The partition keys that all columns together need."""
        return tuple(group.partition for group in self.all_groups)

    @property
    def files(self) -> Iterator[str]:
        """Every shard file, of all groups."""
        return (shard.file for group in self.all_groups for shard in group.shards)

    @property
    def content_digest(self) -> str:
        """SHA-256, in hexadecimal, of what the rows are: unchanged when only keys are rotated."""
        if self.content is not None:
            return self.content
        content: dict[str, Any] = _content(self)
        if self.groups:
            content["groups"] = [_content(group) for group in self.groups]
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        value = {**super().to_json(), "attributes": dict(self.attributes)}
        if self.groups:
            value["groups"] = [group.to_json() for group in self.groups]
            value["order"] = list(self.order)
        if self.content is not None:
            value["content"] = self.content
        if self.subject_key is not None:
            value["subject_key"] = b64encode(self.subject_key)
        return value

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        fields = parsing.fields(
            value,
            ["partition", "schema", "shards", "attributes"],
            "a split",
            optional=["groups", "order", "content", "subject_key"],
        )
        attributes = parsing.typed(fields["attributes"], dict, "a split's attributes")
        for text in attributes.values():
            parsing.typed(text, str, "a split's attribute")
        key = fields.get("subject_key")
        split = cls(
            **_group_fields(fields),
            attributes=attributes,
            groups=tuple(
                ColumnGroup.from_json(group)
                for group in parsing.typed(fields.get("groups", []), list, "the column groups")
            ),
            order=tuple(
                parsing.typed(name, str, "a column's name")
                for name in parsing.typed(fields.get("order", []), list, "the columns' order")
            ),
            content=parsing.hexadecimal(fields["content"], 32).hex()
            if "content" in fields
            else None,
            subject_key=None if key is None else b64decode(key, what="a wrapped key"),
        )
        split._check_sizes()
        split._check_groups()
        return split

    def _check_sizes(self) -> None:
        """Raise IntegrityError if sizes add up to what cannot be counted with."""
        shards = [shard for group in self.all_groups for shard in group.shards]
        total = sum(shard.size for shard in shards)
        if total >= 2**63 or any(shard.records > shard.size for shard in shards):
            raise IntegrityError("the manifest has more rows than bytes. Nothing was read.")

    def _check_groups(self) -> None:
        """Raise IntegrityError unless the groups hold the same rows and columns of their own."""
        rows = [(shard.number, shard.records, shard.subject) for shard in self.shards]
        names = [name for group in self.all_groups for name in group.column_names]
        if (
            any(
                [(shard.number, shard.records, shard.subject) for shard in group.shards] != rows
                for group in self.groups
            )
            or len(set(self.partitions)) != len(self.partitions)
            or (bool(self.groups) and sorted(names) != sorted(self.order))
            or len(set(names)) != len(names)
        ):
            raise IntegrityError(
                "the manifest's groups of columns do not hold the same rows. Nothing was read."
            )


def _group_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    schema: Sequence[Any] = parsing.typed(fields["schema"], list, "a schema")
    shards = tuple(
        ShardEntry.from_json(shard)
        for shard in parsing.typed(fields["shards"], list, "a list of shards")
    )
    pairs = itertools.pairwise(shard.number for shard in shards)
    if not shards or not all(before < after for before, after in pairs):
        raise IntegrityError("the manifest's shards are not numbered in order.")
    return {
        "partition": parsing.name(fields["partition"]),
        "schema": tuple(parsing.typed(column, dict, "a column") for column in schema),
        "shards": shards,
    }


def _content(group: ColumnGroup) -> dict[str, Any]:
    return {
        "schema": list(group.schema),
        "shards": [[shard.header_sha256.hex(), shard.merkle_root.hex()] for shard in group.shards],
    }
