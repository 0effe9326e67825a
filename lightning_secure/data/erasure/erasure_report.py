"""The end of an erasure: the old key destroyed, and the old manifest tried with every other."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import DataKey, KeyProvider
from lightning_secure.crypto.manifest import Manifest, read_manifest
from lightning_secure.crypto.segments import SUITE_AES256GCM_SHA256, SegmentKeys
from lightning_secure.data.manifests.garbage import LOCK_NAME, locked
from lightning_secure.data.manifests.pending_erasure import UnfinishedErasure
from lightning_secure.errors import IntegrityError, KeyAccessError


@dataclass(frozen=True, kw_only=True)
class RecoveryAttempt:
    """The outcome of trying to open an old copy of the manifest with one key.

    Attributes:
        provider: Name of the kind of provider.
        key_id: Id of the key.
        outcome: ``opened``: it yields the erased shards' keys. ``refused``: it does not, and will
            not. ``unknown``: the key is not here to be tried.
        reason: One sentence.
    """

    provider: str
    key_id: str
    outcome: Literal["opened", "refused", "unknown"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class ErasureReport:
    """The outcome of an erasure, and what it could not do.

    Attributes:
        split: Name of the split.
        shards: Numbers of the erased shards.
        records: Rows in them.
        generation: The first generation of the dataset without them.
        kek_retired: Whether the old key-encryption key was destroyed; None if that was not asked
            for.
        files_left: Files of the erased rows that could not be removed.
        attempts: One for each key that the old manifest was wrapped for, or that is used now.

    >>> from lightning_secure import erase_shard, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> report = erase_shard(folder / "data", "train", 0, keys=keys)
    >>> report.records, [(attempt.provider, attempt.outcome) for attempt in report.attempts]
    (2, [('local', 'opened')])
    """

    split: str
    shards: tuple[int, ...]
    records: int
    generation: int
    kek_retired: bool | None
    files_left: tuple[str, ...]
    attempts: tuple[RecoveryAttempt, ...]

    @property
    def recoverable(self) -> bool:
        """Whether a key is left, or may be, that opens an old copy of the manifest."""
        return any(attempt.outcome != "refused" for attempt in self.attempts)

    def __str__(self) -> str:
        lines = [
            f"{self.records} rows in {len(self.shards)} shards of split {self.split!r} were erased "
            f"as of generation {self.generation}.",
            *(
                f"Old manifest, key {one.key_id} ({one.provider}): {one.outcome}. {one.reason}"
                for one in self.attempts
            ),
            *(f"{file} could not be removed." for file in self.files_left),
        ]
        lines.append(
            "A holder of an old copy of manifest and shards, and of a key not refused above, can "
            "still read the rows: rotate those keys and destroy the old ones."
            if self.recoverable
            else "No key that was tried opens an old copy. Copies of a destroyed key would."
        )
        lines.append("Weights that were trained on the rows are not erased.")
        return "\n".join(lines)


def conclude(
    root: Path,
    record: UnfinishedErasure,
    *,
    keys: KeyProvider | None,
    to: KeyProvider | None,
    recipients: Sequence[KeyProvider],
    generation: int,
) -> ErasureReport:
    """Destroy the old key if that was asked for, and try to open the old manifest.

    Args:
        root: The dataset's folder, under the rotation lock.
        record: Of an erasure whose manifest is in place; it is removed at the end.
        keys: The key that it was begun with, if it is at hand.
        to: The one that took its place, if another did.
        recipients: All others.
        generation: Of the manifest in place.
    """
    if record.retire and not record.retired and keys is not None and to is not None:
        record = dataclasses.replace(record, retired=_retired(root, keys, to, record.before))
        if record.retired:
            record.write(root, to.signer)
    given = [one for one in (keys, *recipients, to) if one is not None]
    files = [shard.file for _, shard in record.erased]
    report = ErasureReport(
        split=record.split,
        shards=tuple(sorted(record.numbers)),
        records=sum(one.records for one in record.entry.shards if one.number in record.numbers),
        generation=generation,
        kek_retired=record.retired if record.retire else None,
        files_left=tuple(file for file in files if (root / file).exists()),
        attempts=_attempts(record, {(one.name, one.key_id): one for one in given}),
    )
    UnfinishedErasure.remove(root)
    return report


def _retired(root: Path, keys: KeyProvider, to: KeyProvider, before: Manifest) -> bool:
    """Destroy the key of ``keys`` if ``to`` was seen to open all that it opened ``before``."""
    # Under the lock, so that no sealing under the old key ends between the look and the end.
    with contextlib.suppress(KeyAccessError, IntegrityError), locked(root, LOCK_NAME):
        manifest = read_manifest(root, trusted=to.trusted_signers)

        def held(of: Manifest) -> list[str]:
            own = keys.name, keys.key_id
            every = of.partitions.items()
            return [n for n, wraps in every if own in {(k.provider, k.key_id) for k in wraps}]

        for name in set(held(before)) & manifest.partitions.keys():
            partition = manifest.open_partition(name, to)
            for entry in manifest.splits.values():
                for group in entry.all_groups:
                    if group.partition == name and not all(
                        _is_key(partition.open(shard), shard, manifest) for shard in group.shards
                    ):
                        return False
        return not held(manifest) and keys.retire()
    return False  # the attempts say what that means


def _attempts(
    record: UnfinishedErasure, providers: dict[tuple[str, str], KeyProvider]
) -> tuple[RecoveryAttempt, ...]:
    """Try to get the keys of erased shards from the old manifest, as a thief would."""
    manifest, erased = record.before, record.erased
    wrapped_for = {
        (key.provider, key.key_id)
        for partition, _ in erased
        for key in manifest.partitions[partition]
    }
    attempts = []
    for one in sorted(wrapped_for | providers.keys()):
        outcome: Literal["opened", "refused", "unknown"] = "unknown"
        reason = "This key was not given, so it could not be tried."
        if one not in wrapped_for:
            outcome, reason = "refused", "The old manifest holds nothing under this key."
        if one == record.key and record.retired and one not in providers:
            outcome, reason = "refused", "This key was destroyed."
        if one in providers:
            if _opens(manifest, providers[one], erased):
                outcome, reason = "opened", "It still yields the keys of erased shards."
            elif one in wrapped_for and record.retired and one == record.key:
                outcome, reason = "refused", "This key was destroyed."
            elif one in wrapped_for:
                reason = "This key cannot be used here; its holder may open the copy."
        attempts.append(
            RecoveryAttempt(provider=one[0], key_id=one[1], outcome=outcome, reason=reason)
        )
    return tuple(attempts)


def _opens(manifest: Manifest, keys: KeyProvider, erased: Sequence[tuple[str, ShardEntry]]) -> bool:
    """Return whether a provider yields the key of any erased shard."""
    for name in dict.fromkeys(partition for partition, _ in erased):
        with contextlib.suppress(KeyAccessError, IntegrityError):
            partition = manifest.open_partition(name, keys)
            if any(_is_key(partition.open(one), one, manifest) for of, one in erased if of == name):
                return True
    return False


def _is_key(key: DataKey, shard: ShardEntry, manifest: Manifest) -> bool:
    found = SegmentKeys.derive(
        key,
        shard_uuid=shard.uuid,
        dataset_id=manifest.dataset_id,
        suite=SUITE_AES256GCM_SHA256,
    )
    return hmac.compare_digest(found.commitment, shard.commitment)
