"""Findings of the detectors in the values of one column."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lightning_secure.anonymize.pictures import has_metadata, is_picture
from lightning_secure.redaction.detect.detectors import (
    AssignmentDetector,
    PatternDetector,
    SecretDetector,
)
from lightning_secure.redaction.detect.finding import Detector, Finding
from lightning_secure.redaction.detect.obfuscated import DisguiseDetector
from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.detect.prefilter import (
    ASSIGNED,
    DISGUISED,
    PERSONAL,
    SECRET,
    screened,
)
from lightning_secure.redaction.detect.secret_names import KeyNameDetector
from lightning_secure.redaction.redactor import REDACTED, without

_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
#: No text has one of these; what has is not looked at.
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
#: No telephone, card or national number has fewer digits.
_LEAST: Final = 10**6
_MOST: Final = 10**40
_SHORT: Final = 64
_REMEMBERED: Final = 4096
#: The text itself: a subclass may say of its text what it likes.
_exact: Final = str.__str__


@dataclass
class Found:
    """Findings of the detectors in some values of a column.

    Attributes:
        inspected: How many values were looked at.
        rules: In how many of them each rule found something; never what.
    """

    inspected: int = 0
    rules: Counter[str] = field(default_factory=Counter)

    def add(self, other: Found) -> None:
        """Count what was found in further values."""
        self.inspected += other.inspected
        self.rules.update(other.rules)


class Look:
    """Looks through the values of one column, many at a time.

    Args:
        name: The column's. It counts as a word before each value, so that ``555 1234`` below
            ``phone`` is a telephone number; below the name of a secret, every value is one.
        extra_patterns: Regular expressions of the user's, see :class:`Redactor`.
        extra_rules: A file of the user's rules, see :class:`Redactor`.
    """

    def __init__(
        self, name: str, *, extra_patterns: Sequence[str] = (), extra_rules: str | None = None
    ) -> None:
        self._secret = KeyNameDetector().matches(name)
        self._before = f"{name}: "
        # Short values that need a look and hold nothing, such as dates, which come again.
        self._clean: set[str] = set()
        secrets = SecretDetector(extra_rules)
        self._personal = PersonalDataDetector()
        self._kinds: list[tuple[int, Detector]] = [(ASSIGNED, AssignmentDetector())]
        # Rules of the caller, which the screen does not know, look at every text.
        self._extra: list[Detector] = [
            PatternDetector(f"extra-{i}", pattern) for i, pattern in enumerate(extra_patterns)
        ]
        if extra_rules is None:
            self._kinds.append((SECRET, secrets))
        else:
            self._extra.append(secrets)
        every = [secrets, self._kinds[0][1], self._personal, *self._extra]
        self._kinds.append((DISGUISED, DisguiseDetector(every)))

    def inspected(self, values: Sequence[Any]) -> Found:
        """Return what is in ``values``: texts, also as bytes, pictures' bytes, whole numbers."""
        dtype = str(getattr(values, "dtype", "object"))
        if "int" in dtype or "float64" in dtype:
            host: Any = values
            numbers = np.asarray(host.detach().cpu() if hasattr(host, "cpu") else host)
            if numbers.ndim != 1:
                return Found()
            chosen = numbers[(numbers >= _LEAST) | (numbers <= -_LEAST)].tolist()
            return Found(len(values), self._texts([_text_of(number) or "" for number in chosen])[1])
        if "float" in dtype or "bool" in dtype:
            return Found()
        pictures = [value for value in values if isinstance(value, bytes) and is_picture(value)]
        texts = [text for value in values if (text := _text_of(value)) is not None]
        found = Found(len(texts), self._texts(texts)[1]) if any(texts) else Found()
        marked = sum(map(has_metadata, pictures))
        found.add(Found(len(pictures), Counter({"image-metadata": marked} if marked else {})))
        return found

    def redacted(self, values: Sequence[str]) -> tuple[list[str], Found]:
        """Return texts without what is found in them, and what that was."""
        texts = list(map(_exact, values))
        changed, rules = self._texts(texts)
        return [changed.get(i, text) for i, text in enumerate(texts)], Found(len(texts), rules)

    def _texts(self, values: Sequence[str]) -> tuple[Mapping[int, str], Counter[str]]:
        """Return the changed ones by position, and how many each rule found something in."""
        taken: list[str] = []
        changed: dict[int, str] = {}
        if self._secret:
            changed = {i: REDACTED for i, text in enumerate(values) if text}
            return changed, Counter({"secret-name": len(changed)} if changed else {})
        screen: Mapping[int, int] = screened(values)
        if self._extra:
            screen = {i: screen.get(i, 0) for i in range(len(values))}
        for i, kinds in screen.items():
            text = values[i]
            if text in self._clean:
                continue
            if not text.isascii() and _SURROGATE.search(text):
                changed[i] = REDACTED
                taken.append("encoding-failed")
                continue
            try:
                found = self._find(text, kinds)
            except Exception:  # noqa: BLE001 # whatever it is, the text was not checked
                changed[i] = REDACTED
                taken.append("detector-failed")
                continue
            if found:
                changed[i], rules = without(text, found)
                taken += set(rules)
            elif len(text) <= _SHORT and len(self._clean) < _REMEMBERED:
                self._clean.add(text)
        return changed, Counter(taken)

    def _find(self, text: str, kinds: int) -> list[Finding]:
        found = [f for kind, detector in self._kinds if kinds & kind for f in detector.find(text)]
        found += [f for detector in self._extra for f in detector.find(text)]
        if kinds & PERSONAL:
            cut = len(self._before)
            found += [
                Finding(rule, max(0, start - cut), end - cut)
                for rule, start, end in self._personal.find(self._before + text)
                if end > cut
            ]
        return found


def _text_of(value: Any) -> str | None:
    """Return a value as text, nothing of a short number, and None of what is neither."""
    if isinstance(value, str):
        return _exact(value)
    if isinstance(value, bytes):
        return None if _CONTROL.search(value) else _decoded(value)
    if isinstance(value, float | np.floating) and value.is_integer():  # as pandas has numbers
        value = int(value)
    # To numpy, a time that passed is an integer.
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)
    return str(value) if whole and _LEAST <= abs(value) < _MOST else ""


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
