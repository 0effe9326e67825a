"""Shard files that no manifest names: what a crash or an interruption leaves behind.

One rule keeps data safe here: a file is removed only while the manifest that is in place, verified,
does not name it. If that manifest cannot be read, nothing is removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, read_manifest
from lightning_secure.data.manifests.rollback_pins import ManifestPin, Pins
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.errors import ConfigError, DataError, IntegrityError
from lightning_secure.util.files import exclusive_lock, open_regular, read_regular, sync_directory

LOCK_NAME: Final = ".lock"
ROTATION_LOCK_NAME: Final = ".rotate.lock"
SEALING_JOURNAL_NAME: Final = ".sealing"
_LIST_NAME: Final = ".leftovers"
_LIST_LIMIT: Final = 2**29
#: Names of files that this package writes below a dataset's root, and no others.
_SHARD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/shard-[0-9]{5,10}-[0-9a-f]{8}\.lsec")
_TEMPORARY: Final = re.compile(r"\.shard-[0-9]{5,10}-[0-9a-f]{8}\.lsec\.[0-9a-f]{16}\.tmp")
_MANIFEST_TEMPORARY: Final = re.compile(r"\.(manifest\.json|\.erasing)\.[0-9a-f]{16}\.tmp")
_log = logging.getLogger(__name__)


def remove_unnamed(root: Path, files: Iterable[str], *, keys: KeyProvider) -> list[str]:
    """Remove shard files that the manifest in place does not name.

    Args:
        root: The dataset's folder.
        files: Paths below it, as manifests have them.
        keys: Whose trusted signers' manifests count.

    Returns:
        The files that are still there, because the manifest names them, cannot be read, or the
        file system refused.
    """
    wanted = list(files)
    try:
        manifest = read_manifest(root, trusted=keys.trusted_signers)
    except IntegrityError:
        return wanted
    named = manifest.files
    return [file for file in wanted if file in named or not _removed(root, file)]


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold one of a dataset's locks.

    Raises:
        ConfigError: if the lock is no file that this process may lock.
    """
    reason = None
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(root / name))
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise ConfigError(
                f"the lock {str(root / name)!r} cannot be held ({reason}). Nothing was changed."
            )
        yield


def require_files(root: Path, files: Iterable[str]) -> None:
    """Raise DataError unless every file is there: a manifest must not name what is gone."""
    for file in files:
        if not (root / file).is_file():
            raise DataError(
                f"shard {file!r} is gone before its manifest was written. The dataset was left as "
                "it was. Something else removes files from its folder."
            )


