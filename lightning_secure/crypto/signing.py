"""Signatures over documents: Ed25519 in DSSE envelopes.

A MAC would let every reader forge; a signature lets only the sealer write. DSSE signs the bytes as
they are, so no canonical form has to be agreed on, and binds the type of the document.

Source:
    DSSE v1.0.2, https://github.com/secure-systems-lab/dsse; Ed25519, RFC 8032.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final, NoReturn, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json, parse_json_object
from lightning_secure.errors import IntegrityError, KeyAccessError, ManifestMismatchError

SEED_BYTES: Final = 32
#: Brackets and commas of an envelope; base64 has none, so it is a bound on its parts.
_MAX_PARTS: Final = 1024


def public_key_id(key: Ed25519PublicKey) -> str:
    """Return the id of a public key: the first 16 bytes of its SHA-256, in hexadecimal."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:32]


@final
class Signer:
    """A private signing key without a printable form. It refuses pickling.

    >>> signer = Signer(bytes(32))
    >>> signer, len(signer.sign(b"manifest"))
    (Signer(139e3940e64b5491722088d9a0d74162), 64)
    """

    __slots__ = ("_key",)

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise KeyAccessError(
                f"a signing key must have {SEED_BYTES} bytes, not {len(seed)}. No key was made."
            )
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that verifies this one's signatures."""
        return self._key.public_key()

    @property
    def key_id(self) -> str:
        """Id of the public key."""
        return public_key_id(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"Signer({self.key_id})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyAccessError(
            "a Signer cannot be pickled: signing keys stay in the process that read them."
        )


def seal_envelope(payload: bytes, *, payload_type: str, signer: Signer) -> bytes:
    """Return a DSSE envelope of ``payload`` as JSON bytes."""
    signature = signer.sign(pre_authentication_encoding(payload_type, payload))
    return canonical_json(
        {
            "payloadType": payload_type,
            "payload": b64encode(payload),
            "signatures": [{"keyid": signer.key_id, "sig": b64encode(signature)}],
        }
    )


def open_envelope(
    data: bytes, *, payload_type: str, trusted: Mapping[str, Ed25519PublicKey], what: str
) -> bytes:
    """Return the payload of an envelope that a trusted key signed.

    Args:
        data: The envelope.
        payload_type: The type of document that is expected.
        trusted: Public keys by id. Signatures by others count for nothing.
        what: Names the document in errors.

    Raises:
        ManifestMismatchError: if no trusted key signed this payload as this type.
        IntegrityError: if ``data`` is not an envelope.

    >>> signer = Signer(bytes(32))
    >>> sealed = seal_envelope(b"{}", payload_type="text/example", signer=signer)
    >>> trusted = {signer.key_id: signer.public_key}
    >>> open_envelope(sealed, payload_type="text/example", trusted=trusted, what="note")
    b'{}'
    """
    # Before anything is known about who wrote it: a small file can make a parser use much memory.
    if sum(map(data.count, (b"[", b"{", b","))) > _MAX_PARTS:
        raise IntegrityError(f"{what} is not an envelope. Nothing from it was used.")
    envelope = parse_json_object(data, what=what)
    payload = b64decode(envelope.get("payload"), what=f"the payload of {what}")
    if envelope.get("payloadType") != payload_type:
        raise ManifestMismatchError(
            f"{what} is not a document of type {payload_type!r}. Nothing from it was used."
        )
    signed = pre_authentication_encoding(payload_type, payload)
    signatures: Any = envelope.get("signatures")
    for entry in signatures if isinstance(signatures, list) else []:
        keyid = entry.get("keyid") if isinstance(entry, dict) else None
        key = trusted.get(keyid) if isinstance(keyid, str) else None
        if key is None:
            continue
        try:
            key.verify(b64decode(entry.get("sig"), what=f"a signature of {what}"), signed)
        except InvalidSignature:
            continue
        return payload
    raise ManifestMismatchError(
        f"{what} carries no valid signature of a trusted key "
        f"({', '.join(sorted(trusted)) or 'none is trusted'}): it was altered, or another "
        "signer wrote it. Nothing from it was used."
    )


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Return what DSSE signs: the payload and what kind of document it is.

    >>> pre_authentication_encoding("text/example", b"{}")
    b'DSSEv1 12 text/example 2 {}'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
