"""Common parts of providers whose key-encryption key is not in one file with all the rest."""

from __future__ import annotations

import hashlib
import hmac
import importlib
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from lightning_secure.crypto.keys import (
    KEY_BYTES,
    DataKey,
    KeyProvider,
    WrappedKey,
    associated_data,
    describe,
)
from lightning_secure.crypto.providers.identity import SigningKey, trusted_keys
from lightning_secure.crypto.providers.keyfiles import damaged, read_record, write_record
from lightning_secure.crypto.providers.secret_sources import require_portable, require_source
from lightning_secure.crypto.signing import Signer
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyUnavailableError,
    MissingExtraError,
)

PathLike = str | os.PathLike[str]
_DERIVATION_TYPE: Final = "lightning-secure/derivation-key"
_DERIVATION_CONTEXT: Final = {"purpose": "derivation"}
_WHAT: Final = "derivation key file"


class ExternalKeyProvider(KeyProvider):
    """A provider whose KEK is kept apart from the signing key.

    Args:
        signing_key: File made by :meth:`SigningKey.generate`, for those who seal. Without it the
            provider reads only.
        trusted: Public signing keys whose manifests are accepted besides the own one: text
            (``ed25519:...``) or files with it.
        derivation_key: File made by :meth:`create_derivation_key`, from which :meth:`derive` takes
            its keys. The KEK cannot be used for it where it does not leave its place.
        own: The subclass' other arguments. All together are kept in ``_arguments``; the object
            pickles as these, and asks again for what it needs.

    Raises:
        ConfigError: if the argument that ``_secret`` names is a secret, and not a source of one.
    """

    #: Name of the argument that is a source of a secret, and what its errors call that.
    _secret: ClassVar[tuple[str, str] | None] = None

    def __init__(
        self,
        *,
        signing_key: PathLike | None,
        trusted: Sequence[PathLike],
        derivation_key: PathLike | None,
        own: Mapping[str, Any],
    ) -> None:
        if self._secret is not None:
            require_source(self._secret[0], own[self._secret[0]])
        self._signing = SigningKey(signing_key) if signing_key is not None else None
        self._trusted = trusted_keys(trusted)
        if self._signing is not None:
            self._trusted[self._signing.key_id] = self._signing.signer.public_key
        self._derivation_path = Path(derivation_key) if derivation_key is not None else None
        self._derivation: DataKey | None = None
        self._arguments: dict[str, Any] = {
            **own,
            "signing_key": signing_key,
            "trusted": trusted,
            "derivation_key": derivation_key,
        }

    @property
    def signer(self) -> Signer:
        """The signing key.

        Raises:
            KeyUnavailableError: if no signing key was given: this provider reads and does not seal.
        """
        if self._signing is None:
            raise KeyUnavailableError(
                f"this {type(self).__name__} has no signing_key=, so it can read and cannot seal. "
                "Nothing was signed. SigningKey.generate(path) makes one; readers must then trust "
                "its public half."
            )
        return self._signing.signer

    @property
    def trusted_signers(self) -> Mapping[str, Ed25519PublicKey]:
        """The own signing key, if there is one, and those that were given as ``trusted``."""
        return self._trusted

    def create_derivation_key(self, path: PathLike) -> None:
        """Make a fresh key for :meth:`derive`, and write it, wrapped under the KEK, to a new file.

        The file is no secret, but losing it changes all pseudonyms made from now on. To get the
        same pseudonyms elsewhere, use the same file there, and a KEK that opens it.

        Raises:
            ConfigError: if ``path`` exists. An existing file is never overwritten.
            KeyUnavailableError: if the provider could not wrap, or the file system refused.
        """
        wrapped = self.wrap_all(DataKey.generate(), context=_DERIVATION_CONTEXT)
        record = {
            "type": _DERIVATION_TYPE,
            "version": 1,
            "keys": [one.to_json() for one in wrapped],
        }
        write_record(Path(path), record, what=_WHAT)

    def _derive(self, purpose: str) -> DataKey:
        if self._derivation is None:
            self._derivation = self._open_derivation_key()
        return self._derivation.subkey(f"derive/{purpose}")

    def _open_derivation_key(self) -> DataKey:
        path = self._derivation_path
        if path is None:
            raise KeyUnavailableError(
                f"this {type(self).__name__} cannot derive keys, for example for pseudonyms: its "
                "KEK is not available for derivation. Make a file with "
                "create_derivation_key(path) and pass it as derivation_key=. No key was derived."
            )
        record = read_record(path, what=_WHAT, kinds=((_DERIVATION_TYPE, 1),))
        keys = record.get("keys")
        if record.keys() != {"type", "version", "keys"} or not isinstance(keys, list) or not keys:
            raise damaged(path, _WHAT)
        wrapped = [WrappedKey.from_json(key) for key in keys]
        return self.unwrap_any(wrapped, context=_DERIVATION_CONTEXT)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key_id={self.key_id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._secret is not None:
            name, what = self._secret
            require_portable(self._arguments[name], what=what)
        return (_rebuild, (type(self), self._arguments))


def _rebuild(kind: type[ExternalKeyProvider], config: dict[str, Any]) -> ExternalKeyProvider:
    return kind(**config)


def bound_payload(key: DataKey, context: Mapping[str, str]) -> bytes:
    """Return what is encrypted under a KEK elsewhere: the key, and a digest of its context.

    64 bytes. The backend binds the context too, as associated data; this keeps holding for one
    that ignores an argument that it does not know.
    """
    return key._material + _context_digest(context)


def open_bound_payload(payload: bytes, context: Mapping[str, str]) -> DataKey:
    """Return the key in what :func:`bound_payload` made.

    Raises:
        IntegrityError: if the key was wrapped for another context.
    """
    material, digest = payload[:KEY_BYTES], payload[KEY_BYTES:]
    if not hmac.compare_digest(digest, _context_digest(context)):
        raise rejected(context, "its context is another one")
    return DataKey(material)


def _context_digest(context: Mapping[str, str]) -> bytes:
    return hashlib.sha256(associated_data(context)).digest()


def rejected(context: Mapping[str, str], reason: str) -> IntegrityError:
    """Return the error for a wrapped key that its KEK does not open."""
    return IntegrityError(
        f"wrapped key for {describe(context)} rejected ({reason}): it was altered, moved from "
        "elsewhere, or made under another key. Nothing was decrypted with it."
    )


def import_extra(module: str, *, extra: str, user: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingExtraError: if the package is not installed; the message names the extra that brings
            it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        pass
    raise MissingExtraError(f"{user} needs {module}: pip install 'lightning-secure[{extra}]'.")


def require_safe_url(url: str, *, name: str, insecure_allow_http: bool) -> None:
    """Refuse to send keys and tokens in the clear, or to a URL that holds a password.

    Raises:
        ConfigError: if ``url`` is neither https nor http to this machine, or has user information.
    """
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname
    except ValueError:
        scheme, host, parts = "", None, urlsplit("")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{name} must not hold user information: it would show up in errors.")
    if scheme not in ("http", "https") or not host:
        raise ConfigError(f"{name} is not an https URL.")
    if scheme == "http" and not insecure_allow_http and not is_loopback(url):
        raise ConfigError(
            f"{name}={url!r} would send keys over the network in the clear. Use https, or pass "
            "insecure_allow_http=True where the network itself is trusted."
        )


def is_loopback(url: str) -> bool:
    """Tell whether a URL's host is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
