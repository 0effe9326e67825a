"""Memory that a thread decrypts in."""

from __future__ import annotations

import threading


class Scratch(threading.local):
    """Memory for segments, used again from one to the next. Each thread has its own.

    Fresh memory costs about as much as decryption, in page faults and zeros.
    """

    def __init__(self) -> None:
        self._sealed = memoryview(bytearray())
        self._plaintext = memoryview(bytearray())

    def sealed(self, length: int) -> memoryview:
        """Return room for ``length`` sealed bytes."""
        if length > len(self._sealed):
            self._sealed = memoryview(bytearray(length))
        return self._sealed[:length]

    def plaintext(self, length: int) -> memoryview:
        """Return room for ``length`` bytes of plaintext."""
        if length > len(self._plaintext):
            self._plaintext = memoryview(bytearray(length))
        return self._plaintext[:length]
