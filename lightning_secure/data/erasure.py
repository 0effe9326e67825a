"""Erasing rows by destroying their keys, and saying honestly whether that was enough.

A row is gone when nobody can obtain the key of its shard. Taking the key out of the manifest is not
enough: an old copy of the manifest holds it still, under a partition key that the same copy holds
under the recipients' own keys. So after everything that can be done was done, the old manifest is
tried with every key that is left, and the report says what came of it.

Weights that were trained on the rows are not erased. Nor are copies that somebody made of the rows,
or of a key, nor what older manifests hold under keys of their time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_secure.crypto import rotation
from lightning_secure.crypto.entries import ShardEntry, SplitEntry
from lightning_secure.crypto.keys import DataKey, KeyProvider
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
    read_manifest,
)
from lightning_secure.crypto.segments import SUITE_AES256GCM_SHA256, SegmentKeys
from lightning_secure.data.leftovers import Journal
from lightning_secure.data.pins import Pins
from lightning_secure.data.rotation import commit, rotating
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.data.subjects import SubjectPseudonyms
from lightning_secure.errors import ConfigError, DataError, IntegrityError, KeyAccessError

__all__ = ["ErasureReport", "RecoveryAttempt", "erase_shard", "erase_subject"]


@dataclass(frozen=True, kw_only=True)
class RecoveryAttempt:
    """What came of trying to open an old copy of the manifest with one key.

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
    """What an erasure did and what it could not do.

    Attributes:
        split: Name of the split.
        shards: Numbers of the erased shards.
        records: Rows in them.
        generation: The first generation of the dataset without them.
        kek_retired: Whether the old key-encryption key was destroyed; None if that was not asked
            for.
        files_left: Files of the erased rows that could not be removed.
        attempts: One for each key that the old manifest was wrapped for, or that is used now.
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
            "Whoever has an old copy of manifest and shards, and one of the keys not refused "
            "above, can still read the rows: rotate those keys and destroy the old ones."
            if self.recoverable
            else "No key that was tried opens an old copy. Copies of a destroyed key would."
        )
        lines.append("Weights that were trained on the rows are not erased.")
        return "\n".join(lines)


def erase_shard(
    root: str | os.PathLike[str],
    split: str,
    numbers: int | Sequence[int],
    *,
    keys: KeyProvider,
    recipients: Sequence[KeyProvider] = (),
    rotate_kek_to: KeyProvider | None = None,
    retire_kek: bool = False,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> ErasureReport:
    """Erase whole shards: their keys, then their files; and try to get them back.

    Args:
        root: The dataset's folder.
        split: Name of the split.
        numbers: Numbers of the shards, as the manifest has them.
        keys: Opens all the split's partitions, and signs the new manifest.
        recipients: All other recipients of these partitions.
        rotate_kek_to: Takes the place of ``keys`` in the whole dataset, and signs from now on.
        retire_kek: Whether the key of ``keys`` is destroyed afterwards, where the provider can,
            and only once ``rotate_kek_to`` was seen to open the new manifest. Everything else
            under the key, other datasets and checkpoints too, is lost.
        min_generation: The oldest generation that is erased from. If somebody put an older one in
            its place, nothing is erased.
        manifest_digest: The only manifest that is erased from, as SHA-256 in hexadecimal.

    Returns:
        What was done, and whether an old copy of the manifest still opens.

    Raises:
        ConfigError: There is no such split or shard, a recipient was forgotten, or ``retire_kek``
            is given without ``rotate_kek_to``. Nothing was erased.
        WrongKeyError: ``keys`` cannot open a partition of the split. Nothing was erased.
        ManifestMismatchError: The manifest in place is not what was pinned. Nothing was erased.
        AuditWriteError: A listener could not record it. If the manifest was replaced already, the
            erasure stands, and the old key was not destroyed.

    The partitions of the split get new keys, and all groups of columns lose the shards together.
    Erasing the last shard removes the split. The content digest changes, so a run that trained on
    the rows does not resume on the rest.
    """
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)

    def chosen(manifest: Manifest, entry: SplitEntry) -> set[int]:
        if not wanted or (missing := wanted - {shard.number for shard in entry.shards}):
            raise ConfigError(
                f"split {split!r} has no shards {sorted(missing) if wanted else ''}; nothing was "
                "erased."
            )
        return wanted

    pins = Pins(min_generation, manifest_digest)
    return _erase(
        folder_of(root), split, chosen, keys, recipients, rotate_kek_to, pins, retire_kek=retire_kek
    )


def erase_subject(
    root: str | os.PathLike[str],
    split: str,
    subject: str | int,
    *,
    keys: KeyProvider,
    recipients: Sequence[KeyProvider] = (),
    rotate_kek_to: KeyProvider | None = None,
    retire_kek: bool = False,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> ErasureReport:
    """Erase all rows of one subject of a split that was sealed with ``subject_column=``.

    Args:
        root: The dataset's folder.
        split: Name of the split.
        subject: The id as it stood in the subject column, text or a whole number.
        keys: See :func:`erase_shard`, like all that follow.
        recipients: See there.
        rotate_kek_to: See there.
        retire_kek: See there.
        min_generation: See there.
        manifest_digest: See there.

    Raises:
        ConfigError: See there; or the split was not sealed by subject.
        DataError: The split has no rows of this subject.

    The rows of other subjects keep their order and move together: the split is as long as if the
    erased rows had never been sealed.
    """

    def chosen(manifest: Manifest, entry: SplitEntry) -> set[int]:
        if entry.subject_key is None:
            raise ConfigError(
                f"split {split!r} was not sealed with subject_column=, so nobody can tell whose "
                "rows are where. Nothing was erased."
            )
        key = manifest.open_partition(entry.partition, keys).open_subject_key(entry.subject_key)
        pseudonym = SubjectPseudonyms(key)(subject)
        numbers = {shard.number for shard in entry.shards if shard.subject == pseudonym}
        if not numbers:
            raise DataError(f"split {split!r} has no rows of this subject. Nothing was erased.")
        return numbers

    pins = Pins(min_generation, manifest_digest)
    return _erase(
        folder_of(root), split, chosen, keys, recipients, rotate_kek_to, pins, retire_kek=retire_kek
    )


def _erase(
    root: Path,
    split: str,
    chosen: Callable[[Manifest, SplitEntry], set[int]],
    keys: KeyProvider,
    recipients: Sequence[KeyProvider],
    to: KeyProvider | None,
    pins: Pins,
    *,
    retire_kek: bool,
) -> ErasureReport:
    if retire_kek and to is None:
        raise ConfigError(
            "retire_kek=True needs rotate_kek_to=: destroying the only key would lose the whole "
            "dataset. Nothing was erased."
        )
    with rotating(root, keys=keys, pins=pins):
        before = read_manifest(root, trusted=keys.trusted_signers)
        pins.check(before, root)
        old_copy = (root / MANIFEST_NAME).read_bytes()
        entry = before.splits.get(split)
        if entry is None:
            raise ConfigError(
                f"{str(root)!r} has no split {split!r}; its splits are {sorted(before.splits)}. "
                "Nothing was erased."
            )
        numbers = chosen(before, entry)
        erased = [
            (group.partition, shard)
            for group in entry.all_groups
            for shard in group.shards
            if shard.number in numbers
        ]
        files = [shard.file for _, shard in erased]

        def change(current: Manifest) -> Manifest:
            if current.splits.get(split) != entry:
                raise ConfigError(
                    f"split {split!r} was sealed anew meanwhile. What was sealed stands, and "
                    "nothing was erased from it."
                )
            changed = current
            for partition in entry.partitions:
                changed = rotation.rekeyed(
                    changed, partition, keys=keys, recipients=recipients, to=to
                )
            changed = _without(changed, split, numbers)
            held = {key.key_id for keys_ in changed.partitions.values() for key in keys_}
            if to is not None and keys.key_id in held:
                changed = rotation.with_kek(changed, keys=keys, to=to)
            return changed

        Journal(root).note(files)
        after = commit(
            root,
            change,
            keys=keys,
            signer=(to or keys).signer,
            event=("data.erase", {"split": split, "shards": len(numbers)}),
            pins=pins,
        )
        retired = _retired(root, keys, to, before) if retire_kek and to is not None else None
    providers = {(one.name, one.key_id): one for one in (keys, *recipients, *([to] if to else []))}
    return ErasureReport(
        split=split,
        shards=tuple(sorted(numbers)),
        records=sum(shard.records for shard in entry.shards if shard.number in numbers),
        generation=after.generation,
        kek_retired=retired,
        files_left=tuple(file for file in files if (root / file).exists()),
        attempts=_attempts(old_copy, keys, providers, erased, retired=bool(retired)),
    )


def _retired(root: Path, keys: KeyProvider, to: KeyProvider, before: Manifest) -> bool:
    """Destroy the key of ``keys`` if ``to`` was seen to open all that it opened ``before``."""
    try:
        manifest = read_manifest(root, trusted=to.trusted_signers)
        held = [
            name
            for name, wraps in before.partitions.items()
            if name in manifest.partitions
            and any((key.provider, key.key_id) == (keys.name, keys.key_id) for key in wraps)
        ]
        for name in held:
            partition = manifest.open_partition(name, to)
            for entry in manifest.splits.values():
                for group in entry.all_groups:
                    if group.partition == name and not all(
                        _is_key(partition.open(shard), shard, manifest) for shard in group.shards
                    ):
                        return False
        return keys.retire()
    except (KeyAccessError, IntegrityError):
        return False  # the attempts say what that means


def _without(manifest: Manifest, split: str, numbers: set[int]) -> Manifest:
    def kept(shards: Sequence[ShardEntry]) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in shards if shard.number not in numbers)

    entry = manifest.splits[split]
    splits, partitions = dict(manifest.splits), dict(manifest.partitions)
    if not kept(entry.shards):
        del splits[split]
        for partition in entry.partitions:
            del partitions[partition]
    else:
        splits[split] = dataclasses.replace(
            entry,
            shards=kept(entry.shards),
            groups=tuple(
                dataclasses.replace(group, shards=kept(group.shards)) for group in entry.groups
            ),
            content=None,  # these are other rows now
        )
    return dataclasses.replace(manifest, splits=splits, partitions=partitions)


def _attempts(
    old_copy: bytes,
    keys: KeyProvider,
    providers: dict[tuple[str, str], KeyProvider],
    erased: Sequence[tuple[str, ShardEntry]],
    *,
    retired: bool,
) -> tuple[RecoveryAttempt, ...]:
    """Try to get the keys of erased shards from an old copy of the manifest, as a thief would."""
    manifest = parse_manifest(old_copy, trusted=keys.trusted_signers, what="the old manifest")
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
        if one in providers:
            if _opens(manifest, providers[one], erased):
                outcome, reason = "opened", "It still yields the keys of erased shards."
            elif one in wrapped_for and retired and one == (keys.name, keys.key_id):
                outcome, reason = "refused", "This key was destroyed."
            elif one in wrapped_for:
                reason = "This key cannot be used here; whoever can use it may open the copy."
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
