"""Secrets that were cut in two, each half under a name of its own."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from lightning_secure.redaction.detect.secret_formats import built_in_rules

# Longer than the secrets whose format is known, but for private keys, which have lines.
_WINDOW = 256


def halves(texts: Sequence[str]) -> dict[int, str]:
    """Return which of several texts are halves of a secret, and of what: positions and rules.

    Args:
        texts: Values that are stored together, in their order, without what is found in each alone.

    Each is joined with the next one; only secrets with a format are looked for. Numbers and words
    that happen to follow each other would make too many telephone numbers and addresses.

    >>> halves(["adam", "AKIA0001QZXC", "VBNMASDF", "0.1"])
    {1: 'aws-access-key', 2: 'aws-access-key'}
    """
    pieces: list[str] = []
    starts: list[int] = []
    joints: list[int] = []
    length = 0
    for left, right in itertools.pairwise(texts):
        one, other = left[-_WINDOW:], right[:_WINDOW]
        starts.append(length)
        joints.append(length + len(one))
        pieces += (one, other, "\n")
        length += len(one) + len(other) + 1
    found: dict[int, str] = {}
    for rule, start, end in built_in_rules().find("".join(pieces)):
        number = bisect_right(starts, start) - 1
        if start < joints[number] < end:
            found.setdefault(number, rule)
            found.setdefault(number + 1, rule)
    return found
