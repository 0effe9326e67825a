"""Exchanging keys of a sealed dataset: who may open it, and under which key.

Each function puts one new generation of the manifest in place, which appears whole or not at all:
a crash at any point leaves the old state or the new one. Files go last, after nothing names them;
what a crash leaves of them is found by the next rotation, or by
:func:`~lightning_secure.data.manifests.garbage.collect_garbage`, and is never read.

Rotations of one dataset wait for each other. A dataset that is open meanwhile goes on with the
generation that it has verified, or fails with ShardCorruptedError once a shard's file is gone; open
it again. It never returns other rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_secure.crypto import rotation
from lightning_secure.crypto.entries import ColumnGroup, ShardEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.signing import Signer
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.manifests.garbage import (
    LOCK_NAME,
    ROTATION_LOCK_NAME,
    RemovalList,
    locked,
    require_files,
)
from lightning_secure.data.manifests.pending_erasure import UnfinishedErasure
from lightning_secure.data.manifests.rollback_pins import ManifestPin, Pins
from lightning_secure.data.shards.scratch import Scratch
from lightning_secure.data.shards.shard import ShardReader, fresh_uuid, reseal_shard, shard_name
from lightning_secure.data.storage import LocalStorage
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.errors import ConfigError, DataError, IntegrityError, ShardCorruptedError
from lightning_secure.util import events


def add_recipient(
    root: str | os.PathLike[str],
    partition: str,
    *,
    keys: KeyProvider,
    recipient: KeyProvider,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> Manifest:
    """Let another provider's key open a partition.

    Args:
        root: The dataset's folder.
        partition: Name of the partition: that of the split, or ``SPLIT.KEY``.
        keys: Opens it, and signs the new manifest.
        recipient: Is asked to wrap the partition's key.
        min_generation: The oldest generation that is changed. Each change is made of the manifest
            that is in place under the lock; if that is an older one, put back, it is refused.
        manifest_digest: The only manifest that is changed, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if there is no such partition.
        WrongKeyError: if ``keys`` cannot open the partition.
        ManifestMismatchError: if no manifest is by a trusted signer, or the manifest is not what
            was pinned. The manifest was left as it is, as for the other functions here.

    >>> from lightning_secure import EncryptedShardDataset, LocalKeyProvider, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> LocalKeyProvider.generate(folder / "jo.kek").key_id == keys.key_id
    False
    >>> jo = LocalKeyProvider(folder / "jo.kek", trusted=keys.trusted_signers.values())
    >>> _ = add_recipient(folder / "data", "train", keys=keys, recipient=jo)
    >>> EncryptedShardDataset(folder / "data", split="train", keys=jo)[1]
    (tensor(51),)
    """
    return changed(
        folder_of(root),
        lambda current: rotation.with_recipient(current, partition, keys=keys, recipient=recipient),
        keys=keys,
        pin=ManifestPin(min_generation, manifest_digest),
        event=("data.recipient.add", {"partition": partition, "recipient": recipient.key_id}),
    )


def remove_recipient(
    root: str | os.PathLike[str],
    partition: str,
    *,
    keys: KeyProvider,
    key_id: str,
    recipients: Sequence[KeyProvider] = (),
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> Manifest:
    """Take a partition from a recipient, by a new partition key that it is not given.

    Args:
        root: The dataset's folder.
        partition: Name of the partition.
        keys: Opens it, stays a recipient, and signs the new manifest.
        key_id: Id of the key that loses access.
        recipients: The other recipients that keep it.
        min_generation: The oldest generation that is changed; an older one, put back, is refused.
        manifest_digest: The only manifest that is changed, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if there is no such partition or recipient, or one was forgotten.
        WrongKeyError: if ``keys`` cannot open the partition.

    The recipient keeps what it has read, or copied with its keys: the rows are still encrypted
    under the same data keys. Call :func:`rotate_data` as well if the storage is open to it.

    >>> from lightning_secure import LocalKeyProvider, seal
    >>> jo = LocalKeyProvider.generate(folder / "jo.kek")
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> _ = add_recipient(folder / "data", "train", keys=keys, recipient=jo)
    >>> left = remove_recipient(folder / "data", "train", keys=keys, key_id=jo.key_id)
    >>> [wrapped.key_id for wrapped in left.partitions["train"]] == [keys.key_id]
    True
    """
    return changed(
        folder_of(root),
        lambda current: rotation.without_recipient(
            current, partition, keys=keys, key_id=key_id, recipients=recipients
        ),
        keys=keys,
        pin=ManifestPin(min_generation, manifest_digest),
        event=("data.recipient.remove", {"partition": partition, "recipient": key_id}),
    )


def rotate_kek(
    root: str | os.PathLike[str],
    *,
    keys: KeyProvider,
    to: KeyProvider,
    signer: Signer | None = None,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> Manifest:
    """Put one provider's key in the place of another's, in every partition that it opens.

    Args:
        root: The dataset's folder.
        keys: The present recipient.
        to: The one that takes its place.
        signer: Signs the new manifest; ``to``'s by default. Every reader has to trust it.
        min_generation: The oldest generation that is changed; an older one, put back, is refused.
        manifest_digest: The only manifest that is changed, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if ``keys`` opens nothing here, or ``to`` is the same key.
        IntegrityError: if a wrapped key was altered.

    One rewrap a partition; partitions of other recipients stay as they are. An old copy of the
    manifest still opens under the old key: destroy that key, or call :func:`rotate_data` too.

    >>> from lightning_secure import EncryptedShardDataset, LocalKeyProvider, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> new = LocalKeyProvider.generate(folder / "new.kek")
    >>> _ = rotate_kek(folder / "data", keys=keys, to=new)
    >>> EncryptedShardDataset(folder / "data", split="train", keys=new)[0]
    (tensor(34),)
    """
    return changed(
        folder_of(root),
        lambda current: rotation.with_kek(current, keys=keys, to=to),
        keys=keys,
        signer=signer or to.signer,
        pin=ManifestPin(min_generation, manifest_digest),
        event=("data.rotate.kek", {"from": keys.key_id, "to": to.key_id}),
    )


def rotate_partition(
    root: str | os.PathLike[str],
    partition: str,
    *,
    keys: KeyProvider,
    recipients: Sequence[KeyProvider] = (),
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> Manifest:
    """Give a partition a new key and wrap every shard's key under it, about 10 µs a shard.

    Args:
        root: The dataset's folder.
        partition: Name of the partition.
        keys: Opens it, and signs the new manifest.
        recipients: All its other recipients.
        min_generation: The oldest generation that is changed; an older one, put back, is refused.
        manifest_digest: The only manifest that is changed, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if there is no such partition, or a recipient was forgotten.
        WrongKeyError: if ``keys`` cannot open the partition.

    >>> from lightning_secure import seal
    >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> rotate_partition(folder / "data", "train", keys=keys).generation - sealed.generation
    1
    """
    return changed(
        folder_of(root),
        lambda current: rotation.rekeyed(current, partition, keys=keys, recipients=recipients),
        keys=keys,
        pin=ManifestPin(min_generation, manifest_digest),
        event=("data.rotate.partition", {"partition": partition}),
    )


def rotate_data(
    root: str | os.PathLike[str],
    split: str,
    *,
    keys: KeyProvider,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> Manifest:
    """Encrypt a split's rows anew, each shard under a fresh key and in a new file.

    Args:
        root: The dataset's folder.
        split: Name of the split.
        keys: Opens all its partitions, and signs the new manifest.
        min_generation: The oldest generation that is changed; an older one, put back, is refused.
        manifest_digest: The only manifest that is changed, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if there is no such split, or it was replaced meanwhile; that state stands.
        WrongKeyError: if ``keys`` cannot open a partition.
        ShardCorruptedError: if a shard was altered, or a new one does not hold the same rows. The
            dataset is as it was.

    One segment is in memory at a time, and the split is on the disk twice until the new manifest is
    in place. Each new shard is read back and compared before that. The content digest stays, so a
    run that trained on the split resumes on it.

    >>> from lightning_secure import seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> before = set((folder / "data" / "train").iterdir())
    >>> _ = rotate_data(folder / "data", "train", keys=keys)
    >>> before & set((folder / "data" / "train").iterdir())  # all shards are new files
    set()
    """
    folder, pin = folder_of(root), ManifestPin(min_generation, manifest_digest)
    with rotating(folder, keys=keys, pin=pin) as pins:
        before = read_manifest(folder, trusted=keys.trusted_signers)
        pins.check(before, folder)
        entry = before.splits.get(split)
        if entry is None:
            raise ConfigError(
                f"{str(root)!r} has no split {split!r}; its splits are {sorted(before.splits)}. "
                "Nothing was rotated."
            )
        # Removes whatever does not make it into a manifest.
        removals = RemovalList(folder)
        partitions = [before.open_partition(name, keys) for name in entry.partitions]
        resealed = [
            _resealed(folder, group, partition, before)
            for group, partition in zip(entry.all_groups, partitions, strict=True)
        ]
        after = dataclasses.replace(
            entry,
            shards=resealed[0],
            groups=tuple(
                dataclasses.replace(group, shards=shards)
                for group, shards in zip(entry.groups, resealed[1:], strict=True)
            ),
            content=entry.content_digest,
        )
        removals.note(entry.files)

        def exchange(current: Manifest) -> Manifest:
            if current.splits.get(split) != entry:
                raise ConfigError(
                    f"split {split!r} was sealed anew while it was rotated. What was sealed "
                    "stands, and nothing of the rotation was kept."
                )
            return dataclasses.replace(current, splits={**current.splits, split: after})

        return commit(
            folder,
            exchange,
            keys=keys,
            signer=keys.signer,
            pins=pins,
            event=("data.rotate.data", {"split": split, "shards": len(list(after.files))}),
        )


def changed(
    root: Path,
    change: Callable[[Manifest], Manifest],
    *,
    keys: KeyProvider,
    event: tuple[str, Mapping[str, str | int]],
    pin: ManifestPin,
    signer: Signer | None = None,
) -> Manifest:
    """Put the next generation of a manifest in place, alone among rotations and writers."""
    signer = signer or keys.signer
    with rotating(root, keys=keys, pin=pin) as pins:
        return commit(root, change, keys=keys, signer=signer, event=event, pins=pins)


@contextlib.contextmanager
def rotating(root: Path, *, keys: KeyProvider, pin: ManifestPin) -> Iterator[Pins]:
    """Hold the rotation lock; clear leftovers away before and after.

    Yields:
        The pins that each manifest which is changed is compared with.

    Raises:
        ManifestMismatchError: if there is no manifest by a trusted signer, or not what was pinned.
        ConfigError: if the lock is no file that this process may lock.
        DataError: if the list of leftovers is no file that can be read.
    """
    pins = Pins(pin)
    if not (root / MANIFEST_NAME).is_file():  # before a lock file is made there
        read_manifest(root, trusted=keys.trusted_signers)
    with locked(root, ROTATION_LOCK_NAME):
        # Before anything is cleared away that an older manifest does not name.
        pins.check(read_manifest(root, trusted=keys.trusted_signers), root)
        _sweep(root, keys, pins)
        UnfinishedErasure.settle(root, keys)
        try:
            yield pins
        finally:
            with contextlib.suppress(DataError):  # put there meanwhile; the next one says so
                _sweep(root, keys, pins)


def _sweep(root: Path, keys: KeyProvider, pins: Pins) -> None:
    # Where the manifest in place cannot be verified, or is an older one, nothing is removed.
    with contextlib.suppress(IntegrityError):
        if removals := RemovalList(root):
            manifest = read_manifest(root, trusted=keys.trusted_signers)
            pins.check(manifest, root)
            removals.sweep(manifest)


def commit(
    root: Path,
    change: Callable[[Manifest], Manifest],
    *,
    keys: KeyProvider,
    signer: Signer,
    event: tuple[str, Mapping[str, str | int]],
    pins: Pins,
) -> Manifest:
    """Sign what ``change`` makes of the manifest in place, and replace that, atomically.

    Raises:
        ManifestMismatchError: if the manifest in place is not what was pinned, or older than one
            that was seen; it is as it was.
        AuditWriteError: if a listener could not record it; the manifest is as it was.
        DataError: if a file that the new manifest names is gone; the manifest is as it was.
    """
    with locked(root, LOCK_NAME):
        current = read_manifest(root, trusted=keys.trusted_signers)
        pins.check(current, root)
        manifest = rotation.successor(current, change(current))
        action, details = event
        events.announce(
            action,
            {
                "dataset": manifest.dataset_id.hex(),
                "generation": manifest.generation,
                "manifest": manifest.digest,
                **details,
            },
        )
        require_files(root, manifest.files - current.files)
        write_manifest(root, manifest, signer=signer)
        with contextlib.suppress(DataError):  # the new manifest stands
            RemovalList(root).sweep(manifest)
    return manifest


def _resealed(
    root: Path, group: ColumnGroup, partition: PartitionKey, manifest: Manifest
) -> tuple[ShardEntry, ...]:
    schema = Schema.from_json(group.schema)
    storage, removals = LocalStorage(root), RemovalList(root)

    def reader(entry: ShardEntry) -> ShardReader:
        return ShardReader(
            storage,
            entry,
            key=partition.open(entry),
            schema=schema,
            dataset_id=manifest.dataset_id,
        )

    shards = []
    for entry in group.shards:
        # Beside the old file: what was sealed in parallel lies in a folder of its own.
        folder = root / Path(entry.file).parent
        uuid = fresh_uuid(folder, entry.number)
        removals.note([f"{folder.name}/{shard_name(entry.number, uuid)}"])
        with contextlib.closing(reader(entry)) as old:
            sealed = reseal_shard(folder, old, shard_uuid=uuid, partition=partition)
            with contextlib.closing(reader(sealed)) as new:
                _require_same(old, new, sealed)
        shards.append(dataclasses.replace(sealed, subject=entry.subject))
    return tuple(shards)


def _require_same(old: ShardReader, new: ShardReader, sealed: ShardEntry) -> None:
    before, after = Scratch(), Scratch()
    for index in range(old.header.segments):
        if old.decrypt(index, before) != new.decrypt(index, after):
            raise ShardCorruptedError(
                f"shard {sealed.file!r} does not hold the rows that it was made of: the storage "
                "returned other bytes than were written. The dataset was left as it was."
            )
