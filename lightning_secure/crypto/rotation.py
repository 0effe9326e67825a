"""Recipients of a partition and its key: a manifest with its keys exchanged.

Nothing here reads or writes a file. Every function takes a verified manifest and returns a changed
one; :func:`successor` makes it the next generation, and
:mod:`lightning_secure.data.key_rotation.rotate` puts that in place.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from lightning_secure.crypto.attributes import reseal_attributes
from lightning_secure.crypto.entries import ColumnGroup, SplitEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.errors import ConfigError


def successor(current: Manifest, changed: Manifest) -> Manifest:
    """Return ``changed`` as the generation after ``current``."""
    return dataclasses.replace(
        changed,
        generation=current.generation + 1,
        previous=current.digest,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def with_recipient(
    manifest: Manifest, partition: str, *, keys: KeyProvider, recipient: KeyProvider
) -> Manifest:
    """Return a manifest in which ``recipient`` can open ``partition`` too.

    Raises:
        ConfigError: if there is no such partition.
        WrongKeyError: if ``keys`` cannot open the partition.
    """
    wraps = _wraps(manifest, partition)
    added = manifest.open_partition(partition, keys).wrapped_for(recipient)
    return dataclasses.replace(
        manifest,
        partitions={**manifest.partitions, partition: (*_others(wraps, added), *added)},
    )


def without_recipient(
    manifest: Manifest,
    partition: str,
    *,
    keys: KeyProvider,
    key_id: str,
    recipients: Sequence[KeyProvider] = (),
) -> Manifest:
    """Return a manifest in which ``partition`` has a new key that one recipient is not given.

    Args:
        manifest: The current one.
        partition: Name of the partition.
        keys: Opens it, and stays a recipient.
        key_id: Id of the provider's key that loses access.
        recipients: The others that keep it.

    Raises:
        ConfigError: if there is no such partition or recipient, it is ``keys`` itself, or a
            recipient is neither named nor given.
        WrongKeyError: if ``keys`` cannot open the partition.
    """
    known = [key.key_id for key in _wraps(manifest, partition)]
    if key_id not in known or key_id == keys.key_id:
        raise ConfigError(
            f"key {key_id!r} cannot be taken from partition {partition!r}: its recipients are "
            f"{known}, and the caller's own key stays ({keys.key_id!r}). Nothing was changed."
        )
    return rekeyed(manifest, partition, keys=keys, recipients=recipients, without=[key_id])


def rekeyed(
    manifest: Manifest,
    partition: str,
    *,
    keys: KeyProvider,
    recipients: Sequence[KeyProvider] = (),
    without: Collection[str] = (),
    to: KeyProvider | None = None,
) -> Manifest:
    """Return a manifest in which ``partition`` has a new key, with every shard's key under it.

    Args:
        manifest: The current one.
        partition: Name of the partition.
        keys: Opens it.
        recipients: The recipients besides ``keys``; each of them has to be given, because the new
            key has to be wrapped for it.
        without: Ids of keys that lose access.
        to: Takes the place of ``keys`` among the recipients.

    Raises:
        ConfigError: if there is no such partition, a recipient is missing from ``recipients``, or
            one of them is not a recipient so far.
        WrongKeyError: if ``keys`` cannot open the partition.
        IntegrityError: if a wrapped key was altered.
    """
    present = {_id(key) for key in _wraps(manifest, partition)}
    old = manifest.open_partition(partition, keys)
    given = {one for provider in recipients for one in _ids(provider)}
    left_out = sorted(key_id for _, key_id in present - given - _ids(keys) if key_id not in without)
    strangers = sorted(key_id for _, key_id in given - present)
    if left_out or strangers:
        raise ConfigError(
            f"a new key for partition {partition!r} was not made: "
            + (f"its recipients {left_out} were not given and would lose it. " if left_out else "")
            + (f"{strangers} are no recipients of it yet. " if strangers else "")
            + "Pass every recipient's provider, or remove the recipient first."
        )
    new = PartitionKey.generate(manifest.dataset_id, partition)
    wraps: tuple[WrappedKey, ...] = ()
    for holder in (to if to is not None else keys, *recipients):
        wraps += tuple(_others(new.wrapped_for(holder), wraps))
    return dataclasses.replace(
        manifest,
        splits={
            name: _rewrapped(split, partition, old=old, new=new)
            for name, split in manifest.splits.items()
        },
        partitions={
            **manifest.partitions,
            partition: tuple(key for key in wraps if key.key_id not in without),
        },
    )


def with_kek(manifest: Manifest, *, keys: KeyProvider, to: KeyProvider) -> Manifest:
    """Return a manifest in which ``to`` takes the place of ``keys``: one rewrap a partition.

    Raises:
        ConfigError: if ``keys`` is a recipient of no partition, or ``to`` is the same key.
        IntegrityError: if a wrapped key was altered.
    """
    if _ids(keys) & _ids(to):
        raise ConfigError(f"key {to.key_id!r} is the present key. Nothing was rotated.")
    partitions = dict(manifest.partitions)
    for name, wraps in manifest.partitions.items():
        if any(_id(key) in _ids(keys) for key in wraps):
            new = manifest.open_partition(name, keys).wrapped_for(to)
            others = (key for key in _others(wraps, new) if _id(key) not in _ids(keys))
            partitions[name] = (*new, *others)
    if partitions == manifest.partitions:
        raise ConfigError(
            f"key {keys.key_id!r} is a recipient of no partition of this dataset. Nothing was "
            "rotated."
        )
    return dataclasses.replace(manifest, partitions=partitions)


def _rewrapped(
    split: SplitEntry, partition: str, *, old: PartitionKey, new: PartitionKey
) -> SplitEntry:
    def group(entry: ColumnGroup) -> tuple[Any, ...]:
        if entry.partition != partition:
            return entry.shards
        return tuple(
            dataclasses.replace(shard, wrapped_key=new.seal(old.open(shard), shard_uuid=shard.uuid))
            for shard in entry.shards
        )

    subject_key = split.subject_key
    if subject_key is not None and split.partition == partition:
        subject_key = new.seal_subject_key(old.open_subject_key(subject_key))
    attributes = split.attributes
    if split.partition == partition:
        attributes = reseal_attributes(attributes, old=old, new=new)
    return dataclasses.replace(
        split,
        shards=group(split),
        groups=tuple(dataclasses.replace(entry, shards=group(entry)) for entry in split.groups),
        subject_key=subject_key,
        attributes=attributes,
    )


def _wraps(manifest: Manifest, partition: str) -> tuple[WrappedKey, ...]:
    if partition not in manifest.partitions:
        raise ConfigError(
            f"the dataset has no partition {partition!r}; its partitions are "
            f"{sorted(manifest.partitions)}. Nothing was changed."
        )
    return manifest.partitions[partition]


def _id(key: WrappedKey) -> tuple[str, str]:
    return key.provider, key.key_id


def _ids(keys: KeyProvider) -> set[tuple[str, str]]:
    """Return what :meth:`PartitionKey.wrapped_for` wraps for."""
    return {(keys.name, key_id) for key_id in keys.recipients}


def _others(wraps: Iterable[WrappedKey], than: Sequence[WrappedKey]) -> Iterator[WrappedKey]:
    known = {_id(key) for key in than}
    return (key for key in wraps if _id(key) not in known)
