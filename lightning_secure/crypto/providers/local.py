"""A key-encryption key in a file, in the clear or under a passphrase."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto.encoding import b64decode, b64encode
from lightning_secure.crypto.keys import KEY_BYTES, DataKey, KeyProvider
from lightning_secure.crypto.providers.identity import trusted_keys, trusted_text
from lightning_secure.crypto.providers.keyfiles import damaged, read_record, write_record
from lightning_secure.crypto.providers.passphrase import (
    open_with_passphrase,
    seal_with_passphrase,
)
from lightning_secure.crypto.providers.secret_sources import (
    SecretSource,
    read_secret,
    require_portable,
    require_source,
)
from lightning_secure.crypto.signing import SEED_BYTES, Signer
from lightning_secure.errors import IntegrityError, KeyUnavailableError
from lightning_secure.util.files import sync_directory

TYPE: Final = "lightning-secure/local-key"
_OPEN, _PROTECTED = (TYPE, 1), (TYPE, 2)


@final
class LocalKeyProvider(KeyProvider):
    """A key-encryption key and a signing key in one file that only its owner can read.

    Args:
        path: A file made by :meth:`generate`.
        passphrase: Returns the passphrase under which the file was made: a function,
            :class:`EnvironmentSecret` or :class:`FileSecret`. A file without one is then refused.
        trusted: Public signing keys whose manifests are accepted besides the file's own, to read
            what another sealer wrote.

    Raises:
        KeyUnavailableError: if the file is missing, is not a key file, or others than its owner can
            read or write it; or if the passphrase is missing or wrong.

    A reader of the file who knows its passphrase, if it has one, can decrypt and can sign.
    Keep it apart from the data: a copy of both is a copy of the plaintext. Losing it loses the data
    for good, so keep a second copy in a safe place.

    The object pickles as its path, never with key material.

    >>> made = LocalKeyProvider.generate(folder / "new.kek")
    >>> LocalKeyProvider(folder / "new.kek").key_id == made.key_id
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        passphrase: SecretSource | None = None,
        trusted: Sequence[str | os.PathLike[str] | Ed25519PublicKey] = (),
    ) -> None:
        if passphrase is not None:
            require_source("passphrase", passphrase)
        self._path = Path(path)
        self._passphrase = passphrase
        record = _read(self._path)
        kek, seed = _keys(record, self._path, passphrase)
        self._digest = _digest(record)
        self._kek: DataKey | None = DataKey(kek)
        self._signer = Signer(seed)
        self._trusted = trusted_keys(trusted)
        self._key_id = DataKey(kek).key_id

    @classmethod
    def generate(
        cls, path: str | os.PathLike[str], *, passphrase: SecretSource | None = None
    ) -> Self:
        """Make a new key file with mode 0600 and return its provider.

        Args:
            path: Where to. Missing parent directories are made with mode 0700.
            passphrase: Returns a passphrase under which the keys are encrypted (Argon2id, with
                64 MiB of memory, and AES-256-GCM). It has 12 characters at least.

        Raises:
            ConfigError: if ``path`` exists, or the passphrase is too short. An existing file is
                never overwritten: everything sealed under it would be lost.
            KeyUnavailableError: if the file system refused, or there is no passphrase.

        >>> made = LocalKeyProvider.generate(folder / "new.kek")
        >>> made.name, oct((folder / "new.kek").stat().st_mode & 0o777)
        ('local', '0o600')
        """
        kek, seed = os.urandom(KEY_BYTES), os.urandom(SEED_BYTES)
        record: dict[str, Any] = {
            "type": TYPE,
            "version": 1,
            "kek": b64encode(kek),
            "signing_key": b64encode(seed),
        }
        if passphrase is not None:
            require_source("passphrase", passphrase)
            record = seal_with_passphrase(
                kek + seed,
                read_secret(passphrase, what="the passphrase"),
                header={"type": TYPE, "version": 2},
            )
        write_record(Path(path), record, what="key file")
        return cls(path, passphrase=passphrase)

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
        return {self._signer.key_id: self._signer.public_key, **self._trusted}

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        return self._live().wrap(key, context=context)

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        return self._live().unwrap(blob, context=context)

    def _derive(self, purpose: str) -> DataKey:
        return self._live().subkey(f"derive/{purpose}")

    def _retire(self) -> bool:
        """Overwrite the key file and remove it; copies of it are beyond reach."""
        kek, _ = _keys(_read(self._path), self._path, self._passphrase)
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

    def _require_kept(self) -> None:
        # Without the passphrase: a prompt may find no user to type it.
        if not hmac.compare_digest(_digest(_read(self._path)), self._digest):
            raise KeyUnavailableError(
                f"key file {str(self._path)!r} holds another key by now, or another passphrase. "
                f"Nothing that is sealed under key {self._key_id!r} may open any more."
            )

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
        if self._passphrase is None and not self._trusted:
            return (type(self), (str(self._path),))
        if self._passphrase is not None:
            require_portable(self._passphrase, what="the passphrase")
        trusted = tuple(trusted_text(key) for key in self._trusted.values())
        return (_open, (str(self._path), self._passphrase, trusted))


def _open(
    path: str, passphrase: SecretSource | None, trusted: Sequence[str] = ()
) -> LocalKeyProvider:
    return LocalKeyProvider(path, passphrase=passphrase, trusted=trusted)


def _read(path: Path) -> dict[str, Any]:
    return read_record(
        path,
        what="key file",
        kinds=(_OPEN, _PROTECTED),
        advice=" LocalKeyProvider.generate(path) makes a new one; it cannot open data sealed under "
        "another.",
    )


def _digest(record: dict[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()


def _keys(
    record: Mapping[str, Any], path: Path, passphrase: SecretSource | None
) -> tuple[bytes, bytes]:
    """Return (KEK, signing seed)."""
    protected = record["version"] == _PROTECTED[1]
    if protected and passphrase is None:
        raise KeyUnavailableError(
            f"key file {str(path)!r} is protected by a passphrase, and none was given. No key was "
            "read. Pass passphrase=EnvironmentSecret(...) or a function that asks for it."
        )
    if not protected and passphrase is not None:
        raise KeyUnavailableError(
            f"key file {str(path)!r} is not protected by a passphrase, and one was given: it is "
            "not the file that was made with it. No key was read."
        )
    keys: bytes | None = None
    with contextlib.suppress(IntegrityError):
        if passphrase is None:
            keys = _parse_open(record)
        elif record.keys() == {"type", "version", "kdf", "sealed"}:
            keys = open_with_passphrase(record, read_secret(passphrase, what="the passphrase"))
            if keys is None:
                raise KeyUnavailableError(
                    f"key file {str(path)!r} does not open: the passphrase is wrong, or the file "
                    "was altered. No key was read."
                )
    if keys is None or len(keys) != KEY_BYTES + SEED_BYTES:
        # Raised outside the handler, so that no part of the file travels with the error.
        raise damaged(path, "key file")
    return keys[:KEY_BYTES], keys[KEY_BYTES:]


def _parse_open(record: Mapping[str, Any]) -> bytes:
    if record.keys() != {"type", "version", "kek", "signing_key"}:
        raise IntegrityError("the key file has other fields")
    return b64decode(record["kek"], what="the key", length=KEY_BYTES) + b64decode(
        record["signing_key"], what="the signing key", length=SEED_BYTES
    )
