"""Detectors of secrets and personal data.

Secrets are known by their format (the regular expressions of detect-secrets, without its entropy
guesses, and what issuers document) or by the name before them; personal data by its form and its
check digits. Names, places and free text are not found, and no pattern can find them: declare such
columns, or keep them out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lightning_secure.redaction.detect.assignments import secret_values
from lightning_secure.redaction.detect.finding import Finding
from lightning_secure.redaction.detect.secret_formats import RuleSet, built_in_rules, read_rules
from lightning_secure.redaction.detect.secret_names import KeyNameDetector


class PatternDetector:
    """Finds what matches a regular expression of the user's.

    Args:
        rule: Name of the rule.
        pattern: The expression, in Python's syntax. Its first group is what is found, or all of it
            without a group. How long it takes is the user's to know; rules in a file, as
            :class:`SecretDetector` takes them, cannot take more than linear time.

    >>> detector = PatternDetector("record-number", "MRN-([0-9]+)")
    >>> list(detector.find("patient MRN-20394"))
    [Finding(rule='record-number', start=12, end=17)]
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
    """Finds secrets by their format: cloud keys, tokens, private keys, credentials in URLs.

    Args:
        extra_rules: A file of further rules in the format of gitleaks.

    Raises:
        ConfigError: if the file cannot be read, or holds a rule that could take more than linear
            time.

    >>> [f.rule for f in SecretDetector().find("postgresql://jo:pw@db, AKIAIOSFODNN7EXAMPLE")]
    ['url-credentials', 'aws-access-key']
    """

    # Everything between :// and the last @ before the path: passwords may hold @ and :.
    _URL: Final = PatternDetector("url-credentials", r"://([^/\s?#'\"]+)@")

    # To its end: what stands between the lines is the key. Or to the text's, if it was cut.
    _PEM: Final = PatternDetector(
        "private-key", r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY.*?(?:-----END [A-Z ]*-----|\Z)"
    )

    def __init__(self, extra_rules: str | Path | None = None) -> None:
        self._rules = built_in_rules()
        self._extra = None if extra_rules is None else RuleSet(read_rules(extra_rules))

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what has the format of a secret, whole."""
        if "://" in text and "@" in text:
            yield from self._URL.find(text)
        if "-----BEGIN" in text:
            yield from self._PEM.find(text)
        yield from self._rules.find(text)
        if self._extra is not None:
            yield from self._extra.find(text)


class AssignmentDetector:
    """Finds values that stand after the name of a secret: ``password=...``, ``--api-key ...``.

    >>> text = "password=hunter2"
    >>> [text[found.start : found.end] for found in AssignmentDetector().find(text)]
    ['hunter2']
    """

    def __init__(self) -> None:
        self._names = KeyNameDetector()

    def find(self, text: str) -> Iterator[Finding]:
        """Yield the values, without their names."""
        for start, end in secret_values(text, self._names):
            yield Finding("secret-assigned", start, end)
