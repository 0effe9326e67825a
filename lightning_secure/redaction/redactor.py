"""Taking out what the detectors find."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning_secure.errors import RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.containers import fields_of, items_of
from lightning_secure.redaction.detect.detectors import (
    AssignmentDetector,
    PatternDetector,
    SecretDetector,
)
from lightning_secure.redaction.detect.finding import Detector, Finding
from lightning_secure.redaction.detect.obfuscated import DisguiseDetector
from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.detect.secret_names import KeyNameDetector

log = logging.getLogger(__name__)

#: Stands in place of what was taken out; MLflow accepts it in names too.
REDACTED: Final = "REDACTED"
_MAX_DEPTH: Final = 32
_SHORT: Final = 64
_REMEMBERED: Final = 4096
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")


class Redactor:
    """Replaces secrets and personal data by ``REDACTED``.

    Args:
        extra_patterns: Regular expressions of your own. The first group is taken out, or the whole
            match if there is none.
        extra_rules: A file of rules of your own in the format of gitleaks (TOML).
        strict: Whether a detector that fails raises. Otherwise what it was looking at is dropped.

    Attributes:
        counts: How often each rule took something out, by the rule's name; never what it was.

    Raises:
        ConfigError: if the file of rules cannot be used.

    >>> redactor = Redactor()
    >>> redactor.redact({"url": "postgresql://jo:pw@db/x", "opt": {"api_key": "k", "lr": 0.1}})
    {'url': 'postgresql://REDACTED@db/x', 'opt': {'api_key': 'REDACTED', 'lr': 0.1}}
    """

    def __init__(
        self,
        *,
        extra_patterns: Sequence[str | re.Pattern[str]] = (),
        extra_rules: str | Path | None = None,
        strict: bool = False,
    ) -> None:
        self.counts: Counter[str] = Counter()
        # Short texts in which nothing was found, such as the names of metrics at every step.
        self._clean: set[str] = set()
        self._strict = strict
        self._names = KeyNameDetector()
        detectors: list[Detector] = [
            SecretDetector(extra_rules),
            AssignmentDetector(),
            PersonalDataDetector(),
            *(PatternDetector(f"extra-{i}", pattern) for i, pattern in enumerate(extra_patterns)),
        ]
        self._detectors: list[Detector] = [*detectors, DisguiseDetector(detectors)]

    def redact(self, value: Any, *, name: str = "", _depth: int = 0) -> Any:
        """Return ``value`` without secrets and personal data.

        Args:
            value: Text, numbers, and mappings and sequences of them, also as dataclasses,
                namespaces, named tuples, OmegaConf, attrs or pydantic. Anything else becomes text.
            name: Under which the value stands, for example ``optimizer/api_key``.

        Raises:
            RedactionError: if a detector failed and the redactor is strict.

        >>> Redactor().redact("jo@clinic.example"), Redactor().redact("k", name="api_key")
        ('REDACTED', 'REDACTED')
        """
        if value is None or isinstance(value, bool):
            return value
        if name and self._names.matches(name):
            return self._taken_out(value)
        if isinstance(value, int | float):
            return value
        if isinstance(value, str):
            return self.redact_text(value)
        if _depth == _MAX_DEPTH:
            return self._dropped("nesting")
        try:
            fields, items = fields_of(value), items_of(value)
            text = str(value) if fields is None and items is None else ""
        except Exception:  # noqa: BLE001 # a foreign __str__ or mapping may raise anything
            text = None
        if text is None:
            return self._dropped("text-form")
        if fields is not None:
            return self._mapping(fields, name, _depth + 1)
        if items is not None:
            return self._sequence(items, name, _depth + 1)
        return self.redact_text(text)

    def _mapping(self, fields: Mapping[str, Any], name: str, depth: int) -> dict[str, Any]:
        # {"name": "DB_PASSWORD", "value": ...}, as containers and forms have it.
        labels = {key: item for key, item in fields.items() if key.lower() in ("name", "key")}
        entry = any(isinstance(x, str) and self._names.matches(x) for x in labels.values())
        clean: dict[str, Any] = {}
        for key, item in fields.items():
            label = shown = self.redact_text(key)
            number = 2
            while shown in clean:  # two names that differed only in what was taken out
                shown, number = f"{label}_{number}", number + 1
            if entry and key not in labels and item is not None and not isinstance(item, bool):
                clean[shown] = self._taken_out(item)
            else:
                path = f"{name}/{key}" if name else key
                clean[shown] = self.redact(item, name=path, _depth=depth)
        return clean

    def _sequence(self, items: Sequence[Any], name: str, depth: int) -> list[Any]:
        clean: list[Any] = []
        for number, item in enumerate(items):
            before = items[number - 1] if number else None
            # ("password", ...) as a dict's items, and ["--password", ...] as a command line.
            if (
                isinstance(before, str)
                and (len(items) == 2 or (before.startswith("-") and "=" not in before))
                and self._names.matches(before)
                and not (item is None or isinstance(item, bool) or str(item).startswith("--"))
            ):
                clean.append(self._taken_out(item))
            else:
                # The name belongs to each item as much as to all of them.
                clean.append(self.redact(item, name=name, _depth=depth))
        return clean

    def _taken_out(self, value: Any) -> str:
        if not (isinstance(value, str) and value == REDACTED):  # as another one has left it
            self._count("secret-name")
        return REDACTED

    def _count(self, rule: str) -> None:
        self.counts[rule] += 1
        finding_counts.count(rule)

    def remembers(self, texts: Collection[Any]) -> bool:
        """Return whether all ``texts`` are texts that were seen before, with nothing found in them.

        If not, nothing is known of them: long ones are never remembered, and not all short ones.
        """
        # Those of a subclass could say that they equal another text.
        return {str}.issuperset(map(type, texts)) and self._clean.issuperset(texts)

    def redact_text(self, text: str) -> str:
        """Return ``text`` with every finding replaced.

        Raises:
            RedactionError: if a detector failed and the redactor is strict.

        >>> redactor = Redactor(extra_patterns=[r"MRN-([0-9]+)"])
        >>> redactor.redact_text("patient MRN-20394, left ear")
        'patient MRN-REDACTED, left ear'
        """
        if type(text) is not str:
            text = str.__str__(text)  # a subclass may say of its text what it likes
        if text in self._clean:
            return text
        if not text.isascii() and _SURROGATE.search(text):
            # No store can hold it, and the error of trying carries the text along.
            return self._dropped("encoding")
        try:
            found = [finding for detector in self._detectors for finding in detector.find(text)]
        except Exception:  # noqa: BLE001 # whatever it is, the text was not checked
            found = None
        if found is None:
            return self._dropped("detector")
        if not found:
            if len(text) <= _SHORT:
                if len(self._clean) >= _REMEMBERED:
                    self._clean.clear()
                self._clean.add(text)
            return text
        clean, taken = without(text, found)
        for rule in taken:
            self._count(rule)
        return clean

    def _dropped(self, what: str) -> str:
        """Return what stands for a value that could not be checked."""
        # Never the error: it may repeat what it stumbled over.
        self._count(f"{what}-failed")
        if self._strict or finding_counts.strict():
            raise RedactionError(
                f"a value could not be checked for secrets and personal data ({what} failed), so "
                "it was not released."
            )
        log.warning("a value could not be checked (%s failed) and was dropped", what)
        return REDACTED


def without(text: str, findings: Iterable[Finding]) -> tuple[str, list[str]]:
    """Return ``text`` with every finding replaced, and the rules that each replacement is due to.

    Of findings that overlap, all is taken out and the one that begins first counts.

    >>> without("left ear of jo", [Finding("name", 12, 14)])
    ('left ear of REDACTED', ['name'])
    """
    pieces, position, rules = [], 0, []
    for rule, start, end in sorted(findings, key=lambda finding: (finding.start, -finding.end)):
        if (start < position and end <= position) or text[start:end] == REDACTED:
            continue
        if start >= position:
            pieces += [text[position:start], REDACTED]
            rules.append(rule)
        position = end
    return "".join([*pieces, text[position:]]), rules
