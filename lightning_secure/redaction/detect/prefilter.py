"""A prefilter over many texts: one pass finds the few that detectors must inspect.

The detectors look at one text after another, and most of their time goes into texts in which there
is nothing. Here RE2 goes once through all texts, joined, with expressions that match at least
wherever a detector finds something; the detectors then look at those texts only, each kind at its
own. A test holds that no finding is lost.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_secure.redaction.detect.obfuscated import SPELLINGS, looks_alike
from lightning_secure.redaction.detect.personal_data import LOOKS
from lightning_secure.redaction.detect.secret_formats import built_in_rules
from lightning_secure.redaction.detect.secret_names import STEMS

#: Contents that a text may have, as bits: personal data, the format of a secret, a value after its
#: name, or one of these in another spelling.
PERSONAL: Final = 1
SECRET: Final = 2
ASSIGNED: Final = 4
DISGUISED: Final = 8

# Between texts. The rules take a line's end for a text's; none of them takes the mark.
_MARK: Final = "\x1e"
_BETWEEN: Final = f"\n{_MARK}\n"

#: Below this number of bytes, a scan takes less time than threads take to begin.
_LARGE: Final = 2**17

# Letters of a name may have anything between them but letters and digits (se_cret).
_GAP: Final = r"[^a-z0-9\x1e]*"
_STEM: Final = "(?:" + "|".join(_GAP.join(stem) for stem in STEMS) + ")"
#: At least what `secret_values` finds, form by form, as it names them.
_ASSIGNMENTS: Final = "(?i:" + "|".join((
    # A sign behind the name.
    _STEM + r"""[^\x1e\n,;{}()"'`<>=:&?|%]*[\\"'`\] \t]*(?:[:=>]|%3)""",
    # _FLAG, _SHELL, _ENTRY and _ELEMENT: something before it.
    r"[^\w./-]-[^\s\x1e]*" + _STEM,
    r"(?:env|arg)[ \t]+[^\s\x1e]*" + _STEM,
    r"[:=][^\w\x1e]*[^\s\x1e]*" + _STEM,
    r"<[^\x1e<>]*" + _STEM,
    # _PROSE, _NETRC, _CURL and _BEARER; what is space there may be none to RE2.
    r"(?:pass(?:word|phrase|code)|pwd)[^\w\x1e]+(?:is|was)",
    r"login[^\w\x1e][^\x1e]*password",
    r"(?:-u|user)[ =]+[^\s\x1e]+:",
    r"bearer[^\w\x1e]",
)) + ")"  # fmt: skip
_ADDRESSES: Final = r"://[^/\s?#'\"]+@|-----BEGIN [A-Z ]*PRIVATE KEY"


def screened(texts: Sequence[str]) -> dict[int, int]:
    """Return which of ``texts`` may hold something, by position, with bits that say what.

    Guarantees:
        A text that is not named, or without a bit, holds nothing of that kind for the detectors
        with their own rules. A text with half of a surrogate pair is named. Time is linear in the
        length of all texts together.
    """
    if not texts:
        return {}
    texts = list(texts)
    found: dict[int, int] = {}
    data, marks = _joined(texts)
    if len(marks) != len(texts) + 1:
        for position, text in enumerate(texts):
            if _MARK in text:
                found[position] = PERSONAL | SECRET | ASSIGNED | DISGUISED
                texts[position] = ""
        data, marks = _joined(texts)
    letters = b"" if data.isascii() else data.translate(None, bytes(range(0x80)))
    characters = "".join(set(letters.decode("utf-8", "surrogatepass")))
    others = ((ASSIGNED, _odd().search), (DISGUISED, looks_alike)) if characters else ()
    for kind, seen in others:
        if seen(characters):
            for position, text in enumerate(texts):
                if not text.isascii() and seen(text):
                    found[position] = found.get(position, 0) | kind
    kinds, patterns = zip(*_patterns(), strict=True)
    for kind, spans in zip(kinds, _every_span(patterns, data), strict=True):
        # A match may begin in one text and end in the next, and hide what begins there.
        for first, last in np.searchsorted(marks, spans).tolist() if spans else ():
            for position in range(max(0, first - 1), min(len(texts), last)):
                found[position] = found.get(position, 0) | kind
    return found


def _joined(texts: Sequence[str]) -> tuple[bytes, npt.NDArray[np.intp]]:
    """Return the texts as one, and where the marks around each are."""
    data = _BETWEEN.join(["", *texts, ""]).encode("utf-8", "surrogatepass")
    return data, np.flatnonzero(np.frombuffer(data, np.uint8) == ord(_MARK))


def _every_span(patterns: Sequence[Any], data: bytes) -> list[list[tuple[int, int]]]:
    if len(data) < _LARGE:
        return [_spans(pattern, data) for pattern in patterns]
    # RE2 lets go of Python's lock.
    with ThreadPoolExecutor(len(patterns), "lsec-screen") as threads:
        return list(threads.map(_spans, patterns, itertools.repeat(data)))


def _spans(pattern: Any, data: bytes) -> list[tuple[int, int]]:
    """Return where ``pattern`` matches, once at least in each text in which it does."""
    spans, position, mark = [], 0, _MARK.encode()
    while position >= 0 and (match := pattern.search(data, position)):
        spans.append(match.span())
        position = data.find(mark, match.end())
    return spans


@cache
def _patterns() -> tuple[tuple[int, Any], ...]:
    # One expression for all kinds would need more states than RE2 has memory for.
    return (
        (PERSONAL, _compiled(["@", *LOOKS])),
        (SECRET, _compiled([_ADDRESSES, *built_in_rules().expressions])),
        (ASSIGNED, _compiled([_ASSIGNMENTS])),
        (DISGUISED, _compiled(SPELLINGS)),
    )


def _compiled(patterns: Iterable[str]) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False  # a text that needs too many states is looked through more slowly
    options.never_capture = True  # where a match lies is enough, and found much faster
    options.max_mem = 64 * 2**20
    return re2.compile("|".join(f"(?:{pattern})" for pattern in patterns).encode(), options)


@cache
def _odd() -> re.Pattern[str]:
    """Return what matches a character that may become ASCII, as the ligature of f and i does."""
    # Nothing but the characters that are known to stay what they are.
    blocks = (range(0x80, 0xD800), range(0xE000, 0x10000), range(0x1F300, 0x1FB00))
    ranges: list[list[int]] = [[0, 0x7F]]
    for code in itertools.chain(*blocks):
        letter = chr(code)
        if unicodedata.category(letter)[0] == "M" or _ASCII.search(
            unicodedata.normalize("NFKC", letter).lower()
        ):
            continue
        if ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    plain = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
    return re.compile(f"[^{plain}]")


_ASCII: Final = re.compile("[a-z0-9]")
