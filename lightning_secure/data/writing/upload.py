"""Sealing to a remote storage: shards are sealed here, sent whole, and the manifest goes last."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import MANIFEST_NAME, PAYLOAD_TYPE, Manifest, read_manifest
from lightning_secure.crypto.rotation import successor
from lightning_secure.crypto.signing import seal_envelope
from lightning_secure.data.manifests.new_split import NewSplit, require_free, with_split
from lightning_secure.data.manifests.rollback_pins import ManifestPin, Pins
from lightning_secure.data.shards.verify import verify_shard
from lightning_secure.data.storage.local_files import LocalStorage
from lightning_secure.data.storage.opening import open_storage
from lightning_secure.data.storage.remote import Options, RemoteStorage
from lightning_secure.errors import ConfigError, IntegrityError, ShardCorruptedError, StorageError
from lightning_secure.util import events
from lightning_secure.util.files import as_path

_TRIES: Final = 10


def upload_split(
    source: str | os.PathLike[str],
    root: str | RemoteStorage,
    *,
    split: str,
    keys: KeyProvider,
    replace: bool = False,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
    storage_options: Options | None = None,
) -> Manifest:
    """Copy a sealed split of a folder to a remote storage.

    Args:
        source: The folder of the dataset.
        root: An fsspec URL such as ``s3://bucket/dataset``, or a :class:`RemoteStorage`. What lies
            there must be nothing, or the same dataset, perhaps with other splits.
        split: Name of the split.
        keys: Checks both manifests, and signs the next.
        replace: Whether a split of this name may be replaced there.
        min_generation: The oldest generation that is accepted there. It is compared with each
            manifest that the next one is made of, and that alone is replaced, see below.
        manifest_digest: The only manifest that is accepted there, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.

    Returns:
        The manifest that is now in place there. If the very same split was there already, as after
        an answer that got lost, that is the one that was there.

    Raises:
        ConfigError: if there is no such split here, another one exists there, a key name of its
            belongs to another split there, or another dataset lies there.
        ShardCorruptedError: if a shard of this folder is not what its manifest was signed for.
            Nothing was sent.
        ManifestMismatchError: if a manifest is not this provider's, or the one there is not what
            was pinned. The manifest there was left as it is.
        StorageError: if the storage did not answer, refused, or others changed the manifest each
            time. What was sent is in no manifest, unless the last answer got lost.

    The pins are of what lies there; the folder here is taken as it is, so look at its generation
    first where other users may write to it. All groups of columns go together, with the keys of
    their partitions as they are wrapped here.
    Before anything is sent, size, header and all tags of each shard are compared with the manifest;
    ciphertext that was damaged under an intact tag shows when a reader decrypts. A shard that is
    there already, and passes the same comparison, is left as it is: it is read instead of written.
    Each other is sent whole, and the manifest after them, so a reader sees the split as it was or
    as it is. The manifest is replaced only if it is still the one that was read; where the storage
    offers no such condition, or ignores it, two writers at once can lose one's split, see
    :attr:`RemoteStorage.conditional`. A crash leaves objects that no manifest names and no reader
    opens; on S3 also parts of an upload, which a life-cycle rule removes.

    >>> from lightning_secure import EncryptedShardDataset, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> _ = upload_split(folder / "data", "memory://example/data", split="train", keys=keys)
    >>> len(EncryptedShardDataset("memory://example/data", split="train", keys=keys))
    2
    """
    storage = open_storage(root, storage_options=storage_options)
    if not isinstance(storage, RemoteStorage):
        raise ConfigError(f"{str(storage)!r} is no remote storage; copy the folder instead.")
    here = as_path(source, what="source")
    pins = Pins(ManifestPin(min_generation, manifest_digest))
    return upload_splits(here, storage, [split], keys=keys, replace=replace, pins=pins)


def upload_splits(
    here: Path,
    storage: RemoteStorage,
    names: Sequence[str],
    *,
    keys: KeyProvider,
    replace: bool,
    pins: Pins,
) -> Manifest:
    """Send splits, and put them into the manifest there in one generation, see `upload_split`."""
    sealed = read_manifest(here, trusted=keys.trusted_signers)
    if missing := [name for name in names if name not in sealed.splits]:
        raise ConfigError(f"{str(here)!r} has no split {missing[0]!r}. Nothing was sent.")
    splits = [
        NewSplit(
            name=name,
            entry=sealed.splits[name],
            partitions={part: sealed.partitions[part] for part in sealed.splits[name].partitions},
        )
        for name in names
    ]
    older: frozenset[str] = frozenset()

    def join(current: Manifest | None) -> Manifest:
        nonlocal older
        pins.check(current, storage)
        if current is None:
            first = dataclasses.replace(sealed, splits={}, partitions={})
            return functools.reduce(with_split, splits, first)
        joined = current
        require_same_dataset(current, sealed, storage)
        for new in splits:
            if not same_split(current, sealed, new.name):
                require_free(
                    joined, storage, new.name, replace=replace, partitions=new.partitions.keys()
                )
                joined = with_split(joined, new)
        if joined is current:
            return current
        older |= current.files
        return successor(current, joined)

    join(current_manifest(storage, keys)[0])  # whether it can be, before anything is sent
    older = frozenset()
    entries = [entry for new in splits for group in new.entry.all_groups for entry in group.shards]
    for entry in entries:
        _require_intact(here, entry)
    sent = []
    for entry in entries:
        if not _is_there(storage, entry):
            storage.upload(here / entry.file, entry.file, size=entry.size)
            sent.append(entry.file)
    try:
        manifest = _change(storage, keys, join, names)
    except ConfigError:  # another writer was first
        _remove_unnamed(storage, keys, sent)
        raise
    # By their names: where only keys were exchanged, the new manifest has the same files.
    _remove(storage, older - manifest.files)
    return manifest


def _require_intact(here: Path, entry: ShardEntry) -> None:
    reason = ""
    try:
        verify_shard(LocalStorage(here), entry)
    except OSError as error:
        reason = f"shard {entry.file!r} cannot be opened ({error.strerror})."
    except ShardCorruptedError as error:
        reason = str(error)
    if reason:
        raise ShardCorruptedError(f"{reason} It is damaged in {str(here)!r}; nothing was sent.")


def _is_there(storage: RemoteStorage, entry: ShardEntry) -> bool:
    """Return whether the shard lies there already, as the manifest has it."""
    with contextlib.suppress(FileNotFoundError, ShardCorruptedError):
        verify_shard(storage, entry)
        return True
    return False


def current_manifest(
    storage: RemoteStorage, keys: KeyProvider
) -> tuple[Manifest | None, str | None, bytes]:
    """Return the manifest in place, its ETag and its bytes."""
    try:
        # Before the content: if that is newer, the condition fails, and it is read again.
        etag = str(storage.describe(MANIFEST_NAME).get("ETag", ""))
        data = storage.read(MANIFEST_NAME)
    except FileNotFoundError:
        return None, None, b""
    return read_manifest(_Bytes(storage, data), trusted=keys.trusted_signers), etag, data


class _Bytes:
    """A manifest that was read already."""

    def __init__(self, storage: RemoteStorage, data: bytes) -> None:
        self._storage = storage
        self._data = data

    def __str__(self) -> str:
        return str(self._storage)

    def read(self, name: str) -> bytes:
        return self._data


def _change(
    storage: RemoteStorage,
    keys: KeyProvider,
    make: Callable[[Manifest | None], Manifest],
    splits: Sequence[str],
) -> Manifest:
    for _ in range(_TRIES):
        current, etag, _ = current_manifest(storage, keys)
        manifest = make(current)
        if manifest is current:
            return manifest  # also by an earlier try of ours, whose answer got lost
        for split in splits:
            events.announce(
                "data.upload",
                {
                    "dataset": manifest.dataset_id.hex(),
                    "split": split,
                    "generation": manifest.generation,
                    "manifest": manifest.digest,
                },
            )
        payload = canonical_json(manifest.to_json())
        data = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=keys.signer)
        if storage.put(MANIFEST_NAME, data, replacing=etag):
            return manifest
        # A request that was sent twice because the answer got lost fails the second time.
        with contextlib.suppress(FileNotFoundError):
            if storage.read(MANIFEST_NAME) == data:
                return manifest
    raise StorageError(
        f"the manifest at {str(storage)!r} was changed by others {_TRIES} times while it was to be "
        "changed here. It is as they left it."
    )


def require_same_dataset(current: Manifest, sealed: Manifest, storage: RemoteStorage) -> None:
    """Raise ConfigError if what lies there is not the dataset that was sealed here."""
    if current.dataset_id != sealed.dataset_id:
        raise ConfigError(
            f"another dataset lies at {str(storage)!r}; it was left as it is. Choose another place."
        )


def same_split(one: Manifest, other: Manifest, split: str) -> bool:
    """Return whether both have a split of this name, with the same shards and wrapped keys."""
    entry = one.splits.get(split)
    return (
        one.dataset_id == other.dataset_id
        and entry is not None
        and entry == other.splits.get(split)
        and all(one.partitions[name] == other.partitions[name] for name in entry.partitions)
    )


def _remove_unnamed(storage: RemoteStorage, keys: KeyProvider, files: Iterable[str]) -> None:
    """Remove what the manifest in place does not name; nothing, if that cannot be told."""
    with contextlib.suppress(IntegrityError, StorageError, OSError):
        current = current_manifest(storage, keys)[0]
        _remove(storage, set(files) - (current.files if current else frozenset()))


def _remove(storage: RemoteStorage, files: Iterable[str]) -> None:
    for file in files:
        with contextlib.suppress(OSError, StorageError):  # unreadable without a manifest
            storage.remove(file)
