"""What looks like a secret or like personal data.

Secrets are known by their format (the regular expressions of detect-secrets, without its entropy
guesses) or by the name before them. Of personal data, e-mail addresses are found;
names, places and free text are not, and no pattern can find them: declare such columns, or keep
them out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Final, NamedTuple, Protocol

from lightning_secure.redaction.assignments import secret_values
from lightning_secure.redaction.names import KeyNameDetector

__all__ = [
    "AssignmentDetector",
    "Detector",
    "Finding",
    "KeyNameDetector",
    "PatternDetector",
    "PersonalDataDetector",
    "SecretDetector",
]


class Finding(NamedTuple):
    """A part of a text that should not be shown.

    Attributes:
        rule: What was recognised.
        start: Where it begins, in characters.
        end: Where it ends.
    """

    rule: str
    start: int
    end: int


class Detector(Protocol):
    """Finds parts of texts."""

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what is found in ``text``, in any order; findings may overlap."""


class PatternDetector:
    """Finds what matches a regular expression of the user's.

    Args:
        rule: Name of the rule.
        pattern: The expression. Its first group is what is found, or all of it without a group.
    """

    def __init__(self, rule: str, pattern: str | re.Pattern[str]) -> None:
        self._rule = rule
        self._pattern = re.compile(pattern)

    def find(self, text: str) -> Iterator[Finding]:
        """Yield every match."""
        group = min(1, self._pattern.groups)
        for match in self._pattern.finditer(text):
            if match.group(group) is not None:
                yield Finding(self._rule, *match.span(group))


class SecretDetector:
    """Finds secrets by their format: cloud keys, tokens, private keys, credentials in URLs."""

    # Everything between :// and the last @ before the path: passwords may hold @ and :.
    _URL: Final = PatternDetector("url-credentials", r"://([^/\s?#'\"]+)@")

    # To its end: what stands between the lines is the key. Or to the text's, if it was cut.
    _PEM: Final = PatternDetector(
        "private-key", r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*-----|\Z)"
    )

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what has the format of a secret, whole."""
        yield from self._URL.find(text)
        yield from self._PEM.find(text)
        for rule, pattern in _secret_patterns():
            for match in pattern.finditer(text):
                yield Finding(rule, *match.span())


@cache
def _secret_patterns() -> list[tuple[str, re.Pattern[str]]]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.basic_auth import BasicAuthDetector
    from detect_secrets.plugins.ip_public import IPPublicDetector

    # Its basic-auth rule finds less than the one above, and version numbers look like addresses.
    left_out = (BasicAuthDetector, IPPublicDetector)
    patterns = []
    kinds: list[type] = list(get_mapping_from_secret_type_to_class().values())
    for kind in kinds:
        if issubclass(kind, RegexBasedDetector) and not issubclass(kind, left_out):
            plugin = kind()
            rule = plugin.secret_type.lower().replace(" ", "-")
            patterns += [(rule, re.compile(pattern)) for pattern in plugin.denylist]
    return patterns


class PersonalDataDetector:
    """Finds e-mail addresses."""

    # The characters of RFC 5321's local part that people use; bounded, so that a long line without
    # an address takes linear time.
    _EMAIL: Final = PatternDetector(
        "e-mail",
        r"(?<![\w.+%'-])([\w.+%'-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24})(?![\w-])",
    )

    def find(self, text: str) -> Iterator[Finding]:
        """Yield the addresses."""
        yield from self._EMAIL.find(text)


class AssignmentDetector:
    """Finds values that stand after the name of a secret: ``password=...``, ``--api-key ...``."""

    def __init__(self) -> None:
        self._names = KeyNameDetector()

    def find(self, text: str) -> Iterator[Finding]:
        """Yield the values, without their names."""
        for start, end in secret_values(text, self._names):
            yield Finding("secret-assigned", start, end)
