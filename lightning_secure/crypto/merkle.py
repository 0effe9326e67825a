"""Merkle tree hash of a list of byte strings.

Source:
    RFC 6962, section 2.1: a leaf is ``SHA-256(0x00 || data)``, an inner node
    ``SHA-256(0x01 || left || right)``, and the left subtree is the largest power of two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def merkle_root(leaves: Iterable[bytes | memoryview]) -> bytes:
    """Return the 32-byte root; of no leaves at all, the SHA-256 of nothing.

    The tree is folded as leaves arrive, so memory grows with the logarithm of their number.

    >>> merkle_root([]).hex()[:16]
    'e3b0c44298fc1c14'
    """
    stack: list[tuple[int, bytes]] = []  # (height, hash), heights strictly decreasing
    for leaf in leaves:
        height, digest = 0, hashlib.sha256(b"\0" + leaf).digest()
        while stack and stack[-1][0] == height:
            digest = _node(stack.pop()[1], digest)
            height += 1
        stack.append((height, digest))
    if not stack:
        return hashlib.sha256().digest()
    _, root = stack.pop()
    while stack:
        root = _node(stack.pop()[1], root)
    return root


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
