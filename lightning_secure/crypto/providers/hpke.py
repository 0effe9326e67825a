"""Public-key recipients: the sealer cannot open."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.providers.external import ExternalKeyProvider, PathLike, rejected
from lightning_secure.crypto.providers.identity import read_public, write_pair
from lightning_secure.crypto.providers.keyfiles import damaged, read_record
from lightning_secure.crypto.signing import pre_authentication_encoding
from lightning_secure.errors import ConfigError, IntegrityError, KeyUnavailableError

TYPE: Final = "lightning-secure/hpke-private-key"
_WHAT: Final = "private key file"
_SIGNED_TYPE: Final = "application/vnd.lightning-secure.hpke-wrapped-key.v1+json"
_ID_BYTES: Final = 16
_SIGNATURE_BYTES: Final = 64
_X25519_BYTES: Final = 32
_MLKEM_SEED_BYTES: Final = 64
_MLKEM_PUBLIC_BYTES: Final = 1184
X25519: Final = "hpke-x25519"
HYBRID: Final = "hpke-mlkem768-x25519"
_KEMS: Final = {X25519: hpke.KEM.X25519, HYBRID: hpke.KEM.MLKEM768_X25519}
_PUBLIC_BYTES: Final = {X25519: _X25519_BYTES, HYBRID: _MLKEM_PUBLIC_BYTES + _X25519_BYTES}
_PRIVATE_BYTES: Final = {X25519: _X25519_BYTES, HYBRID: _MLKEM_SEED_BYTES + _X25519_BYTES}


@dataclass(frozen=True)
class HpkePublicKey:
    """A recipient.

    Attributes:
        kem: ``hpke-mlkem768-x25519`` or ``hpke-x25519``.
        data: X25519: its 32 bytes. Hybrid: the ML-KEM-768 key (1184 bytes), then the X25519 key.
    """

    kem: str
    data: bytes

    @classmethod
    def read(cls, item: PathLike) -> HpkePublicKey:
        """Return the key in a text or in a file with that text.

        Raises:
            ConfigError: if the text is not a recipient's public key.
            KeyUnavailableError: if the file is missing, or others than its owner can write it.

        >>> mine = HpkePrivateKey.generate(folder / "jo.hpke")
        >>> public = HpkePublicKey.read(folder / "jo.hpke.pub")
        >>> public == HpkePublicKey.read(public.text)
        True
        """
        kem, data = read_public(item)
        if _PUBLIC_BYTES.get(kem) != len(data):
            raise ConfigError(
                f"a recipient must be a public key of {' or '.join(_KEMS)}, and this {kem} key of "
                f"{len(data)} bytes is not."
            )
        key = cls(kem, data)
        try:
            key._seal(b"", b"")  # a point of low order, or a key that is none, shows only in use
        except ValueError:
            raise ConfigError(f"a recipient's {kem} key is not a valid one.") from None
        return key

    @property
    def text(self) -> str:
        """The key as one line of text."""
        return f"{self.kem}:{b64encode(self.data)}"

    @property
    def key_id(self) -> str:
        """32 hexadecimal digits that name the key."""
        named = b"lsec/v1/hpke-key-id\0" + self.kem.encode() + b"\0" + self.data
        return hashlib.sha256(named).hexdigest()[: 2 * _ID_BYTES]

    def _seal(self, plaintext: bytes, info: bytes) -> bytes:
        key: Any
        if self.kem == X25519:
            key = X25519PublicKey.from_public_bytes(self.data)
        else:
            key = hpke.MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(self.data[:_MLKEM_PUBLIC_BYTES]),
                X25519PublicKey.from_public_bytes(self.data[_MLKEM_PUBLIC_BYTES:]),
            )
        return _suite(self.kem).encrypt(plaintext, key, info)


@final
class HpkePrivateKey:
    """A recipient's private key, in a file that only its owner can read.

    Args:
        path: A file made by :meth:`generate`.

    Raises:
        KeyUnavailableError: if the file is missing, is not a private key, or others than its owner
            can read or write it.

    >>> _ = HpkePrivateKey.generate(folder / "jo.hpke")
    >>> HpkePrivateKey(folder / "jo.hpke").public.kem
    'hpke-mlkem768-x25519'
    """

    def __init__(self, path: PathLike) -> None:
        self._path = Path(path)
        record = read_record(self._path, what=_WHAT, kinds=((TYPE, 1),))
        data: bytes | None = None
        kem = str(record.get("kem"))
        if record.keys() == {"type", "version", "kem", "private"} and kem in _KEMS:
            with contextlib.suppress(IntegrityError):
                data = b64decode(record["private"], what=_WHAT, length=_PRIVATE_BYTES[kem])
        if data is None:
            raise damaged(self._path, _WHAT)
        self._key, self.public = _key_pair(kem, data)

    @classmethod
    def generate(cls, path: PathLike, *, kem: str = HYBRID) -> HpkePrivateKey:
        """Make a new key: ``path`` with mode 0600, and its public half in ``path`` + ``.pub``.

        Args:
            path: Where to.
            kem: ``hpke-mlkem768-x25519`` keeps what is sealed today from a later quantum computer;
                ``hpke-x25519`` has short keys.

        Raises:
            ConfigError: if one of the files exists, or ``kem`` is unknown.
            KeyUnavailableError: if the file system refused.

        >>> _ = HpkePrivateKey.generate(folder / "jo.hpke")
        >>> sorted(path.name for path in folder.glob("jo.*"))
        ['jo.hpke', 'jo.hpke.pub']
        """
        if kem not in _KEMS:
            raise ConfigError(f"kem={kem!r} is not one of {', '.join(_KEMS)}.")
        data = X25519PrivateKey.generate().private_bytes_raw()
        if kem == HYBRID:
            data = MLKEM768PrivateKey.generate().private_bytes_raw() + data
        record = {"type": TYPE, "version": 1, "kem": kem, "private": b64encode(data)}
        write_pair(Path(path), record, public=_key_pair(kem, data)[1].text, what=_WHAT)
        return cls(path)

    def _open(self, sealed: bytes, info: bytes) -> bytes | None:
        try:
            return _suite(self.public.kem).decrypt(sealed, self._key, info)
        except InvalidTag:
            return None

    def __repr__(self) -> str:
        return f"HpkePrivateKey({str(self._path)!r}, key_id={self.public.key_id!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self._path),))


@final
class HpkeKeyProvider(ExternalKeyProvider):
    """Wraps keys for public-key recipients, and opens them with a private key.

    Args:
        recipients: Public keys of those who may read: text, or files with it. By default the own
            one alone, if there is a private key.
        private_key: File made by :meth:`HpkePrivateKey.generate`, for those who read. Without it
            the provider seals only.
        signing_key: File made by :meth:`SigningKey.generate`, for those who seal.
        trusted: Public signing keys of those who seal.
        derivation_key: File made by :meth:`create_derivation_key`. It takes the private key to use.

    Raises:
        ConfigError: if there is neither a recipient nor a private key, or one is malformed.
        KeyUnavailableError: if a file is missing, or others than its owner can use it.

    A wrapped key is::

        id of the signer (16) | Ed25519 signature (64) | HPKE message (encapsulated key, ciphertext)

    HPKE (RFC 9180) in base mode, HKDF-SHA256 and AES-256-GCM, with X25519 or with ML-KEM-768 and
    X25519 together; its ``info`` is the context, the recipient and the signer. Base mode tells
    nothing about the sender, and public keys are public: so the sealer signs the message, and
    no other party can put a key of its own in its place.

    Every recipient must trust the sealer: pass its public key as ``trusted``.

    >>> from lightning_secure import SigningKey
    >>> _ = HpkePrivateKey.generate(folder / "jo.hpke")
    >>> path = folder / "sealer.sign"
    >>> sign = SigningKey.generate(path)
    >>> sealer = HpkeKeyProvider(recipients=[folder / "jo.hpke.pub"], signing_key=path)
    >>> wrapped = sealer.wrap_all(DataKey.generate(), context={"purpose": "doctest"})
    >>> reader = HpkeKeyProvider(private_key=folder / "jo.hpke", trusted=[sign.public])
    >>> reader.unwrap_any(wrapped, context={"purpose": "doctest"})
    DataKey(<hidden>)
    """

    def __init__(
        self,
        *,
        recipients: Sequence[PathLike] = (),
        private_key: PathLike | None = None,
        signing_key: PathLike | None = None,
        trusted: Sequence[PathLike] = (),
        derivation_key: PathLike | None = None,
    ) -> None:
        if isinstance(recipients, str | os.PathLike):
            raise ConfigError("recipients must be a list of public keys, not one of them.")
        super().__init__(
            signing_key=signing_key,
            trusted=trusted,
            derivation_key=derivation_key,
            own={
                "recipients": recipients,
                "private_key": private_key,
            },
        )
        self._private = HpkePrivateKey(private_key) if private_key is not None else None
        keys = [HpkePublicKey.read(item) for item in recipients]
        if not keys and self._private is not None:
            keys = [self._private.public]
        if not keys:
            raise ConfigError(
                "HpkeKeyProvider needs recipients=[...] to seal for, or private_key= to read with."
            )
        self._recipients = {key.key_id: key for key in keys}

    @property
    def name(self) -> str:
        """``hpke``."""
        return "hpke"

    @property
    def key_id(self) -> str:
        """Id of the own key; of the first recipient's, if there is no private key."""
        return self._private.public.key_id if self._private else self.recipients[0]

    @property
    def _opens(self) -> bool:
        return self._private is not None

    @property
    def recipients(self) -> tuple[str, ...]:
        """Ids of those for whom a key is wrapped."""
        return tuple(self._recipients)

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        return self._wrap_for(self.recipients[0], key, context)

    def _wrap_for(self, recipient: str, key: DataKey, context: Mapping[str, str]) -> bytes:
        signer = self.signer
        info = _info(context, recipient=recipient, signer=signer.key_id)
        sealed = self._recipients[recipient]._seal(key._material, info)
        return bytes.fromhex(signer.key_id) + signer.sign(_signed(info, sealed)) + sealed

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        if self._private is None:
            raise KeyUnavailableError(
                "this HpkeKeyProvider has no private_key=, so it can seal and cannot open. Nothing "
                "was decrypted."
            )
        signer = blob[:_ID_BYTES].hex()
        signature = blob[_ID_BYTES : _ID_BYTES + _SIGNATURE_BYTES]
        sealed = blob[_ID_BYTES + _SIGNATURE_BYTES :]
        public = self.trusted_signers.get(signer)
        if public is None:
            raise rejected(context, f"signer {signer!r} is not trusted")
        info = _info(context, recipient=self.key_id, signer=signer)
        try:
            public.verify(signature, _signed(info, sealed))
        except InvalidSignature:
            raise rejected(context, f"not signed by {signer!r}") from None
        material = self._private._open(sealed, info)
        if material is None:
            raise rejected(context, "HPKE refuses it")
        return DataKey(material)


def _key_pair(kem: str, data: bytes) -> tuple[Any, HpkePublicKey]:
    x25519 = X25519PrivateKey.from_private_bytes(data[-_X25519_BYTES:])
    public = x25519.public_key().public_bytes_raw()
    if kem == X25519:
        return x25519, HpkePublicKey(kem, public)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(data[:_MLKEM_SEED_BYTES])
    public = mlkem.public_key().public_bytes_raw() + public
    return hpke.MLKEM768X25519PrivateKey(mlkem, x25519), HpkePublicKey(kem, public)


def _suite(kem: str) -> hpke.Suite:
    return hpke.Suite(_KEMS[kem], hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def _info(context: Mapping[str, str], *, recipient: str, signer: str) -> bytes:
    return b"lsec/v1/hpke\0" + canonical_json(
        {"context": dict(context), "recipient": recipient, "signer": signer}
    )


def _signed(info: bytes, sealed: bytes) -> bytes:
    payload = canonical_json({"info": b64encode(info), "sealed": b64encode(sealed)})
    return pre_authentication_encoding(_SIGNED_TYPE, payload)
