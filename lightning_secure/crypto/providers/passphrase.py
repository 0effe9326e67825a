"""A few secret bytes under a passphrase: Argon2id, then AES-256-GCM.

Source:
    RFC 9106. The default is its second recommended option (section 4): 64 MiB, 3 passes, 4 lanes.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from lightning_secure.crypto.encoding import b64decode, b64encode, canonical_json
from lightning_secure.errors import ConfigError, IntegrityError

#: Shortest passphrase that a new file may have: the file can be attacked offline.
MIN_CHARACTERS: Final = 12
_NONCE_BYTES: Final = 12
_SALT_BYTES: Final = 16
#: Costs that a file may ask for, lowest and highest: a hostile one cannot exhaust the machine.
_BOUNDS: Final = {"memory_kib": (65536, 262144), "iterations": (3, 8), "lanes": (1, 8)}
_DEFAULT: Final = {"memory_kib": 65536, "iterations": 3, "lanes": 4}


def seal_with_passphrase(
    secret: bytes, passphrase: str, *, header: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``header`` with two more fields: the parameters, and ``secret`` under the passphrase.

    Raises:
        ConfigError: if the passphrase is shorter than 12 characters.

    Guarantees:
        All other fields of the result are authenticated with the secret, the parameters too.
    """
    if len(passphrase) < MIN_CHARACTERS:
        raise ConfigError(
            f"the passphrase has fewer than {MIN_CHARACTERS} characters: a thief of the "
            "file can try all short ones. No key was made."
        )
    kdf = {"name": "argon2id", "salt": b64encode(os.urandom(_SALT_BYTES)), **_DEFAULT}
    record = {**header, "kdf": kdf}
    nonce = os.urandom(_NONCE_BYTES)
    sealed = AESGCM(_key(passphrase, kdf)).encrypt(nonce, secret, canonical_json(record))
    return {**record, "sealed": b64encode(nonce + sealed)}


def open_with_passphrase(record: Mapping[str, Any], passphrase: str) -> bytes | None:
    """Return the secret, or None if the passphrase is wrong or the record was altered.

    Raises:
        IntegrityError: if the record does not have the form, or asks for more time or memory than
            any record of this package does. Nothing was computed.
    """
    kdf = record.get("kdf")
    if not isinstance(kdf, dict) or kdf.keys() != {"name", "salt", *_BOUNDS}:
        raise IntegrityError("the key file does not name its key derivation")
    for name, (lowest, highest) in _BOUNDS.items():
        if type(kdf[name]) is not int or not lowest <= kdf[name] <= highest:
            raise IntegrityError(f"the key file asks for {name} outside of {lowest} to {highest}")
    if kdf["name"] != "argon2id":
        raise IntegrityError("the key file names an unknown key derivation")
    sealed = b64decode(record.get("sealed"), what="the key")
    header = {name: value for name, value in record.items() if name != "sealed"}
    cipher = AESGCM(_key(passphrase, kdf))
    try:
        return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], canonical_json(header))
    except (InvalidTag, ValueError):  # ValueError: cut to less than a nonce
        return None


def _key(passphrase: str, kdf: Mapping[str, Any]) -> bytes:
    # One passphrase has several encodings in Unicode; RFC 8265 chooses NFC.
    text = unicodedata.normalize("NFC", passphrase)
    return Argon2id(
        salt=b64decode(kdf["salt"], what="the salt", length=_SALT_BYTES),
        length=32,
        iterations=kdf["iterations"],
        lanes=kdf["lanes"],
        memory_cost=kdf["memory_kib"],
    ).derive(text.encode())
