"""Unpredictable random bytes, fast: AES-256 in counter mode."""

from __future__ import annotations

import os
import secrets
from typing import Final, NoReturn, final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from lightning_secure.errors import KeyAccessError

KEY_BYTES: Final = 32
#: The number of bytes from one key, 2**32 blocks. A permutation never repeats a block, which random
#: bytes would do; telling the two apart over that length succeeds with probability 2**-65.
KEY_LIFE: Final = 2**36
_ZEROS: Final = memoryview(bytes(2**18))


@final
class Keystream:
    """A deterministic random bit generator: ``AES-256-CTR(key, 0)`` over zeros.

    Args:
        key: 32 bytes that no other stream has, for known answers and repeatable runs. By default
            256 bits of the operating system, which is what makes the stream unpredictable.

    Guarantees:
        No byte is given out twice: reading moves on, and a forked process begins under a key of its
        own, or is refused where the key was given. A stream refuses pickling and has no repr. Who
        sees any part of a stream of the system's key learns nothing about the rest, as long as AES
        cannot be told from a random permutation. Python cannot promise to erase memory: who reads
        the process's memory has the key.

    Source:
        NIST SP 800-38A, section 6.5 (counter mode); Bernstein 2017, "Fast-key-erasure
        random-number generators" (a new key from the stream itself).

    >>> Keystream(bytes(32)).read(4).hex()
    'dc95c078'
    """

    __slots__ = ("_encryptor", "_given", "_left", "_process")

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise KeyAccessError(
                f"a keystream's key must have {KEY_BYTES} bytes, not {len(key)}. Nothing was drawn."
            )
        self._given = key is not None
        self._begin(secrets.token_bytes(KEY_BYTES) if key is None else key)

    def read(self, count: int) -> bytearray:
        """Return the next ``count`` bytes.

        Raises:
            KeyAccessError: if the process was forked, and its parent reads the same given key.
        """
        if self._process != os.getpid():
            if self._given:
                raise KeyAccessError(
                    "a keystream of a given key was carried into a forked process, where it would "
                    "repeat the parent's bytes. Nothing was drawn."
                )
            self._begin(secrets.token_bytes(KEY_BYTES))
        out = bytearray(count)
        view = memoryview(out)
        while view:
            if not self._left:
                self._begin(self._encryptor.update(bytes(KEY_BYTES)))
            part = min(len(view), len(_ZEROS), self._left)
            self._encryptor.update_into(_ZEROS[:part], view[:part])
            self._left -= part
            view = view[part:]
        return out

    def _begin(self, key: bytes) -> None:
        self._process = os.getpid()
        self._left = KEY_LIFE
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "Keystream(<hidden>)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise KeyAccessError(
            "a Keystream cannot be copied or pickled: the copy would give out the same bytes."
        )
