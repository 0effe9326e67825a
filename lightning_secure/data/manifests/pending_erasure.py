"""The record of a pending erasure, written before the rows go.

An erasure is one new manifest, and then the end of the old key and a try to open the old manifest.
A crash in between leaves the rows out of the dataset and the old key alive. The record beside the
manifest holds what the rest needs: above all the old manifest, which is in place no more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto import parsing
from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.crypto.entries import ShardEntry, SplitEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import MAX_MANIFEST_BYTES, Manifest, read_manifest
from lightning_secure.crypto.signing import Signer, open_envelope, seal_envelope
from lightning_secure.errors import IntegrityError
from lightning_secure.util.files import atomic_writer, read_regular, sync_directory

RECORD_NAME: Final = ".erasing"
PAYLOAD_TYPE: Final = "application/vnd.lightning-secure.erasure.v1+json"
_FIELDS: Final = {
    "version",
    "split",
    "numbers",
    "provider",
    "key_id",
    "retire",
    "retired",
    "before",
}


@dataclass(frozen=True, kw_only=True)
class UnfinishedErasure:
    """An erasure that has begun.

    Attributes:
        split: Name of the split.
        numbers: Numbers of the shards.
        before: The manifest that still names them.
        key: Provider and id of the key that the manifest was opened with.
        retire: Whether that key is to be destroyed.
        retired: Whether it was.
    """

    split: str
    numbers: frozenset[int]
    before: Manifest
    key: tuple[str, str]
    retire: bool
    retired: bool = False

    @property
    def entry(self) -> SplitEntry:
        """The split as it was."""
        return self.before.splits[self.split]

    @property
    def erased(self) -> list[tuple[str, ShardEntry]]:
        """The shards, each with its partition."""
        return [
            (group.partition, shard)
            for group in self.entry.all_groups
            for shard in group.shards
            if shard.number in self.numbers
        ]

    def happened(self, current: Manifest) -> bool:
        """Whether the manifest in place is of the same dataset, and without the rows."""
        return current.dataset_id == self.before.dataset_id and not any(
            shard.file in current.files for _, shard in self.erased
        )

    def write(self, root: Path, signer: Signer) -> None:
        """Put the record in place, whole, and return when it is on the disk."""
        payload = canonical_json(
            {
                "version": 1,
                "split": self.split,
                "numbers": sorted(self.numbers),
                "provider": self.key[0],
                "key_id": self.key[1],
                "retire": self.retire,
                "retired": self.retired,
                "before": self.before.to_json(),
            }
        )
        with atomic_writer(root / RECORD_NAME, mode=0o600) as file:
            file.write(seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=signer))

    @classmethod
    def read(cls, root: Path, *, trusted: Mapping[str, Ed25519PublicKey]) -> Self | None:
        """Return the record in place, or None.

        Raises:
            IntegrityError: if the record is not by a trusted signer, was altered, or is no regular
                file.
        """
        what, reason = f"the record {str(root / RECORD_NAME)!r} of an erasure", None
        try:
            data = read_regular(root / RECORD_NAME, limit=2 * MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise IntegrityError(f"{what} cannot be read ({reason}). Nothing was done.")
        payload = open_envelope(data, payload_type=PAYLOAD_TYPE, trusted=trusted, what=what)
        value = parsing.fields(parse_json_object(payload, what=what), _FIELDS, what)
        numbers = parsing.typed(value["numbers"], list, "its numbers")
        record = cls(
            split=parsing.name(value["split"]),
            numbers=frozenset(parsing.count(number) for number in numbers),
            before=Manifest.from_json(value["before"]),
            key=(
                parsing.typed(value["provider"], str, "its provider"),
                parsing.typed(value["key_id"], str, "its key"),
            ),
            retire=parsing.typed(value["retire"], bool, "its order"),
            retired=parsing.typed(value["retired"], bool, "its state"),
        )
        if value["version"] != 1 or record.split not in record.before.splits:
            raise IntegrityError(f"{what} is not of this version, or contradicts itself.")
        return record

    @contextlib.contextmanager
    def pending(self, root: Path, keys: KeyProvider, signer: Signer) -> Iterator[None]:
        """Keep the record while the block puts the new manifest in place, and if it did."""
        self.write(root, signer)
        try:
            yield
        except BaseException:
            self.settle(root, keys)
            raise

    @classmethod
    def settle(cls, root: Path, keys: KeyProvider) -> None:
        """Remove the record of an erasure that did not happen. Hold the rotation lock.

        Rotations do so before they rename shards: afterwards the record could not be judged. A
        half-written record goes too: it is a copy of an old manifest, of which none should stay.
        """
        with contextlib.suppress(OSError):
            for path in root.glob(f".{RECORD_NAME}.*.tmp"):
                path.unlink()
        with contextlib.suppress(IntegrityError):
            record = cls.read(root, trusted=keys.trusted_signers)
            if record and not record.happened(read_manifest(root, trusted=keys.trusted_signers)):
                cls.remove(root)

    @staticmethod
    def remove(root: Path) -> None:
        """Remove the record: there is nothing left to do, and doing it again changes nothing."""
        with contextlib.suppress(OSError):
            os.unlink(root / RECORD_NAME)
            sync_directory(root)
