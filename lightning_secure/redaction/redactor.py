"""Taking out what the detectors find."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lightning_secure.errors import RedactionError
from lightning_secure.redaction.detectors import (
    Detector,
    KeyNameDetector,
    PatternDetector,
    PersonalDataDetector,
    SecretDetector,
)

__all__ = ["REDACTED", "Redactor"]

log = logging.getLogger(__name__)

#: Stands in place of what was taken out; MLflow accepts it in names too.
REDACTED: Final = "REDACTED"
_MAX_DEPTH: Final = 32
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


class Redactor:
    """Replaces secrets and personal data by ``REDACTED``.

    Args:
        extra_patterns: Regular expressions of your own. The first group is taken out, or the whole
            match if there is none.
        strict: Whether a detector that fails raises. Otherwise what it was looking at is dropped.

    Attributes:
        counts: How often each rule took something out.

    >>> redactor = Redactor()
    >>> redactor.redact({"url": "postgresql://jo:pw@db/x", "opt": {"api_key": "k", "lr": 0.1}})
    {'url': 'postgresql://REDACTED@db/x', 'opt': {'api_key': 'REDACTED', 'lr': 0.1}}
    """

    def __init__(
        self, *, extra_patterns: Sequence[str | re.Pattern[str]] = (), strict: bool = False
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._strict = strict
        self._names = KeyNameDetector()
        self._detectors: list[Detector] = [
            SecretDetector(),
            PersonalDataDetector(),
            *(PatternDetector(f"extra-{i}", pattern) for i, pattern in enumerate(extra_patterns)),
        ]

    def redact(self, value: Any, *, name: str = "", _depth: int = 0) -> Any:
        """Return ``value`` without secrets and personal data.

        Args:
            value: Text, numbers, and mappings and sequences of them. Anything else becomes text.
            name: Under which the value stands, for example ``optimizer/api_key``.

        Raises:
            RedactionError: A detector failed and the redactor is strict.
        """
        if value is None or isinstance(value, bool):
            return value
        if name and self._names.matches(name):
            self.counts["secret-name"] += 1
            return REDACTED
        if isinstance(value, int | float):
            return value
        if isinstance(value, str):
            return self.redact_text(value)
        if _depth == _MAX_DEPTH:
            return self._dropped("nesting")
        if isinstance(value, Mapping):
            clean: dict[str, Any] = {}
            for key, item in value.items():
                label = shown = self.redact_text(str(key))
                number = 2
                while shown in clean:  # two names that differed only in what was taken out
                    shown, number = f"{label}_{number}", number + 1
                clean[shown] = self.redact(item, name=str(key), _depth=_depth + 1)
            return clean
        if isinstance(value, list | tuple | set | frozenset):
            # The name belongs to each item as much as to all of them.
            return [self.redact(item, name=name, _depth=_depth + 1) for item in value]
        try:
            text = str(value)
        except Exception:  # noqa: BLE001 # a foreign __str__ may raise anything
            text = None
        return self._dropped("text-form") if text is None else self.redact_text(text)

    def redact_text(self, text: str) -> str:
        """Return ``text`` with every finding replaced.

        Raises:
            RedactionError: A detector failed and the redactor is strict.
        """
        if _SURROGATE.search(text):
            # No store can hold it, and the error of trying carries the text along.
            return self._dropped("encoding")
        try:
            found = [finding for detector in self._detectors for finding in detector.find(text)]
        except Exception:  # noqa: BLE001 # whatever it is, the text was not checked
            found = None
        if found is None:
            return self._dropped("detector")
        pieces, position = [], 0
        for rule, start, end in sorted(found, key=lambda finding: (finding.start, -finding.end)):
            if start < position and end <= position:
                continue
            if start >= position:
                pieces += [text[position:start], REDACTED]
                self.counts[rule] += 1
            position = end
        return "".join([*pieces, text[position:]])

    def _dropped(self, what: str) -> str:
        """Return what stands for a value that could not be checked."""
        # Never the error: it may repeat what it stumbled over.
        if self._strict:
            raise RedactionError(
                f"a value could not be checked for secrets and personal data ({what} failed), so "
                "it was not released."
            )
        self.counts[f"{what}-failed"] += 1
        log.warning("a value could not be checked (%s failed) and was dropped", what)
        return REDACTED
