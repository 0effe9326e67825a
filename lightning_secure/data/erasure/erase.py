"""Erasing rows by destroying their keys, and saying honestly whether that was enough.

A row is gone when the key of its shard is lost to all. Taking the key out of the manifest is not
enough: an old copy of the manifest holds it still, under a partition key that the same copy holds
under the recipients' own keys. So after everything that can be done was done, the old manifest is
tried with every key that is left, and the report says what came of it.

Weights that were trained on the rows are not erased. Nor are copies made of the rows or of a key,
nor what older manifests hold under keys of their time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_secure.crypto import rotation
from lightning_secure.crypto.entries import ShardEntry, SplitEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, read_manifest
from lightning_secure.crypto.signing import Signer
from lightning_secure.data.erasure.erasure_report import ErasureReport, conclude
from lightning_secure.data.key_rotation.rotate import commit, rotating
from lightning_secure.data.manifests.garbage import RemovalList
from lightning_secure.data.manifests.pending_erasure import RECORD_NAME, UnfinishedErasure
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.data.writing.subjects import SubjectPseudonyms
from lightning_secure.errors import (
    ConfigError,
    DataError,
    KeyUnavailableError,
)
from lightning_secure.util.validate import whole_number


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
        min_generation: The oldest generation that is erased from. If an older one was put in its
            place, nothing is erased.
        manifest_digest: The only manifest that is erased from, as SHA-256 in hexadecimal.

    Returns:
        The report of what was done, and whether an old copy of the manifest still opens.

    Raises:
        ConfigError: if there is no such split or shard, a number is none, a recipient was
            forgotten, or ``retire_kek`` is given without ``rotate_kek_to``. Nothing was erased.
        WrongKeyError: if ``keys`` cannot open a partition of the split. Nothing was erased.
        ManifestMismatchError: if the manifest in place is not what was pinned. Nothing was erased.
        AuditWriteError: if a listener could not record the erasure. If the manifest was replaced
            already, the erasure stands and is unfinished: the old key may be alive.

    If it breaks off after the manifest was replaced, by an error or a crash, call
    :func:`~lightning_secure.data.erasure.finish.finish_erasure`; no other erasure begins before.

    The partitions of the split get new keys, and all groups of columns lose the shards together.
    Erasing the last shard removes the split. The content digest changes, so a run that trained on
    the rows does not resume on the rest.

    >>> from lightning_secure import LocalKeyProvider, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> new = LocalKeyProvider.generate(folder / "new.kek")
    >>> settings = {"keys": keys, "rotate_kek_to": new, "retire_kek": True}
    >>> report = erase_shard(folder / "data", "train", 0, **settings)
    >>> report.records, report.recoverable
    (2, False)
    """
    wanted = _whole(numbers)

    def chosen(manifest: Manifest, entry: SplitEntry) -> set[int]:
        if not wanted or (missing := wanted - {shard.number for shard in entry.shards}):
            raise ConfigError(
                f"split {split!r} has no shards {sorted(missing) if wanted else ''}; nothing was "
                "erased."
            )
        return wanted

    erasure = _Erasure(folder_of(root), split, keys, recipients, rotate_kek_to, retire_kek)
    return erasure.run(chosen, ManifestPin(min_generation, manifest_digest))


