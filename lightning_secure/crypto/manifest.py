"""The signed description of a dataset: which shards it has, and under which keys they open.

A shard opens only under the data key that the manifest names for it, and only if its header and
all of its segments are the ones that the manifest's signer saw. So a shard that was exchanged,
replayed from an older state, cut or rebuilt by somebody who merely may read is refused.

What a manifest cannot show by itself is that it is the *newest* one. Pin ``min_generation`` or the
manifest's digest where the storage administrator cannot write.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar, overload

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto.encoding import (
    b64decode,
    b64encode,
    canonical_json,
    is_canonical,
    parse_json_object,
)
from lightning_secure.crypto.keys import DataKey, KeyProvider, WrappedKey
from lightning_secure.crypto.signing import Signer, open_envelope, seal_envelope
from lightning_secure.errors import DataError, IntegrityError, ManifestMismatchError
from lightning_secure.files import atomic_writer, read_regular

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "PartitionKey",
    "ShardEntry",
    "SplitEntry",
    "read_manifest",
    "write_manifest",
]

MANIFEST_NAME: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 2**29  # about 800,000 shards
PAYLOAD_TYPE: Final = "application/vnd.lightning-secure.manifest.v1+json"
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE_PATTERN: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
)
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the signer saw of one shard.

    Attributes:
        file: Path below the dataset's root, one folder deep.
        uuid: 16 random bytes that name the shard.
        number: Position in the split, from 0.
        records: Rows in the shard.
        segments: Segments in the shard.
        size: Length of the file in bytes.
        header_sha256: Digest of the 4096 header bytes.
        merkle_root: RFC 6962 root over the segments' tags, in order.
        commitment: The key commitment in the header.
        wrapped_key: The data key under the partition key.
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

    def to_json(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        return {
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

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        fields = _fields(value, cls.__annotations__.keys(), "a shard entry")
        file = _typed(fields["file"], str, "a shard's file name")
        if not _FILE_PATTERN.fullmatch(file) or ".." in file:
            raise IntegrityError("the manifest names a shard file outside of its dataset.")
        return cls(
            file=file,
            uuid=_hex(fields["uuid"], 16),
            number=_count(fields["number"]),
            records=_count(fields["records"], least=1),
            segments=_count(fields["segments"], least=1),
            size=_count(fields["size"], least=1),
            header_sha256=b64decode(fields["header_sha256"], what="a header digest", length=32),
            merkle_root=b64decode(fields["merkle_root"], what="a Merkle root", length=32),
            commitment=b64decode(fields["commitment"], what="a key commitment", length=32),
            wrapped_key=b64decode(fields["wrapped_key"], what="a wrapped key"),
        )


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """One split of a dataset.

    Attributes:
        partition: Name of the partition key under which the shards' keys are wrapped.
        schema: The columns, as JSON values.
        shards: In order.
        attributes: Signed remarks, for example what was done to which column before sealing.
    """

    partition: str
    schema: tuple[Mapping[str, Any], ...]
    shards: tuple[ShardEntry, ...]
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Rows in all shards."""
        return sum(shard.records for shard in self.shards)

    @property
    def content_digest(self) -> str:
        """SHA-256, in hexadecimal, of what the rows are: unchanged when only keys are rotated."""
        content = {
            "schema": list(self.schema),
            "shards": [
                [shard.header_sha256.hex(), shard.merkle_root.hex()] for shard in self.shards
            ],
        }
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the form that the manifest holds."""
        return {
            "partition": self.partition,
            "schema": [dict(column) for column in self.schema],
            "shards": [shard.to_json() for shard in self.shards],
            "attributes": dict(self.attributes),
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        fields = _fields(value, cls.__annotations__.keys(), "a split")
        schema = tuple(
            _typed(column, dict, "a column")
            for column in _typed(fields["schema"], list, "a schema")
        )
        attributes = _typed(fields["attributes"], dict, "a split's attributes")
        for text in attributes.values():
            _typed(text, str, "a split's attribute")
        shards = tuple(
            ShardEntry.from_json(shard)
            for shard in _typed(fields["shards"], list, "a list of shards")
        )
        numbers = [shard.number for shard in shards]
        if not shards or numbers != sorted(set(numbers)):  # gaps: machines have ranges of their own
            raise IntegrityError("the manifest's shards are not numbered in order.")
        total = sum(shard.size for shard in shards)
        if total >= 2**63 or any(shard.records > shard.size for shard in shards):
            raise IntegrityError("the manifest has more rows than bytes. Nothing was read.")
        return cls(
            partition=_name(fields["partition"]),
            schema=schema,
            shards=shards,
            attributes=attributes,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One generation of a dataset.

    Attributes:
        dataset_id: 16 random bytes, the same in every generation.
        generation: Counts the manifests of this dataset from 1.
        previous: Digest of the manifest before this one, or None for the first.
        created: UTC time, RFC 3339.
        splits: By name.
        partitions: For each partition key, its wrapped form per recipient.
    """

    dataset_id: bytes
    generation: int
    previous: str | None
    created: str
    splits: Mapping[str, SplitEntry]
    partitions: Mapping[str, tuple[WrappedKey, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the signed payload as JSON values."""
        return {
            "version": 1,
            "dataset_id": self.dataset_id.hex(),
            "generation": self.generation,
            "previous": self.previous,
            "created": self.created,
            "splits": {name: split.to_json() for name, split in self.splits.items()},
            "partitions": {
                name: [key.to_json() for key in keys] for name, keys in self.partitions.items()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote; raises IntegrityError on anything else."""
        fields = _fields(value, {"version", *cls.__annotations__}, "the manifest")
        if fields["version"] != 1:
            raise IntegrityError("the manifest has a version that this package cannot read.")
        previous = fields["previous"]
        if previous is not None:
            _hex(previous, 32)
        generation = _count(fields["generation"], least=1)
        if (generation == 1) != (previous is None):
            raise IntegrityError("the manifest's generation and predecessor contradict each other.")
        splits = _typed(fields["splits"], dict, "the splits")
        partitions = _typed(fields["partitions"], dict, "the partitions")
        manifest = cls(
            dataset_id=_hex(fields["dataset_id"], 16),
            generation=generation,
            previous=previous,
            created=_typed(fields["created"], str, "the time"),
            splits={_name(name): SplitEntry.from_json(split) for name, split in splits.items()},
            partitions={
                _name(name): tuple(
                    WrappedKey.from_json(key) for key in _typed(keys, list, "a partition's keys")
                )
                for name, keys in partitions.items()
            },
        )
        if not all(manifest.partitions.get(split.partition) for split in manifest.splits.values()):
            raise IntegrityError("the manifest has a split without a partition key.")
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the signed payload, in hexadecimal: what to pin."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def open_partition(self, partition: str, keys: KeyProvider) -> PartitionKey:
        """Return a partition's key, with one call to the provider.

        Raises:
            WrongKeyError: The partition was not sealed for this provider's key.
            IntegrityError: The wrapped key was altered.
        """
        context = _partition_context(self.dataset_id, partition)
        key = keys.unwrap_any(self.partitions[partition], context=context)
        return PartitionKey(key, dataset_id=self.dataset_id, partition=partition)


class PartitionKey:
    """Wraps and unwraps the data keys of one partition's shards.

    Args:
        key: The key itself.
        dataset_id: 16 bytes.
        partition: Name of the partition.
    """

    def __init__(self, key: DataKey, *, dataset_id: bytes, partition: str) -> None:
        self._key = key
        self._dataset_id = dataset_id
        self._partition = partition

    @classmethod
    def create(
        cls, dataset_id: bytes, partition: str, keys: KeyProvider
    ) -> tuple[Self, tuple[WrappedKey, ...]]:
        """Make a fresh partition key; return it, and for the manifest its form per recipient."""
        key = DataKey.generate()
        wrapped = keys.wrap_all(key, context=_partition_context(dataset_id, partition))
        return cls(key, dataset_id=dataset_id, partition=partition), wrapped

    def seal(self, key: DataKey, *, shard_uuid: bytes) -> bytes:
        """Wrap a shard's data key."""
        return self._key.wrap(key, context=self._context(shard_uuid))

    def open(self, entry: ShardEntry) -> DataKey:
        """Unwrap a shard's data key; raises IntegrityError if it is another's or was altered."""
        return self._key.unwrap(entry.wrapped_key, context=self._context(entry.uuid))

    def subkey(self, purpose: str) -> DataKey:
        """Return a key for something else than shards, see :meth:`DataKey.subkey`."""
        return self._key.subkey(purpose)

    def _context(self, shard_uuid: bytes) -> dict[str, str]:
        return {
            "purpose": "shard",
            "dataset": self._dataset_id.hex(),
            "partition": self._partition,
            "shard": shard_uuid.hex(),
        }


class _Place(Protocol):
    """A dataset that is no folder: what ``lightning_secure.data.storage`` opens by its URL."""

    def read(self, name: str) -> bytes: ...


def read_manifest(root: Path | _Place, *, trusted: Mapping[str, Ed25519PublicKey]) -> Manifest:
    """Read and verify the manifest of the dataset at ``root``, a folder or an opened storage.

    Raises:
        ManifestMismatchError: There is none, no trusted key signed it, or its payload is not in
            the one canonical form.
        IntegrityError: It is damaged.
        StorageError: A remote storage did not answer, or refused.
    """
    what = f"manifest {f'{root}/{MANIFEST_NAME}'!r}"
    try:
        if isinstance(root, Path):
            data = read_regular(root / MANIFEST_NAME, limit=MAX_MANIFEST_BYTES)
        else:
            data = root.read(MANIFEST_NAME)
    except FileNotFoundError:
        raise ManifestMismatchError(
            f"{str(root)!r} has no {MANIFEST_NAME}: it is not an encrypted dataset, or its "
            "sealing was never finished. Nothing from it was read."
        ) from None
    except OSError as error:
        raise ManifestMismatchError(
            f"{what} cannot be read ({error.strerror}). Nothing from the dataset was used."
        ) from None
    payload = open_envelope(data, payload_type=PAYLOAD_TYPE, trusted=trusted, what=what)
    manifest = Manifest.from_json(parse_json_object(payload, what=what))
    if not is_canonical(manifest.to_json(), payload):
        raise ManifestMismatchError(f"{what} is not in canonical form. Nothing from it was used.")
    return manifest


def write_manifest(root: Path, manifest: Manifest, *, signer: Signer) -> None:
    """Sign ``manifest`` and replace the one before, atomically; DataError if it is too long."""
    envelope = seal_envelope(
        canonical_json(manifest.to_json()), payload_type=PAYLOAD_TYPE, signer=signer
    )
    if len(envelope) > MAX_MANIFEST_BYTES:
        raise DataError(
            f"the manifest would be longer than {MAX_MANIFEST_BYTES} bytes, the most that is read. "
            "It was not written; the one before stands. Choose larger shards."
        )
    with atomic_writer(root / MANIFEST_NAME) as file:
        file.write(envelope)


def _partition_context(dataset_id: bytes, partition: str) -> dict[str, str]:
    return {"purpose": "partition", "dataset": dataset_id.hex(), "partition": partition}


def _fields(value: Any, names: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != set(names):
        raise IntegrityError(f"{what} in the manifest does not have the expected fields.")
    return value


@overload
def _typed(value: Any, kind: type[dict[Any, Any]], what: str) -> dict[Any, Any]: ...
@overload
def _typed(value: Any, kind: type[_T], what: str) -> _T: ...
def _typed(value: Any, kind: type[_T], what: str) -> Any:
    if not isinstance(value, kind):
        raise IntegrityError(f"{what} in the manifest is not of the expected type.")
    return value


def _count(value: Any, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise IntegrityError("a number in the manifest is not a count.")
    return value


def _hex(value: Any, length: int) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{2 * length}}}", value):
        raise IntegrityError("an id in the manifest is not hexadecimal of the expected length.")
    return bytes.fromhex(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value):
        raise IntegrityError("a name in the manifest has characters that names may not have.")
    return value
