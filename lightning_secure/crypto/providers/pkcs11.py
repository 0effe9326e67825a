"""A KEK in a hardware security module, or another PKCS#11 token, which it never leaves."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self, final

from lightning_secure.crypto.keys import DataKey, UnwrapDeniedError, associated_data
from lightning_secure.crypto.providers.external import (
    ExternalKeyProvider,
    PathLike,
    bound_payload,
    import_extra,
    open_bound_payload,
    rejected,
)
from lightning_secure.crypto.providers.secret_sources import (
    EnvironmentSecret,
    SecretSource,
    read_secret,
    require_source,
)
from lightning_secure.errors import ConfigError, KeyUnavailableError

_PIN: Final = EnvironmentSecret("PKCS11_PIN")
_NONCE_BYTES: Final = 12
_TAG_BITS: Final = 128
_SEALED_BYTES: Final = _NONCE_BYTES + 64 + _TAG_BITS // 8
#: How tokens say that a tag does not match. SoftHSM 2 has no better word than a general error.
_REFUSALS: Final = ("EncryptedDataInvalid", "EncryptedDataLenRange", "GeneralError")
_LOCK: Final = threading.Lock()  # a login belongs to the process, not to a session


@final
class Pkcs11KeyProvider(ExternalKeyProvider):
    """Wraps keys under an AES-256 key in a PKCS#11 token.

    Args:
        module: Path of the token's PKCS#11 library.
        token: Label of the token.
        key: Label of the key; :meth:`generate` makes one.
        pin: Returns the user's PIN: :class:`EnvironmentSecret` (by default of ``PKCS11_PIN``),
            :class:`FileSecret` or a function.
        signing_key: File made by :meth:`SigningKey.generate`, for those who seal.
        trusted: Public signing keys of those who seal.
        derivation_key: File made by :meth:`create_derivation_key`.

    Raises:
        MissingExtraError: if python-pkcs11 is not installed.
        KeyUnavailableError: if the library, token or key is not there, the PIN is wrong, or the key
            could leave the token.

    A wrapped key is ``nonce (12) || AES-256-GCM ciphertext (64) || tag (16)``, encrypted *on the
    token* with the context as associated data. Before each use the token is asked whether the key
    is sensitive and cannot be extracted. A token that has no AES-GCM, or that insists on choosing
    nonces itself, is refused with what it answered. Calls have no time limit: PKCS#11 knows none.

    A process that was forked after the provider was made cannot use it, by PKCS#11's own rules.
    """

    _secret = ("pin", "the PIN")

    def __init__(
        self,
        *,
        module: PathLike,
        token: str,
        key: str,
        pin: SecretSource = _PIN,
        signing_key: PathLike | None = None,
        trusted: Sequence[PathLike] = (),
        derivation_key: PathLike | None = None,
    ) -> None:
        super().__init__(
            signing_key=signing_key,
            trusted=trusted,
            derivation_key=derivation_key,
            own={
                "module": os.fspath(module),
                "token": token,
                "key": key,
                "pin": pin,
            },
        )
        self._pkcs11 = import_extra("pkcs11", extra="pkcs11", user="Pkcs11KeyProvider")
        self._pid = os.getpid()
        with self._key() as found:
            self._key_id = bytes(found[self._pkcs11.Attribute.ID]).hex()
        if not self._key_id:
            raise KeyUnavailableError(
                f"key {key!r} of token {token!r} has no CKA_ID, which identifies the key in what "
                "it wraps. Give the key a CKA_ID. Nothing was wrapped."
            )

    @classmethod
    def generate(
        cls,
        *,
        module: PathLike,
        token: str,
        key: str,
        pin: SecretSource = _PIN,
        **rest: Any,
    ) -> Self:
        """Make a key in the token that cannot leave it, and return its provider.

        Args:
            module: As for the provider.
            token: As for the provider.
            key: Label of the new key.
            pin: As for the provider.
            **rest: Further arguments of the provider.

        Raises:
            ConfigError: if the token has a key of that label. The key was left as it is.
            KeyUnavailableError: if the token refused.
        """
        require_source("pin", pin)
        pkcs11 = import_extra("pkcs11", extra="pkcs11", user="Pkcs11KeyProvider")
        attribute, kind = pkcs11.Attribute, pkcs11.ObjectClass.SECRET_KEY
        with _session(pkcs11, os.fspath(module), token, pin, write=True) as session:
            found = list(session.get_objects({attribute.CLASS: kind, attribute.LABEL: key}))
            if not found:
                session.generate_key(
                    pkcs11.KeyType.AES,
                    256,
                    label=key,
                    id=os.urandom(16),
                    store=True,
                    capabilities=pkcs11.MechanismFlag.ENCRYPT | pkcs11.MechanismFlag.DECRYPT,
                    template={
                        attribute.PRIVATE: True,
                        attribute.SENSITIVE: True,
                        attribute.EXTRACTABLE: False,
                    },
                )
        if found:
            raise ConfigError(
                f"token {token!r} has a key {key!r}, and it was left as it is: everything sealed "
                "under it would be lost."
            )
        return cls(module=module, token=token, key=key, pin=pin, **rest)

    @property
    def name(self) -> str:
        """``pkcs11``."""
        return "pkcs11"

    @property
    def key_id(self) -> str:
        """The key's CKA_ID in hexadecimal."""
        return self._key_id

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        with self._key() as kek:
            self._require_may(kek, "encrypt", KeyUnavailableError)
            sealed: bytes = kek.encrypt(bound_payload(key, context), **self._gcm(nonce, context))
        return nonce + sealed

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        if len(blob) != _SEALED_BYTES:
            raise rejected(context, "its length is wrong")
        nonce, sealed = blob[:_NONCE_BYTES], blob[_NONCE_BYTES:]
        payload = refusal = None
        with self._key() as kek:
            self._require_may(kek, "decrypt", UnwrapDeniedError)
            try:
                payload = kek.decrypt(sealed, **self._gcm(nonce, context))
            except self._pkcs11.exceptions.PKCS11Error as error:
                refusal = type(error).__name__
                if refusal not in _REFUSALS:
                    raise
        if payload is None:
            raise rejected(context, f"the token answers {refusal}")
        return open_bound_payload(payload, context)

    def _require_may(self, kek: Any, use: str, kind: type[KeyUnavailableError]) -> None:
        # python-pkcs11 gives a key's object the methods that the token allows for it.
        if not hasattr(kek, use):
            raise kind(
                f"key {self._arguments['key']!r} of token {self._arguments['token']!r} may not "
                f"{use}, by its attributes. No key was wrapped or released."
            )

    def _gcm(self, nonce: bytes, context: Mapping[str, str]) -> dict[str, Any]:
        parameters = self._pkcs11.GCMParams(nonce, associated_data(context), _TAG_BITS)
        return {"mechanism": self._pkcs11.Mechanism.AES_GCM, "mechanism_param": parameters}

    @contextlib.contextmanager
    def _key(self) -> Iterator[Any]:
        """Yield the key in a session of its own, after checking that it cannot leave the token."""
        if os.getpid() != self._pid:
            raise KeyUnavailableError(
                "this process was forked after the Pkcs11KeyProvider was made, and PKCS#11 does "
                "not work across a fork. Make the provider here, or start processes by spawn."
            )
        pkcs11, arguments = self._pkcs11, self._arguments
        where = arguments["module"], arguments["token"], arguments["pin"]
        with _session(pkcs11, *where, write=False) as session:
            key = session.get_key(
                object_class=pkcs11.ObjectClass.SECRET_KEY,
                key_type=pkcs11.KeyType.AES,
                label=arguments["key"],
            )
            if not (
                key[pkcs11.Attribute.SENSITIVE] is True
                and key[pkcs11.Attribute.EXTRACTABLE] is False
                and key[pkcs11.Attribute.VALUE_LEN] == 32
            ):
                raise KeyUnavailableError(
                    f"key {arguments['key']!r} of token {arguments['token']!r} is not an AES-256 "
                    "key that is sensitive and not extractable: it could leave the token. It was "
                    "not used. Pkcs11KeyProvider.generate makes one that cannot."
                )
            yield key

    def __repr__(self) -> str:
        token, key = self._arguments["token"], self._arguments["key"]
        return f"Pkcs11KeyProvider(token={token!r}, key={key!r}, key_id={self._key_id!r})"


@contextlib.contextmanager
def _session(
    pkcs11: Any, module: str, token: str, pin: SecretSource, *, write: bool
) -> Iterator[Any]:
    """Yield a session in which the user is logged in; errors of PKCS#11 become ours."""
    secret = read_secret(pin, what="the token's PIN")
    failure: str | None = None
    with _LOCK:
        try:
            place = pkcs11.lib(module).get_token(token_label=token)
            try:
                session = place.open(rw=write, user_pin=secret)
            except pkcs11.exceptions.UserAlreadyLoggedIn:
                # By another part of this process, whose login this session shares and leaves be.
                session = place.open(rw=write)
            with session:
                yield session
        except pkcs11.exceptions.PKCS11Error as error:
            failure = type(error).__name__
    if failure is not None:
        raise KeyUnavailableError(
            f"token {token!r} of {module!r} refused ({failure}). No key was used; nothing was "
            "decrypted."
        )
