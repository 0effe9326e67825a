"""Symmetric keys that do not leak by accident, and the providers that guard the topmost one."""

from __future__ import annotations

import hmac
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Self, final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json, utf8
from lightning_secure.crypto.signing import Signer
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    WrongKeyError,
)
from lightning_secure.util import events

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_WRAPPED_BYTES: Final = _NONCE_BYTES + KEY_BYTES + _TAG_BYTES


@final
class DataKey:
    """256 bits of key material without a printable form.

    It refuses pickling, so it cannot slip into a checkpoint, a cache or a worker process; copying
    it copies the reference. Python cannot promise to erase memory: a key that was used may stay in
    the process until it ends.

    >>> DataKey.generate()
    DataKey(<hidden>)
    """

    __slots__ = ("_cipher", "_material")

    def __init__(self, material: bytes) -> None:
        if len(material) != KEY_BYTES:
            raise KeyAccessError(
                f"a key must have {KEY_BYTES} bytes, not {len(material)}. No key was made."
            )
        self._material = bytes(material)
        self._cipher: AESGCM | None = None

    @classmethod
    def generate(cls) -> Self:
        """Draw a fresh key from the operating system."""
        return cls(os.urandom(KEY_BYTES))

    def derive(self, *, info: bytes, salt: bytes = b"", length: int = KEY_BYTES) -> bytes:
        """Return ``length`` bytes that are independent of those for any other ``info`` or ``salt``.

        Source:
            HKDF-SHA256, RFC 5869.

        >>> key = DataKey(bytes(32))
        >>> key.derive(info=b"index").hex()[:8], key.derive(info=b"names").hex()[:8]
        ('dcfbbff0', 'f4eeb9a6')
        """
        return HKDF(algorithm=SHA256(), length=length, salt=salt or None, info=info).derive(
            self._material
        )

    def subkey(self, purpose: str) -> DataKey:
        """Return the key for one purpose; two purposes' keys say nothing about each other.

        >>> key = DataKey(bytes(32))
        >>> key.subkey("index").key_id == key.subkey("names").key_id
        False
        """
        return DataKey(
            self.derive(info=b"lsec/v1/subkey\0" + utf8(purpose, what="the purpose of a key"))
        )

    @property
    def key_id(self) -> str:
        """32 hexadecimal digits that name the key and reveal nothing of it."""
        return self.derive(info=b"lsec/v1/key-id", length=16).hex()

    def wrap(self, key: DataKey, *, context: Mapping[str, str]) -> bytes:
        """Encrypt ``key`` under this one.

        Args:
            key: The key to protect.
            context: The key's purpose. It is authenticated, not stored: unwrapping needs
                the same one.

        Returns:
            60 bytes: nonce (12), ciphertext (32), tag (16). AES-256-GCM with a random nonce, under
            a subkey that does nothing else (SP 800-38F, section 3.1, allows it).
        """
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._wrapping_cipher().encrypt(
            nonce, key._material, associated_data(context)
        )

    def unwrap(self, blob: bytes, *, context: Mapping[str, str]) -> DataKey:
        """Return the key that :meth:`wrap` protected.

        Raises:
            IntegrityError: if ``blob`` was altered, belongs to another context, or was made under
                another key; the cipher cannot tell these apart.

        >>> key = DataKey.generate()
        >>> blob = DataKey(bytes(32)).wrap(key, context={"shard": "7"})
        >>> DataKey(bytes(32)).unwrap(blob, context={"shard": "7"}).key_id == key.key_id
        True
        """
        if len(blob) == _WRAPPED_BYTES:
            nonce, sealed = blob[:_NONCE_BYTES], blob[_NONCE_BYTES:]
            try:
                return DataKey(
                    self._wrapping_cipher().decrypt(nonce, sealed, associated_data(context))
                )
            except InvalidTag:
                pass
        raise IntegrityError(
            f"wrapped key for {describe(context)} rejected: it was altered, moved from "
            "elsewhere, or made under another key. Nothing was decrypted with it."
        )

    def _wrapping_cipher(self) -> AESGCM:
        # Derived once: a partition key wraps the keys of ten thousand shards.
        if self._cipher is None:
            self._cipher = AESGCM(self.derive(info=b"lsec/v1/key-wrap"))
        return self._cipher

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DataKey):
            return NotImplemented
        return hmac.compare_digest(self._material, other._material)

    __hash__ = None  # type: ignore[assignment] # a hash of the material would be a leak

    def __repr__(self) -> str:
        return "DataKey(<hidden>)"

    def __copy__(self) -> DataKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> DataKey:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyAccessError(
            "a DataKey cannot be pickled: keys stay in the process that unwrapped them. "
            "Hand the key provider to the other process instead; it unwraps for itself."
        )


