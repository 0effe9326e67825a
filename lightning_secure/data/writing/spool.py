"""The folder of this machine in which splits for a remote storage are sealed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import MANIFEST_NAME, Manifest, read_manifest
from lightning_secure.data.manifests.new_split import require_free
from lightning_secure.data.manifests.rollback_pins import Pins
from lightning_secure.data.storage.opening import local_root, open_storage
from lightning_secure.data.storage.remote import RemoteStorage
from lightning_secure.data.storage.storage import Storage
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.upload import (
    current_manifest,
    require_same_dataset,
    same_split,
    upload_splits,
)
from lightning_secure.errors import ConfigError
from lightning_secure.util.files import as_path, atomic_writer


class Spool:
    """The folder of this machine in which a split is sealed before it is sent.

    Args:
        storage: Where it is sent.
        split: Name of the split.
        keys: Checks the storage's manifest.
        options: Of the sealing. With ``resume``, the split may be there because it was sealed to
            its end, so no room is needed. ``spool`` is kept afterwards; by default it is a
            temporary folder that is removed. It holds what the storage will hold, encrypted.
        pins: Pins of the storage's manifest, compared now and when it is replaced.

    Raises:
        ConfigError: if the split exists there, or the folder holds another dataset than the
            storage.
        IntegrityError: if the storage's manifest is not this provider's, or not what was pinned.
        StorageError: if the storage did not answer, or refused.
    """

    def __init__(
        self,
        storage: RemoteStorage,
        *,
        split: str,
        keys: KeyProvider,
        options: SealOptions,
        pins: Pins,
    ) -> None:
        self._storage = storage
        self._split = split
        self._keys = keys
        self._replace = options.replace
        self._pins = pins
        current, _, data = current_manifest(storage, keys)
        pins.check(current, storage)
        self._there = current
        if not options.resume:
            self.require_free()
        if options.spool is None:
            self.folder = Path(tempfile.mkdtemp(prefix="lightning-secure-"))
        else:
            self.folder = as_path(options.spool, what="spool")
        self.folder.mkdir(parents=True, exist_ok=True)
        if options.spool is None:
            self._finalizer = weakref.finalize(self, remove_own, self.folder, os.getpid())
        path = self.folder / MANIFEST_NAME
        if path.exists():
            here = read_manifest(self.folder, trusted=keys.trusted_signers)
            if current is not None:
                require_same_dataset(current, here, storage)
        elif current is not None:
            with atomic_writer(path) as file:  # so that it is sealed as a split of this dataset
                file.write(data)

    def require_free(self, partitions: Collection[str] = ()) -> None:
        """Raise ConfigError if the split, or a partition, was there and may not be replaced."""
        if self._there is not None:
            require_free(
                self._there,
                self._storage,
                self._split,
                replace=self._replace,
                partitions=partitions,
            )

    def send(self, splits: Sequence[str]) -> Manifest:
        """Send sealed splits that are not there, and return the manifest that then is.

        Raises as :func:`upload_split` does.
        """
        sealed = read_manifest(self.folder, trusted=self._keys.trusted_signers)
        there, _, _ = current_manifest(self._storage, self._keys)
        self._pins.check(there, self._storage)
        if there is not None and all(same_split(there, sealed, name) for name in splits):
            return there
        return upload_splits(
            self.folder,
            self._storage,
            splits,
            keys=self._keys,
            replace=self._replace,
            pins=self._pins,
        )

    def close(self) -> None:
        """Remove the folder if it is temporary."""
        if hasattr(self, "_finalizer"):
            self._finalizer()


def remove_own(folder: Path, owner: int) -> None:
    """Remove a folder, except in a process that was forked from its owner."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def open_spool(
    root: str | os.PathLike[str] | Storage,
    *,
    split: str,
    keys: KeyProvider,
    options: SealOptions,
    pins: Pins,
) -> tuple[Path, Spool | None]:
    """Return the folder to seal a split in and, if that is not its place yet, the way there.

    Raises:
        ConfigError: if the URL is not accepted, something was given that a folder has no use for,
            or as for :class:`Spool`.
    """
    storage = open_storage(root, storage_options=options.storage_options)
    if isinstance(storage, RemoteStorage):
        spool = Spool(storage, split=split, keys=keys, options=options, pins=pins)
        return spool.folder, spool
    path = local_root(storage)
    if path is None:
        raise ConfigError(
            f"a {type(storage).__name__} can be read and not sealed to. Give a folder or a URL. "
            "Nothing was sealed."
        )
    if options.spool is not None:
        raise ConfigError(
            f"spool= needs a URL, and {str(path)!r} is not one. Leave it out. Nothing was sealed."
        )
    return path, None
