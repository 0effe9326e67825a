"""Storages of a dataset's bytes, read at an offset into a buffer."""

from lightning_secure.data.storage.base import Storage, StoredFile
from lightning_secure.data.storage.cache import CiphertextCache
from lightning_secure.data.storage.local import LocalFile, LocalStorage
from lightning_secure.data.storage.opening import open_storage
from lightning_secure.data.storage.remote import RemoteStorage
from lightning_secure.data.storage.upload import upload_split

__all__ = [
    "CiphertextCache",
    "LocalFile",
    "LocalStorage",
    "RemoteStorage",
    "Storage",
    "StoredFile",
    "open_storage",
    "upload_split",
]
