"""Remarks of a split that only its readers see: attributes encrypted under its partition's key.

An attribute whose name begins with ``encrypted.`` holds, in base64, nonce (12) || AES-256-GCM of
the text in UTF-8, followed by the byte 0x80 and zeros up to a multiple of 256, || tag (16). All
other attributes stand in the manifest as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lightning_secure.crypto.encoding import b64decode, b64encode, utf8
from lightning_secure.crypto.keys import associated_data
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.errors import IntegrityError

#: Begins the names of attributes that are encrypted.
ENCRYPTED: Final = "encrypted."
_NONCE_BYTES: Final = 12
#: Of the length of a text, only how many of these it fills can be seen.
_BLOCK: Final = 256


def seal_attributes(attributes: Mapping[str, str], partition: PartitionKey) -> dict[str, str]:
    """Return the attributes as a manifest holds them, those to be encrypted encrypted."""
    return {
        name: _sealed(name, text, partition) if name.startswith(ENCRYPTED) else text
        for name, text in attributes.items()
    }


def open_attributes(
    attributes: Mapping[str, str], partition: PartitionKey | None
) -> dict[str, str]:
    """Return the attributes of a manifest in the clear, by name without the prefix.

    Args:
        attributes: As the manifest holds them.
        partition: The key of the split's own partition; without it, encrypted ones are left out.

    Raises:
        IntegrityError: if an attribute was altered, or belongs to another split.

    >>> partition = PartitionKey.generate(bytes(16), "train")
    >>> sealed = seal_attributes({"source": "clinic", "encrypted.site": "Ulm"}, partition)
    >>> open_attributes(sealed, partition)
    {'source': 'clinic', 'site': 'Ulm'}
    """
    result = {}
    for name, text in attributes.items():
        if not name.startswith(ENCRYPTED):
            result[name] = text
        elif partition is not None:
            result[name.removeprefix(ENCRYPTED)] = _opened(name, text, partition)
    return result


def reseal_attributes(
    attributes: Mapping[str, str], *, old: PartitionKey, new: PartitionKey
) -> dict[str, str]:
    """Return the attributes of a manifest for a partition that gets another key."""
    return {
        name: _sealed(name, _opened(name, text, old), new) if name.startswith(ENCRYPTED) else text
        for name, text in attributes.items()
    }


def _sealed(name: str, text: str, partition: PartitionKey) -> str:
    plain = utf8(text, what="an attribute") + b"\x80"
    plain += bytes(-len(plain) % _BLOCK)
    cipher, nonce = _cipher(partition), os.urandom(_NONCE_BYTES)
    return b64encode(nonce + cipher.encrypt(nonce, plain, _bound(name, partition)))


def _opened(name: str, value: str, partition: PartitionKey) -> str:
    data = b64decode(value, what="an encrypted attribute")
    nonce, sealed = data[:_NONCE_BYTES], data[_NONCE_BYTES:]
    text = None
    try:
        plain = _cipher(partition).decrypt(nonce, sealed, _bound(name, partition)).rstrip(b"\0")
        if plain.endswith(b"\x80"):
            text = plain[:-1].decode()
    except (InvalidTag, ValueError):
        pass
    if text is None:
        raise IntegrityError(
            f"attribute {name!r} rejected: it was altered, or belongs to another split. Nothing "
            "of it was used."
        )
    return text


def _cipher(partition: PartitionKey) -> AESGCM:
    return AESGCM(partition.subkey("attributes").derive(info=b"lsec/v1/attribute"))


def _bound(name: str, partition: PartitionKey) -> bytes:
    return associated_data(partition.context(purpose="attribute", attribute=name))
