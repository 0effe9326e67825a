"""Files that hold keys: how they are written, and who else may have touched them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.errors import ConfigError, IntegrityError, KeyUnavailableError
from lightning_secure.util.files import as_path, atomic_writer, make_private_directories

_MAX_BYTES: Final = 65536


def write_record(path: Path, record: dict[str, Any], *, what: str) -> None:
    """Write a JSON object to a new file that only its owner can read.

    Raises:
        ConfigError: if ``path`` exists. An existing file is never overwritten.
        KeyUnavailableError: if the file system refused.
    """
    write_file(path, canonical_json(record) + b"\n", what=what, mode=0o600)


def write_file(path: Path, data: bytes, *, what: str, mode: int) -> None:
    """Write a new file; missing parent directories are made with mode 0700.

    Raises:
        ConfigError: if ``path`` exists. An existing file is never overwritten.
        KeyUnavailableError: if the file system refused.
    """
    reason: str | None = None
    try:
        make_private_directories(path.parent)
        with atomic_writer(path, mode=mode, replace=False) as file:
            file.write(data)
    except OSError as error:
        exists = isinstance(error, FileExistsError) and path.exists()
        reason = "" if exists else str(error.strerror)
    if reason == "":
        raise ConfigError(
            f"{what} {str(path)!r} exists and was not overwritten: everything sealed under it "
            "would be lost."
        )
    if reason is not None:
        raise KeyUnavailableError(
            f"{what} {str(path)!r} could not be written ({reason}). No key was made."
        )


def read_record(
    path: Path, *, what: str, kinds: Collection[tuple[str, int]], advice: str = ""
) -> dict[str, Any]:
    """Read a JSON object from a file that only its owner can read.

    Args:
        path: The file.
        what: Names it in errors.
        kinds: Accepted pairs of its ``type`` and ``version``.
        advice: What to do if it is missing.

    Raises:
        KeyUnavailableError: if the file is missing, is not of that kind, or others than its owner
            can read or write it.
    """
    data = read_file(path, what=what, forbidden=0o077, advice=advice)
    record: dict[str, Any] = {}
    with contextlib.suppress(IntegrityError):
        record = parse_json_object(data, what=what)
    kind = record.get("type"), record.get("version")
    if not (isinstance(kind[0], str) and type(kind[1]) is int and kind in kinds):
        raise damaged(path, what)
    return record


def damaged(path: Path, what: str) -> KeyUnavailableError:
    """Return the error for a key file that cannot be used; it holds nothing of the file."""
    return KeyUnavailableError(
        f"{what} {str(path)!r} is not a {what} of this version, or it is damaged. No key was read."
    )


def read_file(path: Path, *, what: str, forbidden: int, advice: str = "") -> bytes:
    """Read a small file after checking who else could have read or written it.

    Args:
        path: The file.
        what: Names it in errors.
        forbidden: Permission bits that it must not have.
        advice: What to do if it is missing.

    Raises:
        ConfigError: if ``path`` has a NUL character.
        KeyUnavailableError: if the file is missing, too long, not a regular file, not its owner's
            alone, or another user's.
    """
    try:
        fd = os.open(as_path(path, what=what), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyUnavailableError(
            f"{what} {str(path)!r} cannot be opened ({error.strerror}). Nothing was decrypted."
            f"{advice}"
        ) from None
    try:
        _require_private(path, os.fstat(fd), what, forbidden)
        data = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > _MAX_BYTES:
        raise damaged(path, what)
    return data


def _require_private(path: Path, status: os.stat_result, what: str, forbidden: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyUnavailableError(f"{what} {str(path)!r} is not a regular file. No key was read.")
    if status.st_mode & forbidden:
        raise KeyUnavailableError(
            f"{what} {str(path)!r} has mode {stat.S_IMODE(status.st_mode):04o}: others than its "
            "owner can use it, so it cannot be trusted. No key was read. Take the bits "
            f"{status.st_mode & forbidden:04o} away if no other user had access, otherwise rotate "
            "to a new key."
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyUnavailableError(
            f"{what} {str(path)!r} belongs to another user, who could exchange it. No key was read."
        )
