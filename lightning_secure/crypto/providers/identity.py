"""Sealers' identities: a signing key in a file of its own, and public keys as a line of text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Self, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto.encoding import b64decode, b64encode
from lightning_secure.crypto.providers.keyfiles import (
    damaged,
    read_file,
    read_record,
    write_file,
    write_record,
)
from lightning_secure.crypto.signing import SEED_BYTES, Signer, public_key_id
from lightning_secure.errors import ConfigError, IntegrityError

TYPE: Final = "lightning-secure/signing-key"
_ALGORITHM: Final = "ed25519"
_WHAT: Final = "signing key file"
#: A public key as text: what kind it is, and its bytes in base64.
_PUBLIC: Final = re.compile(r"([a-z0-9-]+):([A-Za-z0-9+/]+={0,2})")


@final
class SigningKey:
    """An Ed25519 signing key in a file that only its owner can read.

    Args:
        path: A file made by :meth:`generate`.

    Raises:
        KeyUnavailableError: if the file is missing, is not a signing key, or others than its owner
            can read or write it.

    A sealer has one. A reader needs its public half alone, as text or in the file beside it, and
    takes it from where the storage administrator cannot write.

    >>> key = SigningKey.generate(folder / "sealer.sign")
    >>> SigningKey(folder / "sealer.sign").key_id == key.key_id
    True
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        record = read_record(self._path, what=_WHAT, kinds=((TYPE, 1),))
        seed: bytes | None = None
        if record.keys() == {"type", "version", "seed"}:
            seed = _decode(record["seed"])
        if seed is None or len(seed) != SEED_BYTES:
            raise damaged(self._path, _WHAT)
        self._signer = Signer(seed)

    @classmethod
    def generate(cls, path: str | os.PathLike[str]) -> Self:
        """Make a new key: ``path`` with mode 0600, and its public half in ``path`` + ``.pub``.

        Raises:
            ConfigError: if one of the files exists. Existing files are never overwritten.
            KeyUnavailableError: if the file system refused.

        >>> _ = SigningKey.generate(folder / "sealer.sign")
        >>> sorted(path.name for path in folder.glob("sealer.*"))
        ['sealer.sign', 'sealer.sign.pub']
        """
        seed = os.urandom(SEED_BYTES)
        record = {"type": TYPE, "version": 1, "seed": b64encode(seed)}
        write_pair(Path(path), record, public=public_text(Signer(seed)), what=_WHAT)
        return cls(path)

    @property
    def signer(self) -> Signer:
        """The key itself."""
        return self._signer

    @property
    def key_id(self) -> str:
        """Id of the public key, as manifests name it."""
        return self._signer.key_id

    @property
    def public(self) -> str:
        """The public key as text: what readers pass as ``trusted=[...]``.

        >>> key = SigningKey.generate(folder / "sealer.sign")
        >>> key.public == (folder / "sealer.sign.pub").read_text().strip()
        True
        """
        return public_text(self._signer)

    def __repr__(self) -> str:
        return f"SigningKey({str(self._path)!r}, key_id={self.key_id!r})"

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return (type(self), (str(self._path),))


def trusted_keys(
    trusted: Iterable[str | os.PathLike[str] | Ed25519PublicKey],
) -> dict[str, Ed25519PublicKey]:
    """Return public signing keys by id.

    Raises:
        ConfigError: if an item is not an Ed25519 public key.
        KeyUnavailableError: if a file with one is missing, or others can write it.

    >>> key = SigningKey.generate(folder / "sealer.sign")
    >>> list(trusted_keys([folder / "sealer.sign.pub", key.public])) == [key.key_id]
    True
    """
    if isinstance(trusted, str | os.PathLike):
        raise ConfigError("trusted must be a list of public keys, not one of them.")
    keys = {}
    for item in trusted:
        if isinstance(item, Ed25519PublicKey):
            keys[public_key_id(item)] = item
            continue
        algorithm, data = read_public(item)
        if algorithm != _ALGORITHM or len(data) != 32:
            raise ConfigError(
                f"a trusted signer must be an {_ALGORITHM} public key, and {_shown(item)} is not."
            )
        key = Ed25519PublicKey.from_public_bytes(data)
        keys[public_key_id(key)] = key
    return keys


def read_public(item: str | os.PathLike[str]) -> tuple[str, bytes]:
    """Return (algorithm, bytes) of a public key, given as text or as a file with that text.

    Raises:
        ConfigError: if the text is not a public key.
        KeyUnavailableError: if the file is missing, or others than its owner can write it.
    """
    text = item if isinstance(item, str) else ""
    if not _PUBLIC.fullmatch(text):
        # Not secret; but its writer decides who may read, or who is believed.
        data = read_file(Path(item), what="public key file", forbidden=0o022)
        text = data.decode("ascii", errors="replace").strip()
    match = _PUBLIC.fullmatch(text)
    decoded = _decode(match[2]) if match else None
    if match is None or decoded is None:
        raise ConfigError(f"{_shown(item)} is not a public key.")
    return match[1], decoded


def write_pair(private: Path, record: dict[str, Any], *, public: str, what: str) -> None:
    """Write a private key file, and the public half's text beside it with mode 0644.

    Raises:
        ConfigError: if one of the files exists. Neither was written.
        KeyUnavailableError: if the file system refused.
    """
    beside = public_file(private)
    if beside.exists():
        raise ConfigError(f"public key file {str(beside)!r} exists. No key was made.")
    write_record(private, record, what=what)
    write_file(beside, f"{public}\n".encode(), what="public key file", mode=0o644)


def public_file(private: Path) -> Path:
    """Return where the public half of a private key file lies."""
    return private.with_name(f"{private.name}.pub")


def public_text(signer: Signer) -> str:
    """Return a signing key's public half as text."""
    return trusted_text(signer.public_key)


def trusted_text(key: Ed25519PublicKey) -> str:
    """Return a public signing key as ``trusted`` takes it."""
    return f"{_ALGORITHM}:{b64encode(key.public_bytes_raw())}"


def _decode(text: object) -> bytes | None:
    try:
        return b64decode(text, what="a key")
    except IntegrityError:
        return None


def _shown(item: str | os.PathLike[str]) -> str:
    return repr(str(item) if len(str(item)) < 100 else f"{str(item)[:60]}...")
