"""A dataset in an object store or on another machine, through fsspec."""

from __future__ import annotations

import errno
import os
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import fsspec
from fsspec.config import conf as fsspec_settings

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.manifest import MAX_MANIFEST_BYTES
from lightning_secure.data.storage.cache import CiphertextCache
from lightning_secure.data.storage.calls import call, kind_of
from lightning_secure.data.storage.ranges import RemoteFile
from lightning_secure.data.storage.storage import StoredFile
from lightning_secure.data.storage.transport import (
    S3,
    check_url,
    direct_session,
    insecure_options,
    secret_options,
    watch_client,
)
from lightning_secure.errors import ConfigError, MissingExtraError, StorageError
from lightning_secure.util.fork_lock import ForkLock
from lightning_secure.util.validate import positive, positive_int

#: Arguments of fsspec's file system, or a function that returns them afresh.
Options = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

_MANIFEST_LIMIT: Final = MAX_MANIFEST_BYTES
_BACKOFF_SECONDS: Final = 0.1
_BACKOFF_MOST_SECONDS: Final = 5.0


class RemoteStorage:
    """The root of a dataset that is reached by an fsspec URL.

    Args:
        url: For example ``s3://bucket/dataset``. It may hold no credentials.
        storage_options: Passed to fsspec's file system. A callable is asked when the connection is
            made, and again when the storage refuses: so credentials that expire in the middle of a
            run are replaced. Without any, the storage's own chain of credentials is used, which
            refreshes by itself.
        cache: Where downloaded shards are kept, encrypted as they are.
        range_bytes: The most that one request asks for, in bytes. Up to four such ranges are held
            in memory when shards are read through without a cache.
        attempts: How often a request is tried when the storage does not answer well.
        timeout: How long one request of up to ``range_bytes`` may take, in seconds, where fsspec's
            file system is asynchronous, as those of S3 and HTTP are.
        insecure_allow_http: Whether the storage may be spoken to without TLS, or without checking
            its certificate. An attacker on the network can then take the credentials.

    Raises:
        ConfigError: if the URL is not accepted, or a number is not positive.
        MissingExtraError: if the protocol needs a package that is not installed.

    Guarantees:
        Nothing that it returns is trusted: a shard's bytes are checked against the signed manifest
        by :class:`~lightning_secure.data.shards.shard.ShardReader`, so an object that is exchanged,
        also after it was opened, is refused whatever its ETag. No error, log or repr holds
        credentials. It pickles only without them: with a callable, or with options that hold none.

    >>> from lightning_secure import EncryptedShardDataset, seal, upload_split
    >>> storage = RemoteStorage("memory://example/remote", attempts=2)
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> _ = upload_split(folder / "data", storage, split="train", keys=keys)
    >>> EncryptedShardDataset(storage, split="train", keys=keys)[1]
    (tensor(51),)
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Options | None = None,
        cache: CiphertextCache | None = None,
        range_bytes: int = 8 * 1024 * 1024,
        attempts: int = 5,
        timeout: float = 60.0,
        insecure_allow_http: bool = False,
    ) -> None:
        positive_int(range_bytes=range_bytes, attempts=attempts)
        positive(timeout=timeout)
        self.protocol = check_url(url, insecure_allow_http=insecure_allow_http)
        self.range_bytes = range_bytes
        self._url = url.rstrip("/")
        self._options: Options = storage_options if storage_options is not None else {}
        self._cache = cache
        self._attempts = attempts
        self._timeout = timeout
        self._insecure = insecure_allow_http
        self._base = _file_system_class(self.protocol)._strip_protocol(self._url).rstrip("/")
        self._start()

    def _start(self) -> None:
        self._lock = ForkLock()
        self._pid = os.getpid()
        self._file_system: Any = None
        self._windows: OrderedDict[int, RemoteFile] = OrderedDict()

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemoteStorage({self._url!r})"

    def __getstate__(self) -> dict[str, Any]:
        if not callable(self._options) and (names := secret_options(self._options)):
            raise ConfigError(
                f"the storage options {names} may hold credentials, which are not pickled. Pass a "
                "callable that returns the options, or leave the credentials to the storage's own "
                "chain; the other process then gets them for itself."
            )
        state = self.__dict__.copy()
        for name in ("_lock", "_pid", "_file_system", "_windows"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # ------------------------------------------------------------ reading

    def open(self, entry: ShardEntry) -> StoredFile:
        """Open a shard, by way of the cache if there is one.

        Raises:
            FileNotFoundError: if there is no such object.
            StorageError: if the storage did not answer, or refused.
        """
        if self._cache is None:
            return self._origin(entry)
        return self._cache.open(entry, origin=lambda: self._origin(entry), step=self.range_bytes)

    def _origin(self, entry: ShardEntry) -> RemoteFile:
        return RemoteFile(self, entry, size=self.size(entry.file))

    def read(self, name: str) -> bytes:
        """Return a whole small object, never from the cache.

        Raises:
            FileNotFoundError: if there is no such object.
            StorageError: if the storage did not answer, or refused.
        """
        if self.size(name) > _MANIFEST_LIMIT:
            raise StorageError(f"{name!r} at {self._url!r} is larger than a manifest can be.")
        data: bytes = self._ask("cat_file", name)
        return data

    def size(self, name: str) -> int:
        """Return an object's length in bytes; raises as :meth:`read` does."""
        return int(self.describe(name)["size"])

    def describe(self, name: str) -> Mapping[str, Any]:
        """Return what the storage says of an object; raises as :meth:`read` does."""
        found: Mapping[str, Any] = self._ask("info", name)
        if found.get("type") != "file" or type(found.get("size")) is not int:
            raise _missing()
        return found

    def fetch(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end``; fewer if the storage sends no more.

        Raises:
            FileNotFoundError: if there is no such object.
            StorageError: if the storage did not answer, refused, or sent more than it was asked
                for.
        """
        data: bytes = b""
        for _ in range(self._attempts):
            data = self._ask("cat_file", name, start=start, end=end)
            if len(data) == end - start:
                break
        if len(data) > end - start:
            raise StorageError(
                f"{self._url!r} answered a request for {end - start} bytes of {name!r} with "
                f"{len(data)}: it does not serve ranges. Nothing of them was used."
            )
        return data

    def keep_window(self, file: RemoteFile) -> None:
        """Note that ``file`` holds a range in memory; of more than four, the oldest is dropped."""
        with self._lock:
            self._windows[id(file)] = file
            self._windows.move_to_end(id(file))
            dropped = self._windows.popitem(last=False)[1] if len(self._windows) > 4 else None
        if dropped is not None:
            dropped.drop_window()

    def forget_window(self, file: RemoteFile) -> None:
        """Note that ``file`` was closed."""
        with self._lock:
            self._windows.pop(id(file), None)

    # ------------------------------------------------------------ writing

    @property
    def conditional(self) -> bool:
        """Whether an object can be replaced only if it is still the one that was read."""
        return self.protocol in S3

    def upload(self, path: Path, name: str, *, size: int) -> None:
        """Write a file of this machine to an object, whole or not at all.

        Args:
            path: The file.
            name: Path below the root.
            size: Length in bytes that the object must have then.

        Raises:
            StorageError: if the storage did not answer, refused, or holds something else.
        """
        self._ask("put_file", name, local=path)
        if self.size(name) != size:
            raise StorageError(f"{name!r} did not arrive whole at {self._url!r}.")

    def put(self, name: str, data: bytes, *, replacing: str | None) -> bool:
        """Write a small object unless another writer changed it meanwhile.

        Args:
            name: Path below the root.
            data: The bytes to write.
            replacing: The ETag that the object had when it was read; None if there was none.

        Returns:
            False if there is another object now; it was left as it is. Only where
            :attr:`conditional` holds can that be seen without a gap.

        Raises:
            StorageError: if the storage did not answer, or refused. The object may then be stored
                or not.
        """
        options: dict[str, Any] = {"value": data}
        if replacing is None:
            options["mode"] = "create"
        elif self.conditional:
            options["IfMatch"] = replacing
        try:
            self._ask("pipe_file", name, **options)
        except _ExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove an object; raises as :meth:`read` does."""
        self._ask("rm_file", name)

    # ------------------------------------------------------------ asking

    def _ask(self, method: str, name: str, *, local: Path | None = None, **options: Any) -> Any:
        """Call a method of the file system until it works, is refused for good, or tried enough."""
        arguments: tuple[str, ...] = (f"{self._base}/{name}",)
        timeout = self._timeout
        if local is not None:
            arguments = (str(local), *arguments)
            timeout *= 1 + local.stat().st_size // self.range_bytes  # one call sends all
        renewed = False
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                # Half of it by chance, so that a thousand workers do not come back at once.
                wait = min(_BACKOFF_SECONDS * 2**attempt, _BACKOFF_MOST_SECONDS)
                time.sleep(wait * (0.5 + random.random() / 2))  # noqa: S311
            file_system = self._connected()
            failure: BaseException | None = None
            try:
                return call(file_system, method, arguments, options, timeout=timeout)
            except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
                failure = error
            reason, kind = type(failure).__name__, kind_of(failure)
            failure = None  # credentials may be in the error: it is neither chained nor kept
            if kind == "missing":
                raise _missing()
            if kind == "exists":
                raise _ExistsError
            if kind == "denied":
                if renewed:
                    break
                renewed = True
                self._disconnect(file_system)
        raise StorageError(
            f"{self._url!r} did not give {name!r} ({method}: {reason}): it refused, or did not "
            "answer in time. Nothing was returned."
        )

    def _connected(self) -> Any:
        if self._pid != os.getpid():
            self._start()  # after a fork: the other process's threads and locks are not here
        with self._lock:
            if self._file_system is None:
                self._file_system = self._connect()
            return self._file_system

    def _disconnect(self, file_system: Any) -> None:
        with self._lock:
            if self._file_system is file_system:  # another thread may have been first
                self._file_system = None

    def _connect(self) -> Any:
        options = dict(self._options() if callable(self._options) else self._options)
        if not self._insecure:
            everything = {**fsspec_settings.get(self.protocol, {}), **options}
            if name := insecure_options(self.protocol, everything):
                raise ConfigError(
                    f"{name} would turn TLS, or its check of the certificate, off: others on the "
                    "line could take the storage's credentials. Nothing was sent. Use https://, "
                    "or RemoteStorage(..., insecure_allow_http=True)."
                )
        if self.protocol in S3:
            limits: dict[str, Any] = {
                "connect_timeout": self._timeout,
                "read_timeout": self._timeout,
                "retries": {"total_max_attempts": 1},  # this class tries again
            }
            if not self._insecure:
                limits["http_session_cls"] = direct_session()
            options["config_kwargs"] = {**limits, **options.get("config_kwargs", {})}
        elif self.protocol in ("http", "https"):
            options["allow_redirects"] = False
        elif self.protocol in ("file", "local"):
            options.setdefault("auto_mkdir", True)  # as in an object store
        problem = ""
        file_system: Any = None
        try:
            file_system = _file_system_class(self.protocol)(
                skip_instance_cache=True, use_listings_cache=False, **options
            )
            if self.protocol in S3:
                file_system.retries = 1
                if not self._insecure:
                    watch_client(file_system)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - each protocol has errors of its own
            problem = type(error).__name__
        if problem:
            _no_connection(self._url, problem)
        return file_system


class _ExistsError(Exception):
    """There is another object than the one that was to be replaced."""


def _no_connection(url: str, reason: str) -> NoReturn:
    raise StorageError(
        f"{url!r} cannot be connected to ({reason}): look at storage_options. Nothing was read."
    )


def _file_system_class(protocol: str) -> Any:
    problem = ""
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError:
        extra = "lightning-secure[s3]" if protocol in S3 else "its fsspec package"
        problem = f"{protocol}:// needs {extra}, which is not installed."
    except ValueError:
        raise ConfigError(f"fsspec knows no protocol {protocol}://.") from None
    raise MissingExtraError(problem)


def _missing() -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
