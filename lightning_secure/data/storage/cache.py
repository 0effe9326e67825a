"""Downloaded shards, kept on this machine as they are: encrypted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.data.storage.storage import StoredFile
from lightning_secure.errors import ConfigError
from lightning_secure.util import events
from lightning_secure.util.files import exclusive_lock, release_lock
from lightning_secure.util.fork_lock import ForkLock
from lightning_secure.util.validate import positive_int

_log = logging.getLogger(__name__)
_ENTRY: Final = ".shard"
_PART: Final = ".part"
_LOCK: Final = ".lock"
#: Tries before copies that vanish, or are no files, count as another process's interference.
_TRIES: Final = 8
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class CiphertextCache:
    """A folder of downloaded shards, shared by any number of threads and processes.

    Args:
        folder: Made if it does not exist, for its owner only.
        max_bytes: What the files in it may take together, in bytes. The shards that were opened
            longest ago make room. A removed shard that a reader still has open takes its space
            until it is closed; a shard larger than all is read through.

    Raises:
        ConfigError: if ``max_bytes`` is not positive, or the folder cannot be made.

    Guarantees:
        Only bytes that the storage holds are written: ciphertext, under the name of the shard's
        uuid and the digest of what the signed manifest says of it, so that it never stands for
        another shard or another sealing. What lies in it is trusted no more than the storage: all
        checks of a shard are made on it. A file that fails one is removed, what it failed for is
        read from the storage once more, and only if that fails too is it refused.

        A file appears whole, by a rename. Locks are ``flock``: they end with their process, and a
        half download that a dead process left is removed by the next that needs room. After a
        power cut a file may hold zeros; the checks see that. A full disk, or a folder that cannot
        be written, costs the cache and not the run: shards are then read through.

    >>> from lightning_secure import EncryptedShardDataset, seal, upload_split
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> _ = upload_split(folder / "data", "memory://example/cached", split="train", keys=keys)
    >>> cache = CiphertextCache(folder / "cache", max_bytes=2**30)
    >>> EncryptedShardDataset("memory://example/cached", split="train", keys=keys, cache=cache)[0]
    (tensor(34),)
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_bytes: int) -> None:
        positive_int(max_bytes=max_bytes)
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the cache folder {str(self.folder)!r} cannot be made ({error.strerror})."
            ) from None

    def __repr__(self) -> str:
        return f"CiphertextCache({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def open(self, entry: ShardEntry, *, origin: Callable[[], StoredFile], step: int) -> StoredFile:
        """Open a shard's copy, after making it if need be; or the shard itself if that fails.

        Args:
            entry: The shard's entry in a verified manifest.
            origin: Opens the shard where it lies.
            step: How much to copy at a time, in bytes.

        Raises:
            OSError: if the shard cannot be opened where it lies.
            StorageError: if the storage did not answer, or refused.
        """
        path = self.folder / (_key(entry) + _ENTRY)
        source: StoredFile | None = None
        try:
            for _ in range(_TRIES):
                if (fd := _open_entry(path, entry.size)) is not None:
                    if source is not None:
                        source.close()
                    return _CachedFile(fd, entry=entry, path=path, origin=origin)
                source = source or origin()
                if source.size != entry.size or not self._fill(path, source, step):
                    break
        except _CacheError as error:
            _log.warning("the cache is not used for a shard (%s); it is read through", error)
        except BaseException:
            if source is not None:
                source.close()
            raise
        return source or origin()

    def _fill(self, path: Path, source: StoredFile, step: int) -> bool:
        """Copy a shard to ``path``, or wait for who does; False if it cannot be kept.

        The file that is being written carries the lock, and its length is the claim on the space.
        """
        part = path.with_suffix(_PART)
        with _lent(part) as fd:
            if not _is(part, fd):
                return True  # the lock's last holder has finished, or has given up
            done = False
            try:
                if path.exists():
                    return True  # finished just before this download began
                done = self._claim(fd, part, source.size) and _copy(source, fd, step)
                if done:
                    # Under the lock, or who claims room might see neither of its names.
                    with _cache_errors(), exclusive_lock(self.folder / _LOCK):
                        os.rename(part, path)
            finally:
                if not done:
                    with contextlib.suppress(OSError):
                        os.unlink(part)
            return done

    def _claim(self, fd: int, part: Path, size: int) -> bool:
        """Make room for ``size`` bytes and take it."""
        with _cache_errors(), exclusive_lock(self.folder / _LOCK):
            room = self.max_bytes - size
            if room < 0:
                return False
            kept: list[tuple[int, int, Path]] = []
            for item in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    status = item.stat(follow_symlinks=False)
                    if item.name.endswith(_ENTRY):
                        kept.append((status.st_mtime_ns, status.st_size, Path(item.path)))
                    elif item.name.endswith(_PART) and item.name != part.name:
                        room -= 0 if _remove_if_dead(Path(item.path)) else status.st_size
            room -= sum(length for _, length, _ in kept)
            for _, length, oldest in sorted(kept):
                if room >= 0:
                    break
                oldest.unlink(missing_ok=True)
                room += length
            if room < 0:
                return False
            os.posix_fallocate(fd, 0, size)
            return True


