"""Storages of a dataset's bytes, read at an offset into a buffer."""

from lightning_secure.data.storage.cache import CiphertextCache
from lightning_secure.data.storage.local_files import LocalFile, LocalStorage
from lightning_secure.data.storage.opening import open_storage
from lightning_secure.data.storage.remote import RemoteStorage
from lightning_secure.data.storage.storage import Storage, StoredFile

__all__ = [
    "CiphertextCache",
    "LocalFile",
    "LocalStorage",
    "RemoteStorage",
    "Storage",
    "StoredFile",
    "open_storage",
]
