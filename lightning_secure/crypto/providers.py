"""Key providers: who guards the key-encryption key."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto.encoding import (
    b64decode,
    b64encode,
    canonical_json,
    parse_json_object,
)
from lightning_secure.crypto.keys import DataKey, KeyProvider
from lightning_secure.crypto.signing import SEED_BYTES, Signer, public_key_id
from lightning_secure.errors import ConfigError, IntegrityError, KeyUnavailableError
from lightning_secure.files import atomic_writer, sync_directory

__all__ = ["LocalKeyProvider"]

_TYPE: Final = "lightning-secure/local-key"
_MAX_BYTES: Final = 4096


@final
class LocalKeyProvider(KeyProvider):
    """A key-encryption key and a signing key in one file that only its owner can read.

    Args:
        path: A file made by :meth:`generate`.
        trusted: Public signing keys whose manifests are accepted besides the file's own, for
            whoever reads what somebody else seals.

    Raises:
        KeyUnavailableError: The file is missing, is not a key file, or can be read or written by
            anyone but its owner.

    Whoever can read the file can decrypt and can sign. Keep it apart from the data: a copy of both
    is a copy of the plaintext. Losing it loses the data for good, so keep a second copy in a safe
    place.

    The object pickles as its path, never with key material.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, trusted: Sequence[Ed25519PublicKey] = ()
    ) -> None:
        self._path = Path(path)
        kek, seed = _read_key_file(self._path)
        self._kek: DataKey | None = DataKey(kek)
        self._trusted = tuple(trusted)
        self._signer = Signer(seed)
        self._key_id = DataKey(kek).key_id

    @classmethod
    def generate(cls, path: str | os.PathLike[str]) -> Self:
        """Make a new key file with mode 0600 and return its provider.

        Missing parent directories are made with mode 0700.

        Raises:
            ConfigError: ``path`` exists. It is never overwritten: everything sealed under it
                would be lost.
            KeyUnavailableError: The file system refused.
        """
        target = Path(path)
        record = {
            "type": _TYPE,
            "version": 1,
            "kek": b64encode(os.urandom(32)),
            "signing_key": b64encode(os.urandom(SEED_BYTES)),
        }
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_writer(target, mode=0o600, replace=False) as file:
                file.write(canonical_json(record) + b"\n")
        except OSError as error:
            if isinstance(error, FileExistsError) and target.exists():
                raise ConfigError(
                    f"key file {str(target)!r} exists and was not overwritten: everything sealed "
                    "under it would be lost."
                ) from None
            raise KeyUnavailableError(
                f"key file {str(target)!r} could not be written ({error.strerror}). No key was "
                "made."
            ) from None
        return cls(target)

    @property
    def name(self) -> str:
        """``local``."""
        return "local"

    @property
    def key_id(self) -> str:
        """Id of the key-encryption key."""
        return self._key_id

    @property
    def signer(self) -> Signer:
        """Signs with the key in the file."""
        return self._signer

    @property
    def trusted_signers(self) -> Mapping[str, Ed25519PublicKey]:
        """The file's own signing key, and those that were given as ``trusted``."""
        return {public_key_id(key): key for key in (self._signer.public_key, *self._trusted)}

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        return self._live().wrap(key, context=context)

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        return self._live().unwrap(blob, context=context)

    def _derive(self, purpose: str) -> DataKey:
        return self._live().subkey(f"derive/{purpose}")

    def _retire(self) -> bool:
        """Overwrite the key file and remove it; copies of it are beyond reach."""
        kek, _ = _read_key_file(self._path)
        if DataKey(kek) != self._live():
            raise KeyUnavailableError(
                f"key file {str(self._path)!r} holds another key by now, so it was left alone. "
                f"Key {self._key_id!r} was not destroyed."
            )
        try:
            with self._path.open("r+b") as file:
                file.write(bytes(os.fstat(file.fileno()).st_size))
                file.flush()
                os.fsync(file.fileno())
            self._path.unlink()
            sync_directory(self._path.parent)
        except OSError as error:
            raise KeyUnavailableError(
                f"key file {str(self._path)!r} could not be destroyed ({error.strerror}). The key "
                "may still be used."
            ) from None
        self._kek = None
        return True

    def _live(self) -> DataKey:
        if self._kek is None:
            raise KeyUnavailableError(
                f"key {self._key_id!r} was retired: it was destroyed, and nothing is opened with "
                "it any more."
            )
        return self._kek

    def __repr__(self) -> str:
        return f"LocalKeyProvider({str(self._path)!r}, key_id={self._key_id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        trusted = tuple(key.public_bytes_raw() for key in self._trusted)
        return (
            (_restored, (str(self._path), trusted)) if trusted else (type(self), (str(self._path),))
        )


def _restored(path: str, trusted: Sequence[bytes]) -> LocalKeyProvider:
    keys = [Ed25519PublicKey.from_public_bytes(raw) for raw in trusted]
    return LocalKeyProvider(path, trusted=keys)


def _read_key_file(path: Path) -> tuple[bytes, bytes]:
    """Return (KEK, signing seed) after checking who else could have read or written the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KeyUnavailableError(
            f"key file {str(path)!r} cannot be opened ({error.strerror}). Nothing was decrypted. "
            "LocalKeyProvider.generate(path) makes a new one; it cannot open data sealed under "
            "another."
        ) from None
    try:
        _require_private(path, os.fstat(fd))
        data = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    keys: tuple[bytes, bytes] | None = None
    with contextlib.suppress(IntegrityError):
        keys = _parse_key_file(data) if len(data) <= _MAX_BYTES else None
    if keys is None:
        # Raised outside the handler, so that no part of the file travels with the error.
        raise KeyUnavailableError(
            f"key file {str(path)!r} is not a key file of this version, or it is damaged. No key "
            "was read."
        )
    return keys


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyUnavailableError(f"key file {str(path)!r} is not a regular file. No key was read.")
    if status.st_mode & 0o077:
        raise KeyUnavailableError(
            f"key file {str(path)!r} has mode {stat.S_IMODE(status.st_mode):04o}: others than its "
            "owner can use it, so it cannot be trusted. No key was read. Run chmod 600 on it if "
            "nobody else had access, otherwise rotate to a new key."
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyUnavailableError(
            f"key file {str(path)!r} belongs to another user, who could exchange it. No key was "
            "read."
        )


def _parse_key_file(data: bytes) -> tuple[bytes, bytes]:
    record = parse_json_object(data, what="the key file")
    if record.keys() != {"type", "version", "kek", "signing_key"} or (
        record["type"],
        record["version"],
    ) != (_TYPE, 1):
        raise IntegrityError("the key file has other fields")
    return (
        b64decode(record["kek"], what="the key", length=32),
        b64decode(record["signing_key"], what="the signing key", length=SEED_BYTES),
    )
