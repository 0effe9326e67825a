"""Sealing to a remote storage: shards are sealed here, sent whole, and the manifest goes last."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from lightning_secure import events
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    PAYLOAD_TYPE,
    Manifest,
    ShardEntry,
    read_manifest,
)
from lightning_secure.crypto.signing import seal_envelope
from lightning_secure.data.storage.base import Storage
from lightning_secure.data.storage.opening import local_root, open_storage
from lightning_secure.data.storage.remote import Options, RemoteStorage
from lightning_secure.errors import ConfigError, StorageError
from lightning_secure.files import atomic_writer

__all__ = ["Spool", "open_spool", "upload_split"]

_TRIES: Final = 10


def upload_split(
    source: str | os.PathLike[str],
    root: str | RemoteStorage,
    *,
    split: str,
    keys: KeyProvider,
    replace: bool = False,
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
        storage_options: For a URL, see :class:`RemoteStorage`.

    Returns:
        The manifest that is now in place there.

    Raises:
        ConfigError: There is no such split here, it exists there, or another dataset lies there.
        IntegrityError: A manifest is not this provider's.
        StorageError: The storage did not answer, refused, or others changed the manifest each
            time. What was sent is in no manifest, unless the last answer got lost.

    Each shard is sent whole, and the manifest after them, so a reader sees the split as it was or
    as it is. The manifest is replaced only if it is still the one that was read; where the storage
    offers no such condition, or ignores it, two writers at once can lose one's split, see
    :attr:`RemoteStorage.conditional`. A crash leaves objects that no manifest names and nobody
    reads; on S3 also parts of an upload, which a life-cycle rule removes.
    """
    storage = open_storage(root, storage_options=storage_options)
    if not isinstance(storage, RemoteStorage):
        raise ConfigError(f"{str(storage)!r} is no remote storage; copy the folder instead.")
    sealed = read_manifest(Path(source), trusted=keys.trusted_signers)
    if split not in sealed.splits:
        raise ConfigError(f"{str(source)!r} has no split {split!r}. Nothing was sent.")
    shards = sealed.splits[split].shards
    older: tuple[ShardEntry, ...] = ()

    def join(current: Manifest | None) -> Manifest:
        nonlocal older
        partition = sealed.splits[split].partition
        mine = {split: sealed.splits[split]}
        key = {partition: sealed.partitions[partition]}
        if current is None:
            return dataclasses.replace(sealed, splits=mine, partitions=key)
        _require_room(current, sealed, storage, split, replace=replace)
        if split in current.splits:
            older = current.splits[split].shards
        return dataclasses.replace(
            current,
            generation=current.generation + 1,
            previous=current.digest,
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            splits={**current.splits, **mine},
            partitions={**current.partitions, **key},
        )

    if (current := _current(storage, keys)[0]) is not None:
        _require_room(current, sealed, storage, split, replace=replace)
    for shard in shards:
        storage.upload(Path(source) / shard.file, shard.file)
    try:
        manifest = _change(storage, keys, join, split=split)
    except ConfigError:  # another writer was first: nothing names what was sent, for certain
        _remove(storage, shards)
        raise
    _remove(storage, (shard for shard in older if shard not in shards))
    return manifest


class Spool:
    """The folder of this machine in which a split is sealed before it is sent.

    Args:
        storage: Where it is sent.
        split: Name of the split.
        keys: Checks the storage's manifest.
        replace: Whether a split of this name may be replaced there.
        folder: Kept afterwards; by default a temporary folder that is removed. It holds what the
            storage will hold, encrypted.

    Raises:
        ConfigError: The split exists there, or the folder holds another dataset than the storage.
        IntegrityError: The storage's manifest is not this provider's.
        StorageError: The storage did not answer, or refused.
    """

    def __init__(
        self,
        storage: RemoteStorage,
        *,
        split: str,
        keys: KeyProvider,
        replace: bool,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._storage = storage
        self._split = split
        self._keys = keys
        self._replace = replace
        current, _, data = _current(storage, keys)
        if current is not None:
            _require_room(current, current, storage, split, replace=replace)
        self.folder = Path(folder or tempfile.mkdtemp(prefix="lightning-secure-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        if folder is None:
            self._finalizer = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        path = self.folder / MANIFEST_NAME
        if path.exists():
            here = read_manifest(self.folder, trusted=keys.trusted_signers)
            if current is not None:
                _require_room(current, here, storage, split, replace=replace)
        elif current is not None:
            with atomic_writer(path) as file:  # so that it is sealed as a split of this dataset
                file.write(data)

    def send(self) -> None:
        """Send the sealed split; raises as :func:`upload_split` does."""
        upload_split(
            self.folder, self._storage, split=self._split, keys=self._keys, replace=self._replace
        )

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if hasattr(self, "_finalizer"):
            self._finalizer()


def open_spool(
    root: str | os.PathLike[str] | Storage,
    *,
    split: str,
    keys: KeyProvider,
    replace: bool,
    storage_options: Options | None,
    folder: str | os.PathLike[str] | None,
) -> tuple[Path, Spool | None]:
    """Return the folder to seal a split in and, if that is not its place yet, the way there.

    Raises:
        ConfigError: The URL is not accepted, something was given that a folder has no use for, or
            as for :class:`Spool`.
    """
    storage = open_storage(root, storage_options=storage_options)
    if isinstance(storage, RemoteStorage):
        spool = Spool(storage, split=split, keys=keys, replace=replace, folder=folder)
        return spool.folder, spool
    path = local_root(storage)
    if folder is not None or path is None:
        raise ConfigError(
            "spool= belongs to a URL, and a storage of one's own can be read and not sealed to."
        )
    return path, None


def _current(
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
    *,
    split: str,
) -> Manifest:
    for _ in range(_TRIES):
        current, etag, _ = _current(storage, keys)
        manifest = make(current)
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


def _require_room(
    current: Manifest, sealed: Manifest, storage: RemoteStorage, split: str, *, replace: bool
) -> None:
    if current.dataset_id != sealed.dataset_id:
        raise ConfigError(
            f"another dataset lies at {str(storage)!r}; it was left as it is. Choose another place."
        )
    if split in current.splits and not replace:
        raise ConfigError(
            f"split {split!r} of {str(storage)!r} exists, with {current.splits[split].records} "
            "rows, and was left as it is. Choose another name, or pass replace=True."
        )


def _remove(storage: RemoteStorage, shards: Iterable[ShardEntry]) -> None:
    for shard in shards:
        with contextlib.suppress(OSError, StorageError):  # unreadable without a manifest
            storage.remove(shard.file)
