"""The signed description of a dataset: which shards it has, and under which keys they open.

A shard opens only under the data key that the manifest names for it, and only if its header and
all of its segments are the ones that the manifest's signer saw. So a shard that was exchanged,
replayed from an older state, cut or rebuilt by a mere reader is refused.

What a manifest cannot show by itself is that it is the *newest* one. Pin ``min_generation`` or the
manifest's digest where the storage administrator cannot write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol, Self, runtime_checkable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto import parsing
from lightning_secure.crypto.encoding import canonical_json, is_canonical, parse_json_object
from lightning_secure.crypto.entries import SplitEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.partitions import PartitionKey, partition_context
from lightning_secure.crypto.signing import Signer, open_envelope, seal_envelope
from lightning_secure.errors import DataError, IntegrityError, ManifestMismatchError
from lightning_secure.util.files import atomic_writer, read_regular

MANIFEST_NAME: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 2**29  # about 800,000 shards
PAYLOAD_TYPE: Final = "application/vnd.lightning-secure.manifest.v1+json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A generation of a dataset.

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

    @property
    def files(self) -> frozenset[str]:
        """Every shard file of the dataset."""
        return frozenset(file for split in self.splits.values() for file in split.files)

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
        fields = parsing.fields(value, {"version", *cls.__annotations__}, "the manifest")
        if fields["version"] != 1:
            raise IntegrityError("the manifest has a version that this package cannot read.")
        previous = fields["previous"]
        if previous is not None:
            parsing.hexadecimal(previous, 32)
        generation = parsing.count(fields["generation"], least=1)
        if (generation == 1) != (previous is None):
            raise IntegrityError("the manifest's generation and predecessor contradict each other.")
        splits = parsing.typed(fields["splits"], dict, "the splits")
        partitions = parsing.typed(fields["partitions"], dict, "the partitions")
        manifest = cls(
            dataset_id=parsing.hexadecimal(fields["dataset_id"], 16),
            generation=generation,
            previous=previous,
            created=parsing.typed(fields["created"], str, "the time"),
            splits={
                parsing.name(name): SplitEntry.from_json(split) for name, split in splits.items()
            },
            partitions={
                parsing.name(name): tuple(
                    WrappedKey.from_json(key)
                    for key in parsing.typed(keys, list, "a partition's keys")
                )
                for name, keys in partitions.items()
            },
        )
        needed = (name for split in manifest.splits.values() for name in split.partitions)
        if not all(manifest.partitions.get(name) for name in needed):
            raise IntegrityError("the manifest has a split without a partition key.")
        return manifest

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the signed payload, in hexadecimal: what to pin."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def open_partition(self, partition: str, keys: KeyProvider) -> PartitionKey:
        """Return a partition's key, with one call to the provider.

        Raises:
            WrongKeyError: if the partition was not sealed for this provider's key.
            IntegrityError: if the wrapped key was altered.
        """
        context = partition_context(self.dataset_id, partition)
        key = keys.unwrap_any(self.partitions[partition], context=context)
        return PartitionKey(key, dataset_id=self.dataset_id, partition=partition)


class _Place(Protocol):
    """A dataset that is no folder: what ``lightning_secure.data.storage`` opens by its URL."""

    def read(self, name: str) -> bytes: ...


def read_manifest(root: Path | _Place, *, trusted: Mapping[str, Ed25519PublicKey]) -> Manifest:
    """Read and verify the manifest of the dataset at ``root``, a folder or an opened storage.

    Raises:
        ManifestMismatchError: if there is no manifest, no trusted key signed it, or its payload is
            not in the one canonical form.
        IntegrityError: if the manifest is damaged.
        StorageError: if a remote storage did not answer, or refused.

    >>> from lightning_secure import seal
    >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> manifest = read_manifest(folder / "data", trusted=keys.trusted_signers)
    >>> manifest.generation, list(manifest.splits), manifest.digest == sealed.manifest_digest
    (2, ['train'], True)
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
    return parse_manifest(data, trusted=trusted, what=what)


def parse_manifest(data: bytes, *, trusted: Mapping[str, Ed25519PublicKey], what: str) -> Manifest:
    """Verify the bytes of a manifest; ``what`` names them in errors.

    Raises:
        ManifestMismatchError: if no trusted key signed the manifest, or its payload is not in the
            one canonical form.
        IntegrityError: if the manifest is damaged.
    """
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


@runtime_checkable
class HasManifest(Protocol):
    """A reader of rows that a manifest names."""

    @property
    def manifest_digest(self) -> str | None:
        """Digest of the manifest, in hexadecimal; None before one was read."""