@dataclass(frozen=True, kw_only=True)
class WrappedKey:
    """A key encrypted under a key provider's own key, safe to store beside the data.

    Attributes:
        provider: Name of the kind of provider, for example ``local``.
        key_id: Id of the provider's key.
        blob: The wrapped key, as the provider returned it.

    >>> wrapped = keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
    >>> wrapped.provider, wrapped.key_id == keys.key_id
    ('local', True)
    """

    provider: str
    key_id: str
    blob: bytes

    def to_json(self) -> dict[str, str]:
        """Return the form that manifests and checkpoint headers hold."""
        return {"provider": self.provider, "key_id": self.key_id, "blob": b64encode(self.blob)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Parse what :meth:`to_json` wrote.

        Raises:
            IntegrityError: if the value does not have that form.

        >>> wrapped = keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
        >>> WrappedKey.from_json(wrapped.to_json()) == wrapped
        True
        """
        if not isinstance(value, dict) or value.keys() != {"provider", "key_id", "blob"}:
            raise IntegrityError(
                "a wrapped key does not have the expected fields. No key was unwrapped."
            )
        provider, key_id = value["provider"], value["key_id"]
        if not isinstance(provider, str) or not isinstance(key_id, str):
            raise IntegrityError("a wrapped key does not name its provider. No key was unwrapped.")
        return cls(
            provider=provider, key_id=key_id, blob=b64decode(value["blob"], what="a wrapped key")
        )


class UnwrapDeniedError(KeyUnavailableError):
    """The key service lets this process wrap at most, which says nothing of the KEK."""


class KeyProvider(ABC):
    """Guards the key-encryption key (KEK) and wraps other keys under it.

    Subclasses implement the underscored methods; the public ones announce every use before a key
    leaves, so an audit log that cannot be written refuses the key.

    >>> isinstance(keys, KeyProvider), keys.name
    (True, 'local')
    >>> wrapped = keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
    >>> keys.unwrap(wrapped, context={"purpose": "doctest"})
    DataKey(<hidden>)
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the kind of provider, as stored in :class:`WrappedKey`."""

    @property
    @abstractmethod
    def key_id(self) -> str:
        """Id of the current KEK."""

    @property
    @abstractmethod
    def signer(self) -> Signer:
        """Signs the manifests that the holder of this provider seals."""

    @property
    @abstractmethod
    def trusted_signers(self) -> Mapping[str, Ed25519PublicKey]:
        """Public keys by id whose manifests are accepted."""

    @property
    def recipients(self) -> tuple[str, ...]:
        """Ids of the KEKs for which :meth:`wrap_all` protects a key: one, the provider's own.

        A provider with public-key recipients names them instead.

        >>> keys.recipients == (keys.key_id,)
        True
        """
        return (self.key_id,)

    @abstractmethod
    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes: ...

    def _wrap_for(self, recipient: str, key: DataKey, context: Mapping[str, str]) -> bytes:
        """Wrap for one of several :attr:`recipients`; there is only one, unless overridden."""
        return self._wrap(key, context)

    @abstractmethod
    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey: ...

    @abstractmethod
    def _derive(self, purpose: str) -> DataKey: ...

    @final
    def wrap_all(self, key: DataKey, *, context: Mapping[str, str]) -> tuple[WrappedKey, ...]:
        """Protect ``key`` once for each recipient, bound to ``context``.

        Raises:
            KeyUnavailableError: if the provider could not wrap; no wrapped form is returned.
            AuditWriteError: if a listener could not record the use; the key was not wrapped.

        >>> wrapped = keys.wrap_all(DataKey.generate(), context={"purpose": "doctest"})
        >>> [one.key_id for one in wrapped] == [keys.key_id]
        True
        """
        wrapped = []
        for recipient in self.recipients:
            events.announce("key.wrap", {**self._event(context), "key_id": recipient})
            blob = self._wrap_for(recipient, key, context)
            wrapped.append(WrappedKey(provider=self.name, key_id=recipient, blob=blob))
        return tuple(wrapped)

    @final
    def wrap(self, key: DataKey, *, context: Mapping[str, str]) -> WrappedKey:
        """Protect ``key`` for the one recipient, bound to ``context``.

        Raises:
            ConfigError: if there are several recipients; :meth:`wrap_all` leaves none of them out.
            KeyUnavailableError: if the provider could not wrap.

        >>> wrapped = keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
        >>> wrapped.key_id == keys.key_id
        True
        """
        if len(self.recipients) != 1:
            raise ConfigError(
                f"this provider has {len(self.recipients)} recipients, and one wrapped key would "
                "leave some out. Use wrap_all. Nothing was wrapped."
            )
        (wrapped,) = self.wrap_all(key, context=context)
        return wrapped

    @final
    def unwrap(self, wrapped: WrappedKey, *, context: Mapping[str, str]) -> DataKey:
        """Release a key.

        Raises:
            WrongKeyError: if ``wrapped`` names another provider or another KEK.
            IntegrityError: if ``wrapped`` was altered or belongs to another context.
            KeyUnavailableError: if the KEK cannot be used now, or this provider only seals.
            AuditWriteError: if a listener could not record the use; the key was not released.

        >>> wrapped = keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
        >>> keys.unwrap(wrapped, context={"purpose": "doctest"})
        DataKey(<hidden>)
        >>> keys.unwrap(wrapped, context={"purpose": "another"})
        Traceback (most recent call last):
        lightning_secure.errors.IntegrityError: ...
        """
        if (wrapped.provider, wrapped.key_id) != (self.name, self.key_id):
            events.announce("key.unwrap", self._event(context), outcome="failure")
            raise WrongKeyError(
                f"{describe(context)} was sealed under key {wrapped.key_id!r} of provider "
                f"{wrapped.provider!r}, and this is key {self.key_id!r} of provider {self.name!r}. "
                "Nothing was decrypted."
            )
        try:
            key = self._unwrap(wrapped.blob, context)
        except (IntegrityError, KeyAccessError):
            events.announce("key.unwrap", self._event(context), outcome="failure")
            raise
        events.announce("key.unwrap", self._event(context))
        return key

    @final
    def unwrap_any(self, wrapped: Sequence[WrappedKey], *, context: Mapping[str, str]) -> DataKey:
        """Release a key that was wrapped for several recipients, of which this may be one.

        Tries only the entry wrapped for this provider, with one call. If there is none, fails on
        the first entry and announces the failure.

        Raises:
            WrongKeyError: if none of ``wrapped`` is for this provider.
            IntegrityError: if the one for this provider was altered or belongs to another context.
            KeyUnavailableError: if the KEK cannot be used now, or this provider only seals.

        >>> wrapped = keys.wrap_all(DataKey.generate(), context={"purpose": "doctest"})
        >>> keys.unwrap_any(wrapped, context={"purpose": "doctest"})
        DataKey(<hidden>)
        """
        mine = (key for key in wrapped if (key.provider, key.key_id) == (self.name, self.key_id))
        return self.unwrap(next(mine, wrapped[0]), context=context)

    @final
    def confirm(self, wrapped: Sequence[WrappedKey], *, context: Mapping[str, str]) -> None:
        """Make sure that what was wrapped here still opens, with one call to the provider.

        The KEK can have been destroyed since, by another process or at a key service. A provider
        that only seals, or is no recipient itself, cannot tell, and nothing is raised. One whose
        role at a key service or token may wrap and not unwrap wraps once more, which takes a KEK
        that is there and can be used; whether it is the same one, it cannot tell either.

        Raises:
            KeyUnavailableError: if the KEK is gone or cannot be used now.
            IntegrityError: if another KEK took its place.
            AuditWriteError: if a listener could not record the use.

        >>> wrapped = keys.wrap_all(DataKey.generate(), context={"purpose": "doctest"})
        >>> keys.confirm(wrapped, context={"purpose": "doctest"})
        """
        mine = any((key.provider, key.key_id) == (self.name, self.key_id) for key in wrapped)
        if mine and self._opens:
            denied = False
            try:
                self.unwrap_any(wrapped, context=context)
            except UnwrapDeniedError:
                denied = True
            if denied:  # so is a process whose login is over, which cannot wrap either
                self.wrap_all(DataKey.generate(), context=context)
            self._require_kept()

    @property
    def _opens(self) -> bool:
        """Whether this provider is made to unwrap, and not only to wrap."""
        return True

    def _require_kept(self) -> None:  # noqa: B027 # few keep their KEK in memory
        """Raise KeyUnavailableError if a KEK that is in memory is not where it was read from."""

    @final
    def derive(self, purpose: str) -> DataKey:
        """Return the same key for the same purpose each time, for example for pseudonyms.

        >>> keys.derive("join").key_id == keys.derive("join").key_id
        True
        """
        events.announce("key.derive", self._event({"purpose": purpose}))
        return self._derive(purpose)

    @final
    def retire(self) -> bool:
        """Destroy the current KEK for good, where that is in this provider's power.

        Returns:
            Whether it was destroyed. False: this provider cannot, and the KEK's holder can still
            unwrap everything that was ever wrapped under it.

        Raises:
            KeyUnavailableError: if the KEK could not be destroyed although the provider can do so.
            AuditWriteError: if a listener could not record it; the KEK was not destroyed.

        Whatever is still wrapped under the KEK, in any dataset or checkpoint, is lost.

        >>> keys.retire()
        True
        >>> keys.wrap(DataKey.generate(), context={"purpose": "doctest"})
        Traceback (most recent call last):
        lightning_secure.errors.KeyUnavailableError: ...
        """
        events.announce("key.retire", self._event({}))
        return self._retire()

    def _retire(self) -> bool:
        return False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made = super().__reduce_ex__(protocol)
        if isinstance(made, str) or not (listeners := events.following()):
            return made  # type: ignore[return-value] # a name is one of pickle's forms, too
        # In a worker that was spawned, each use is recorded where it is recorded here.
        return (_received, (listeners, *made[:2]), *made[2:])

    def _event(self, context: Mapping[str, str]) -> dict[str, str]:
        return {"provider": self.name, "key_id": self.key_id, **context}


def _received(
    listeners: Mapping[str, Callable[[events.Event], None]],
    make: Callable[..., KeyProvider],
    arguments: tuple[Any, ...],
) -> KeyProvider:
    events.follow(listeners)
    return make(*arguments)


def associated_data(context: Mapping[str, str]) -> bytes:
    """Return the bytes to which a wrapped key is bound."""
    return b"lsec/v1/wrap\0" + canonical_json(dict(context))


def describe(context: Mapping[str, str]) -> str:
    """Name a use of a key in an error."""
    return ", ".join(f"{name} {value!r}" for name, value in context.items()) or "this use"
