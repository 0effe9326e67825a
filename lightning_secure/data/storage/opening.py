"""Opening of a dataset's root: a path, a URL or a storage."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lightning_secure.data.storage.cache import CiphertextCache
from lightning_secure.data.storage.local_files import LocalStorage
from lightning_secure.data.storage.remote import Options, RemoteStorage
from lightning_secure.data.storage.storage import Storage
from lightning_secure.errors import ConfigError
from lightning_secure.util.files import as_path


def open_storage(
    root: str | os.PathLike[str] | Storage,
    *,
    storage_options: Options | None = None,
    cache: CiphertextCache | None = None,
) -> Storage:
    """Return the storage of a dataset.

    Args:
        root: A folder of this machine, also as ``file://``, an fsspec URL such as
            ``s3://bucket/dataset``, or a storage, which is returned as it is. For a cache of a
            folder that is mounted from elsewhere, make a :class:`RemoteStorage` of its URL.
        storage_options: For a URL, see :class:`RemoteStorage`.
        cache: For a URL, where downloaded shards are kept, encrypted as they are.

    Raises:
        ConfigError: if the URL is not accepted, or an option was given that the root has no use
            for.
        MissingExtraError: if the protocol needs a package that is not installed.

    >>> type(open_storage(folder)).__name__, str(open_storage("memory://example/data"))
    ('LocalStorage', 'memory://example/data')
    """
    path = local_root(root)
    if path is None and not isinstance(root, str | os.PathLike):
        storage: Storage = root
    elif path is None:
        return RemoteStorage(str(root), storage_options=storage_options, cache=cache)
    else:
        storage = LocalStorage(path)
    if storage_options is not None or cache is not None:
        raise ConfigError(
            f"storage_options= and cache= need a URL as text, and {str(storage)!r} is not one. "
            "Leave them out, or give them to RemoteStorage."
        )
    return storage


def local_root(root: str | os.PathLike[str] | Storage) -> Path | None:
    """Return the folder of this machine that ``root`` means, or None if it means another place.

    Raises:
        ConfigError: if ``root`` names no place.

    >>> local_root("file:///srv/data"), local_root("s3://bucket/data")
    (PosixPath('/srv/data'), None)
    """
    if isinstance(root, LocalStorage):
        return Path(str(root))
    if isinstance(root, str) and "://" in root:
        if root.partition("://")[0].lower() not in ("file", "local"):
            return None
        return as_path(unquote(urlsplit(root).path), what="root")
    if hasattr(root, "open") and hasattr(root, "read"):
        return None
    return as_path(root, what="root")


def folder_of(root: str | os.PathLike[str] | Storage) -> Path:
    """Return the folder of a dataset that can be changed where it lies.

    Raises:
        ConfigError: if the dataset is not in a folder of this machine. Changing keys takes locks
            and the removal of files that others may be reading, which an object store does not
            offer.
    """
    path = local_root(root)
    if path is None:
        raise ConfigError(
            "root is no folder of this machine. Change the dataset in the folder that it was "
            "sealed in, and send its splits again with upload_split(..., replace=True). Nothing "
            "was changed."
        )
    return path