def _whole(numbers: Any) -> set[int]:
    several = isinstance(numbers, Iterable) and not isinstance(numbers, bytes)
    found = {whole_number(number) for number in (numbers if several else [numbers])}
    if None in found:
        raise ConfigError(
            f"shards must be whole numbers, not a {type(numbers).__name__}; nothing was erased."
        )
    return {number for number in found if number is not None}


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
        keys: Opens all the split's partitions, and signs the new manifest.
        recipients: All other recipients of these partitions.
        rotate_kek_to: Takes the place of ``keys`` in the whole dataset, and signs from now on.
        retire_kek: Whether the key of ``keys`` is destroyed afterwards, as by :func:`erase_shard`:
            everything else under the key is lost.
        min_generation: The oldest generation that is erased from.
        manifest_digest: The only manifest that is erased from, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if the split was not sealed by subject, or for the reasons of
            :func:`erase_shard`.
        DataError: if the split has no rows of this subject.

    The rows of other subjects keep their order and move together: the split is as long as if the
    erased rows had never been sealed.

    >>> from lightning_secure import EncryptedShardWriter
    >>> settings = {"split": "train", "keys": keys, "subject_column": "patient"}
    >>> with EncryptedShardWriter(folder / "data", **settings) as writer:
    ...     writer.write_batch({"patient": ["jo", "al", "jo"], "age": [34, 51, 35]})
    >>> report = erase_subject(folder / "data", "train", "jo", keys=keys)
    >>> report.records, report.recoverable  # the old key still opens an old manifest
    (2, True)
    """

    def chosen(manifest: Manifest, entry: SplitEntry) -> set[int]:
        if entry.subject_key is None:
            raise ConfigError(
                f"split {split!r} was not sealed with subject_column=, so the subject's rows "
                "cannot be found. Nothing was erased."
            )
        key = manifest.open_partition(entry.partition, keys).open_subject_key(entry.subject_key)
        pseudonym = SubjectPseudonyms(key)(subject)
        numbers = {shard.number for shard in entry.shards if shard.subject == pseudonym}
        if not numbers:
            raise DataError(f"split {split!r} has no rows of this subject. Nothing was erased.")
        return numbers

    erasure = _Erasure(folder_of(root), split, keys, recipients, rotate_kek_to, retire_kek)
    return erasure.run(chosen, ManifestPin(min_generation, manifest_digest))


@dataclass(frozen=True)
class _Erasure:
    """One erasure: of which split, by which keys."""

    root: Path
    split: str
    keys: KeyProvider
    recipients: Sequence[KeyProvider]
    to: KeyProvider | None
    retire_kek: bool

    def run(
        self, chosen: Callable[[Manifest, SplitEntry], set[int]], pin: ManifestPin
    ) -> ErasureReport:
        """Erase the shards that ``chosen`` returns the numbers of."""
        if self.retire_kek and self.to is None:
            raise ConfigError(
                "retire_kek=True needs rotate_kek_to=: destroying the only key would lose the "
                "whole dataset. Nothing was erased."
            )
        root, keys = self.root, self.keys
        with rotating(root, keys=keys, pin=pin) as pins:
            self._require_none_pending()
            before = read_manifest(root, trusted=keys.trusted_signers)
            pins.check(before, root)
            entry = self._entry(before)
            numbers = chosen(before, entry)
            record = UnfinishedErasure(
                split=self.split,
                numbers=frozenset(numbers),
                before=before,
                key=(keys.name, keys.key_id),
                retire=self.retire_kek,
            )
            RemovalList(root).note(shard.file for _, shard in record.erased)
            with record.pending(root, keys, self._signer()):
                after = commit(
                    root,
                    lambda current: self._changed(current, entry, numbers),
                    keys=keys,
                    signer=(self.to or keys).signer,
                    event=("data.erase", {"split": self.split, "shards": len(numbers)}),
                    pins=pins,
                )
            return conclude(
                root,
                record,
                keys=keys,
                to=self.to,
                recipients=self.recipients,
                generation=after.generation,
            )

    def _require_none_pending(self) -> None:
        if os.path.lexists(self.root / RECORD_NAME):
            raise ConfigError(
                f"an earlier erasure in {str(self.root)!r} broke off before its end: call "
                f"finish_erasure() first, or remove {RECORD_NAME} if it is not yours. Nothing more "
                "was erased."
            )

    def _entry(self, manifest: Manifest) -> SplitEntry:
        entry = manifest.splits.get(self.split)
        if entry is None:
            raise ConfigError(
                f"{str(self.root)!r} has no split {self.split!r}; its splits are "
                f"{sorted(manifest.splits)}. Nothing was erased."
            )
        return entry

    def _changed(self, current: Manifest, entry: SplitEntry, numbers: set[int]) -> Manifest:
        """Return the manifest without the shards, and with new keys of the split's partitions."""
        if current.splits.get(self.split) != entry:
            UnfinishedErasure.remove(self.root)
            raise ConfigError(
                f"split {self.split!r} was sealed anew meanwhile. What was sealed stands, and "
                "nothing was erased from it."
            )
        changed = current
        for partition in entry.partitions:
            changed = rotation.rekeyed(
                changed, partition, keys=self.keys, recipients=self.recipients, to=self.to
            )
        changed = _without(changed, self.split, numbers)
        held = {key.key_id for wrapped in changed.partitions.values() for key in wrapped}
        if self.to is not None and self.keys.key_id in held:
            changed = rotation.with_kek(changed, keys=self.keys, to=self.to)
        return changed

    def _signer(self) -> Signer:
        """Return the signer until the new manifest stands: readers of the old one trust it."""
        with contextlib.suppress(KeyUnavailableError):
            return self.keys.signer
        return (self.to or self.keys).signer


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