class _CachedFile:
    """A shard's copy, and the way to the shard itself should the copy be no good."""

    def __init__(
        self, fd: int, *, entry: ShardEntry, path: Path, origin: Callable[[], StoredFile]
    ) -> None:
        self._fd = fd
        self._entry = entry
        self._path = path
        self._open_origin = origin
        self._origin: StoredFile | None = None
        self._lock = ForkLock()

    @property
    def size(self) -> int:
        return self._origin.size if self._origin else os.fstat(self._fd).st_size

    def read_into(self, offset: int, out: Buffer) -> int:
        if self._origin:
            return self._origin.read_into(offset, out)
        with memoryview(out).cast("B") as view:
            done = 0
            while done < len(view):
                try:
                    count = os.preadv(self._fd, [view[done:]], offset + done)
                except OSError:  # a bad block: the reader will distrust what is missing
                    break
                if count == 0:
                    break
                done += count
            return done

    def distrust(self) -> bool:
        """Remove the copy and read from the storage from now on; see :class:`CiphertextCache`."""
        with self._lock:
            if self._origin is None:
                with contextlib.suppress(OSError):
                    if _is(self._path, self._fd):
                        os.unlink(self._path)
                shard = self._entry.uuid.hex()
                _log.warning("a cached copy of shard %s is not authentic; it was removed", shard)
                events.announce("data.cache", {"shard": shard}, outcome="failure")
                try:
                    self._origin = self._open_origin()
                except OSError:
                    return False
            # Another thread may have read from the copy before this one got here.
            return True

    def close(self) -> None:
        os.close(self._fd)
        if self._origin:
            self._origin.close()


class _CacheError(Exception):
    """The folder, not the storage, made trouble."""


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CacheError(errno.errorcode.get(error.errno or 0, "OSError")) from None


def _key(entry: ShardEntry) -> str:
    described = (
        entry.header_sha256
        + entry.merkle_root
        + entry.commitment
        + entry.size.to_bytes(8, "little")
    )
    return f"{entry.uuid.hex()}-{hashlib.sha256(described).hexdigest()[:32]}"


def _open_entry(path: Path, size: int) -> int | None:
    """Open a copy and note its use; None if there is none of the right length."""
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise _CacheError(errno.errorcode.get(error.errno or 0, "OSError")) from None
        fd = -1
    if fd >= 0:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and status.st_size == size:
            with contextlib.suppress(OSError):
                os.utime(fd)
            return fd
        os.close(fd)
    with _cache_errors():  # a link, a pipe or a cut file that another process put there
        path.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _lent(part: Path) -> Iterator[int]:
    """Open the file that a download goes to, and hold its lock."""
    owner = os.getpid()
    with _cache_errors():
        fd = os.open(part, os.O_RDWR | os.O_CREAT | _OPEN, 0o600)
    try:
        with _cache_errors():
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        release_lock(fd, owner=owner)


def _remove_if_dead(part: Path) -> bool:
    """Remove a download whose lock no process holds."""
    fd = os.open(part, os.O_RDWR | _OPEN)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        part.unlink(missing_ok=True)
        return True
    finally:
        os.close(fd)


def _is(path: Path, fd: int) -> bool:
    try:
        found = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _copy(source: StoredFile, fd: int, step: int) -> bool:
    """Copy all of it; False if the storage gave less than it said."""
    buffer = bytearray(min(step, source.size))
    for start in range(0, source.size, step):
        with memoryview(buffer)[: source.size - start] as view:
            if source.read_into(start, view) != len(view):
                return False
            with _cache_errors():
                done = 0
                while done < len(view):
                    done += os.pwrite(fd, view[done:], start + done)
    return True
