"""Secrets and personal data in another spelling: look-alike letters, HTML, URLs, base64, hex.

What was found is taken out of the text as it was given, whatever it was spelt in.
"""

from __future__ import annotations

import binascii
import html
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Final

from lightning_secure.redaction.detect.finding import Detector, Finding

# Cyrillic and Greek letters that look like Latin ones, and a full stop: of Unicode's confusables
# (UTS 39) those that fonts do not tell apart.
_ALIKE: Final = dict(
    zip(
        "АВЕЅІЈКМНОРСТХУаеѕіјкорсхуһԁԛԝ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧοναιρυχκ" + "ıɑɡ。",  # noqa: RUF001
        "ABESIJKMHOPCTXYaesijkopcxyhdqw" + "ABEZHIKMNOPTYXovaipuxk" + "iag.",
        strict=True,
    )
)
# Shown as nothing: joiners, soft hyphens, direction marks, variation selectors, combining marks.
_NOTHING: Final = ("Cf", "Mn", "Me")

_ENTITY: Final = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,31});")
_PERCENT: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
# Base64's letters, of either alphabet, and everything else.
_KINDS: Final = bytes(
    b" x"[chr(code).isalnum() or chr(code) in "+/-_"] for code in range(128)
).ljust(256)
# Twelve bytes at least, for no rule finds anything in less.
_WORD: Final = b"x" * 16
_HEX: Final = re.compile(rb"(?:[0-9a-f]{2}){8,}|(?:[0-9A-F]{2}){8,}")
#: In RE2's syntax: of an ASCII text without a match of one of these there is no other spelling.
SPELLINGS: Final = ("&[#A-Za-z]", "%[0-9A-Fa-f]{2}", "[A-Za-z0-9+/_-]{16}")
# At least what decodes to characters that are shown; most words end here, at their second byte.
_UTF8: Final = re.compile(
    rb"(?:[\t\n\r -~]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3})*+"
)
# First letters of base64 whose first byte is none that a character begins with.
_INSIDE: Final = b"ghijklmnopqrstuv"
_TO_STANDARD: Final = bytes.maketrans(b"-_", b"+/")


@cache
def _letters() -> dict[int, str]:
    """Return what each character that looks like ASCII, or like nothing, is read as."""
    table = {ord(letter): latin for letter, latin in _ALIKE.items()}
    # Up to the mathematical letters, and the tags that nothing shows.
    for code in (*range(128, 0x20000), *range(0xE0000, 0xE1000)):
        if unicodedata.category(chr(code)) in _NOTHING:
            table[code] = ""
        elif (plain := unicodedata.normalize("NFKC", chr(code))) != chr(code) and plain.isascii():
            table[code] = plain
    return table


def folded(text: str) -> str:
    r"""Return a text with every character that only looks like another one exchanged for that.

    >>> folded("p\u0430ss\u200bword"), folded("\uff41pi")
    ('password', 'api')
    """
    return text if text.isascii() else text.translate(_letters())


def looks_alike(text: str) -> bool:
    r"""Return whether a character in ``text`` only looks like another one, or like nothing.

    >>> looks_alike("password"), looks_alike("p\u0430ssword")
    (False, True)
    """
    return not (text.isascii() or _letters().keys().isdisjoint(map(ord, set(text))))


class DisguiseDetector:
    """Finds what other detectors find once a text is read as it was meant.

    Args:
        detectors: Those others.

    Read are look-alike letters (full-width, Cyrillic, Greek, with invisible characters between
    them), HTML's entities, percent-encoding, base64 in both alphabets and hexadecimal; one step
    deep, percent signs in base64 and the like are not. Of base64 and hexadecimal, all of the word
    is found.
    """

    def __init__(self, detectors: Sequence[Detector]) -> None:
        self._detectors = tuple(detectors)

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what is found, at its place in ``text``."""
        if looks_alike(text):
            table = _letters()
            yield from self._respelt(
                text, [(n, n + 1, table[ord(c)]) for n, c in enumerate(text) if ord(c) in table]
            )
        if "&" in text:
            yield from self._respelt(
                text, [(m.start(), m.end(), html.unescape(m[0])) for m in _ENTITY.finditer(text)]
            )
        if "%" in text:
            yield from self._respelt(
                text, [(m.start(), m.end(), _unquoted(m[0])) for m in _PERCENT.finditer(text)]
            )
        if len(text) >= len(_WORD):
            data = text.encode("ascii", "replace")  # a byte for each character
            for start, word in _words(data):
                for plain in (_from_base64(word), _from_hex(word)):
                    if plain and (rule := self._rule(plain)):
                        yield Finding(rule, start, start + len(word))

    def _rule(self, text: str) -> str | None:
        return next((f.rule for detector in self._detectors for f in detector.find(text)), None)

    def _respelt(self, text: str, spellings: list[tuple[int, int, str]]) -> Iterator[Finding]:
        """Look into a text in which parts are spelt otherwise: from, to, as what."""
        if not spellings:
            return
        pieces: list[str] = []
        starts: list[int] = []  # of each piece in what is looked into
        places: list[tuple[int, int, bool]] = []  # in the text, and whether it is respelt
        position = length = 0
        for start, end, plain in [*spellings, (len(text), len(text), "")]:
            for piece, place in (
                (text[position:start], (position, start, False)),
                (plain, (start, end, True)),
            ):
                if piece:
                    pieces.append(piece)
                    starts.append(length)
                    places.append(place)
                    length += len(piece)
            position = end
        for detector in self._detectors:
            for rule, first, last in detector.find("".join(pieces)):
                one, other = bisect_right(starts, first) - 1, bisect_right(starts, last - 1) - 1
                start, _, respelt = places[one]
                begin = start if respelt else start + first - starts[one]
                start, end, respelt = places[other]
                yield Finding(rule, begin, end if respelt else start + last - starts[other])


def _unquoted(run: str) -> str:
    return bytes.fromhex(run.replace("%", "")).decode(errors="replace")


def _words(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the words that are long enough to be looked at, and where they begin."""
    # Three times as fast as a regular expression: most letters are leapt over.
    kinds = data.translate(_KINDS) + b" "
    start = kinds.find(_WORD)
    while start >= 0:
        end = kinds.find(b" ", start)
        yield start, data[start:end]
        start = kinds.find(_WORD, end)


def _from_base64(word: bytes) -> str | None:
    if word[0] in _INSIDE and word.islower():  # a zero has one of A, B, C and D in its letters
        return None
    digits = word[: len(word) - (len(word) % 4 == 1)]
    return _readable(binascii.a2b_base64(digits.translate(_TO_STANDARD) + b"=="))


def _from_hex(word: bytes) -> str | None:
    return _readable(binascii.a2b_hex(word)) if word.isalnum() and _HEX.fullmatch(word) else None


def _readable(data: bytes) -> str | None:
    wide = b"\0" in data
    if not (wide or _UTF8.fullmatch(data)):
        return None
    try:
        text = data.decode("utf-16-le" if wide else "utf-8")
    except UnicodeDecodeError:
        return None
    return text if all(c.isprintable() or c in "\t\r\n" for c in text) else None