class RemovalList:
    """The list of files that a running rotation may leave behind, kept beside the manifest.

    A name is on the disk before the file is made, or before the manifest that no longer names it
    is put in place. So after a crash at any point :meth:`sweep` finds every leftover. The list is
    not signed and does not have to be: the one thing it can cause is the removal of a shard file
    that no manifest names. Hold the rotation lock while using it.

    Args:
        root: The dataset's folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / _LIST_NAME

    def __bool__(self) -> bool:
        return self._path.exists()

    def note(self, files: Iterable[str]) -> None:
        """Add names, and return when they are on the disk.

        Raises:
            DataError: if the list is no file that can be written.
        """
        fresh = not self._path.exists()
        with os.fdopen(self._opened(), "wb") as file:
            # The first newline ends a line that a crash may have cut.
            file.write(("".join(f"\n{name}" for name in files) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            sync_directory(self._root)

    def sweep(self, manifest: Manifest) -> list[str]:
        """Remove what is listed and not named by the manifest in place; then the list.

        Args:
            manifest: The one that is in place, verified.

        Returns:
            The files that could not be removed; they stay on the list.

        Raises:
            DataError: if the list is no file that can be read. Nothing was removed.
        """
        reason = None
        try:
            data = read_regular(self._path, limit=_LIST_LIMIT)
        except FileNotFoundError:
            return []
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise self._alien(reason)
        listed = data.decode(encoding="ascii", errors="replace").split("\n")
        named = manifest.files
        left = [
            name
            for name in dict.fromkeys(listed)
            if _SHARD.fullmatch(name) and name not in named and not _removed(self._root, name)
        ]
        if not left:
            with contextlib.suppress(OSError):  # the list then names what is gone
                self._path.unlink()
        return left

    def _opened(self) -> int:
        try:
            return open_regular(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
        except OSError as error:
            reason = error.strerror
        raise self._alien(reason)

    def _alien(self, reason: str | None) -> DataError:
        return DataError(
            f"{str(self._path)!r}, the list of what rotations leave behind, cannot be used "
            f"({reason}). Nothing was changed. If something else put it there, remove it."
        )


def collect_garbage(
    root: str | os.PathLike[str],
    *,
    keys: KeyProvider,
    min_age_s: float = 7 * 86400.0,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> list[str]:
    """Remove what crashed sealings and rotations left in a dataset's folder.

    Args:
        root: The dataset's folder.
        keys: Whose trusted signers' manifests count.
        min_age_s: How long ago, in seconds, a shard that no manifest names must have been written.
            A sealing that is still running has such shards too, so this has to be longer than the
            longest one takes. What a rotation left is known and removed at any age. A folder in
            which an interrupted sealing waits to be resumed is left alone: go on with it, or start
            anew with ``resume=False``.
        min_generation: The oldest generation that says which files are named. If an older one was
            put in its place, the shards that only the newer ones name are left alone.
        manifest_digest: The only manifest that does, as SHA-256 in hexadecimal.

    Returns:
        The removed files, as paths below ``root``.

    Raises:
        ConfigError: if ``min_age_s`` is negative.
        ManifestMismatchError: if there is no manifest by a trusted signer, or not what was pinned;
            nothing was removed.

    >>> from lightning_secure import seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> collect_garbage(folder / "data", keys=keys)  # no sealing has crashed here
    []
    """
    if not min_age_s >= 0:
        raise ConfigError(f"min_age_s must not be negative, and is {min_age_s}.")
    folder = folder_of(root)
    read_manifest(folder, trusted=keys.trusted_signers)  # before a lock file is made there
    with locked(folder, ROTATION_LOCK_NAME):
        before = set(_candidates(folder))
        with locked(folder, LOCK_NAME):
            manifest = read_manifest(folder, trusted=keys.trusted_signers)
            Pins(ManifestPin(min_generation, manifest_digest)).check(manifest, folder)
            RemovalList(folder).sweep(manifest)
            oldest = time.time() - min_age_s
            for name in before - manifest.files:
                with contextlib.suppress(FileNotFoundError):
                    if (folder / name).lstat().st_mtime <= oldest:
                        _unlink(folder, name)
    return sorted(before - set(_candidates(folder)))


def _candidates(root: Path) -> Iterator[str]:
    """Return what may be a leftover; the manifest and what is not of this package never are."""
    for path in root.iterdir():
        if _MANIFEST_TEMPORARY.fullmatch(path.name):
            yield path.name
        elif (
            path.is_dir()
            and not path.is_symlink()
            and not os.path.lexists(path / SEALING_JOURNAL_NAME)
        ):
            for file in path.iterdir():
                name = f"{path.name}/{file.name}"
                if _SHARD.fullmatch(name) or _TEMPORARY.fullmatch(file.name):
                    yield name


def _removed(root: Path, file: str) -> bool:
    """Remove a file and its unfinished copies; return whether it is not there any more."""
    folder, name = file.split("/")
    try:
        for path in [*(root / folder).glob(f".{name}.*.tmp"), root / file]:
            with contextlib.suppress(FileNotFoundError):
                _unlink(root, f"{folder}/{path.name}")
    except OSError as error:
        _log.warning("%s could not be removed (%s)", file, error.strerror)
        return False
    return True


def _unlink(root: Path, file: str) -> None:
    """Remove a file below ``root``, never following a link out of it."""
    folder, _, name = file.rpartition("/")
    fd = os.open(root / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)
