"""Secrets in free text, known by the name before them: ``password=...``, ``--api-key ...``."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final

from lightning_secure.redaction.detect.secret_names import STEMS, KeyNameDetector

# A name of up to four words, perhaps in quotes, and what stands between it and its value. The
# possessive quantifiers keep a long line without any value linear.
_ASSIGNMENT: Final = re.compile(
    r"(?<![\w.\-/])(?P<name>[\w.\-/\[\]]++(?: [\w.\-/]++){0,3}?)(?P<quote>\\*+[\"'`])?\]?[ \t]*+"
    r"(?P<sign>:=|=>|==|=|:|%3[aAdD])(?P<space>[ \t]*+)"
)
# A flag begins with a letter of its own, for that is searched for fast.
_FLAG: Final = re.compile(
    r"(?P<name>-(?<![\w.\-/]-)-?[A-Za-z][\w\-]*+)(?:[\"']?,?\s++(?=[^\s-])|[\"'],(?=[\"'][^-]))"
)
_SHELL: Final = re.compile(r"(?<!\w)(?:setenv|ENV|ARG|env)[ \t]+(?P<name>[\w.]++)[ \t]++(?=\S)")
_ELEMENT: Final = re.compile(r"<(?P<name>[\w:.\-]++)(?:\s[^<>]*+)?>(?P<value>[^<]++)")
# {"name": "password", "value": "..."}, <add key="password" value="..."/>
_ENTRY: Final = re.compile(
    r"(?<!\w)(?:name|key)\\*+[\"']?[ \t]*[:=]\s*\\*+[\"']?(?P<name>[\w.\-/]++)\\*+[\"']?\s*,?\s*"
    r"(?:- )?\\*+[\"']?(?:value|val)\\*+[\"']?[ \t]*[:=][ \t]*(?=\S)",
    re.IGNORECASE,
)
_PROSE: Final = re.compile(
    r"(?<!\w)(?:pass(?:word|phrase|code)|pwd)\s+(?:is|was):?\s+(?=\S)", re.IGNORECASE
)
_NETRC: Final = re.compile(r"(?<!\w)login\s+\S+\s+password\s+(?=\S)")
_CURL: Final = re.compile(r"(?<![\w\-])(?:-u|--(?:proxy-)?user)[ =]+[\"']?[^\s:\"']+:(?=\S)")
_PARTS: Final = re.compile(r"[^a-z0-9]+")
# No name holds one of these.
_BREAKS: Final = "\n,;{}()\"'`<>=:&?|%"
_BREAK: Final = str.maketrans(dict.fromkeys(_BREAKS, "\n"))
_BREAK_BYTES: Final = bytes.maketrans(_BREAKS.encode(), b"\n" * len(_BREAKS))
# All others that are neither letters nor digits may stand within a name: se_cret.
_PARTING: Final = "".join(
    chr(i) for i in range(128) if not (chr(i).isalnum() or chr(i) in _BREAKS)
).encode()
_BEARER: Final = re.compile(r"(?<!\w)bearer\s+(?P<value>[\w.~+/=\-]{8,})", re.IGNORECASE)

_SCHEME: Final = re.compile(
    r"(?:bearer|basic|token|digest|negotiate|apikey)[ \t]+(?=\S)", re.IGNORECASE
)
_WHOLE_LINE: Final = re.compile(r"authorization$|cookies?$", re.IGNORECASE)
_LINE_START: Final = re.compile(r"[ \t]*(?:- +)?[\"']?")
_SPACE: Final = re.compile(r"\s*+")
# The space before the first item of a YAML list, or before the text of a key below it.
_ITEM: Final = re.compile(r"\s*+(?:- +)?+")
_JSON_VALUE: Final = frozenset("\"'[{")
_DEFAULT: Final = re.compile(r"[ \t]*=[ \t]*(?=\S)")
_OPENING: Final = re.compile(r"[bBrRuUfF]{0,2}(?P<quote>\\*+(?:\"\"\"|'''|[\"'`]))")
_BRACKETS: Final = re.compile(
    r"(?<!\\)\\*+\"(?:\\.|[^\"\\])*+\"|'(?:\\.|[^'\\])*+'|(?P<open>[\[({])|[\])}]"
)
_REST: Final = re.compile(r"(?!/>)[^\s,;&)\]}<>\"'`]*+")
# Up to white space, or to a comma and the like before the next name.
_WORD: Final = re.compile(
    r"(?:[^\s,;&|<]++|<(?!/)|[,;&|](?!\s*+\\*+[\"']?[\w.\-]++\\*+[\"']?\s*+[=:]))++"
)
_CLOSING: Final = ",;)]}>\"'`\\"
_LINE: Final = re.compile(r"[^\r\n]*+")

# Forms in which a value follows a name without a sign, each with the literals that it needs one
# of, in lower case: one at a time, for alternatives are searched for slowly.
_OTHERS: Final = tuple(
    (pattern, tuple(map(re.compile, needed)))
    for pattern, needed in (
        (_FLAG, ["-"]),
        (_SHELL, [r"env[ \t]", r"arg[ \t]"]),
        (_ENTRY, [r"val(?<![\w.\-/]val)(?:ue)?\\*[\"']?[ \t]*[:=]"]),
        (_PROSE, ["pass", "pwd"]),
        (_NETRC, ["login"]),
        (_ELEMENT, ["<"]),
        (_CURL, ["-u"]),
        (_BEARER, ["bearer"]),
    )
)
# They need no name of a secret.
_NAMELESS: Final = tuple(other for other in _OTHERS if other[0] in (_CURL, _BEARER))


def secret_values(text: str, names: KeyNameDetector) -> Iterator[tuple[int, int]]:
    """Yield where in ``text`` values of secrets stand, in the forms that people and tools write.

    Assignments in code, configuration, JSON and YAML (also below a key, over several lines),
    command lines, URLs, headers and XML; entries with a name and a value; ``Bearer ...``. In doubt
    the value is the longer of what it might be.

    Not found: what follows the white space in a value without quotes, unless the value has its line
    to itself; a secret under no name, or one that only prose gives away; options of one letter, as
    in ``mysql -pSECRET``.

    >>> from lightning_secure.redaction.detect.secret_names import KeyNameDetector
    >>> text = "db_password: hunter2"
    >>> [text[start:end] for start, end in secret_values(text, KeyNameDetector())]
    ['hunter2']
    """
    plain = text.lower()
    hits = _stems(text, plain)
    if hits:
        yield from _assigned(text, hits, names)
    elif "-u" not in plain and "bearer" not in plain:  # none of what _NAMELESS need
        return
    for pattern, needed in _OTHERS if hits else _NAMELESS:
        if not any(word.search(plain) for word in needed):
            continue
        position = 0
        for match in pattern.finditer(text):
            harmless = "name" in pattern.groupindex and not names.matches(match["name"])
            if harmless or match.end() < position:
                continue
            if "value" in pattern.groupindex:
                yield match.span("value")
                continue
            start, position = _single(text, match.end())
            yield start, position


def _stems(text: str, plain: str) -> Sequence[int]:
    """Return where parts of names of secrets end in ``text``; there may be too many."""
    if text.isascii():
        joined = plain.encode("ascii").translate(None, _PARTING).decode("ascii")
        stems = [stem for stem in STEMS if stem in joined]
        odd = any(joined.count(stem) > plain.count(stem) for stem in stems)
    else:
        joined = _PARTS.sub("", unicodedata.normalize("NFKC", text).lower())  # of full width
        stems = []
        odd = any(stem in joined for stem in STEMS)
    if odd:
        return range(1, len(text) + 1)  # the whole text is looked at
    hits: list[int] = []
    for stem in stems:
        at = plain.find(stem)
        while at >= 0:
            at += len(stem)
            hits.append(at)
            at = plain.find(stem, at)
    return sorted(hits)


def _assigned(text: str, hits: Sequence[int], names: KeyNameDetector) -> Iterator[tuple[int, int]]:
    """Yield the values of the assignments in whose names one of ``hits`` lies."""
    position = seen = 0
    broken = (
        text.encode("ascii").translate(_BREAK_BYTES).decode("ascii")
        if text.isascii()
        else text.translate(_BREAK)
    )
    match: re.Match[str] | None = None
    for hit in hits:
        if hit <= position or (match is not None and hit <= match.start()):
            continue
        if match is None or match.end("name") < hit:
            # A name with the hit in it begins after what no name holds. Only what lies after the
            # hit before is looked through, so that a long text takes linear time.
            cut = broken.rfind("\n", seen, hit) + 1
            seen = max(position, seen, cut)
            match = _ASSIGNMENT.search(text, seen)
            if match is None:
                return
            if hit <= match.start():
                continue
        position = match.end("sign")
        if names.matches(match["name"]):
            start, end = _value(text, match)
            if start < end:
                yield start, end
            position = max(position, end)
        match = None


def _value(text: str, match: re.Match[str]) -> tuple[int, int]:
    """Return where the value begins and ends that an assignment gives to a secret."""
    start = match.end()
    line = text.rfind("\n", 0, match.start()) + 1
    begins = _LINE_START.fullmatch(text, line, match.start()) is not None
    alone = begins and not match["quote"] and (match["sign"] == ":" or bool(match["space"]))
    if match["sign"] == ":" and text[start : start + 1] in ("", "\r", "\n", "|", ">"):
        follows = _SPACE.match(text, start)
        if match["quote"] and follows and text[follows.end() : follows.end() + 1] in _JSON_VALUE:
            return _single(text, follows.end())
        if not begins:
            return start, start
        end = _below(text, line, match.start())
        first = _ITEM.match(text, start, end)
        return (first.end() if first else start), end
    if _WHOLE_LINE.search(match["name"]):
        before = text[match.start() - 1 : match.start()]
        stop = before if before and before in "\"'`" else "\n"
        scheme = _SCHEME.match(text, start)
        start = scheme.end() if scheme else start
        if not _OPENING.match(text, start):
            ends = [at for mark in (stop, "\n") if (at := text.find(mark, start)) >= 0]
            return start, min(ends, default=len(text))
    if scheme := _SCHEME.match(text, start):
        start = scheme.end()
    start, end = _single(text, start)
    if match["sign"] == ":" and (default := _DEFAULT.match(text, end)):
        end = _single(text, default.end())[1]  # password: str = "..."
    if alone and not _OPENING.match(text, start):
        end = max(end, _below(text, line, match.start()))
    return start, end


def _single(text: str, start: int) -> tuple[int, int]:
    """Return the bounds of one value: in quotes, in brackets, or one word."""
    if opening := _OPENING.match(text, start):
        start, quote = opening.end(), opening["quote"]
        closing = re.compile(rf"(?<!\\){re.escape(quote)}").search(text, start)
        if closing is None:
            return start, len(text)  # cut off
        after = _REST.match(text, closing.end())
        joined = after is not None and after.end() > closing.end()
        return start, after.end() if joined and after else closing.start()
    if text[start : start + 1] in ("[", "(", "{"):
        depth = 0
        for bracket in _BRACKETS.finditer(text, start):
            if bracket["open"]:
                depth += 1
            elif bracket[0] in ")]}":
                depth -= 1
            if depth == 0:
                return start, bracket.end()
        return start, len(text)
    word = _WORD.match(text, start)
    end = word.end() if word else start
    while end > start and text[end - 1] in _CLOSING:
        end -= 1
    return start, end


def _below(text: str, line: int, name: int) -> int:
    """Return where the lines end that belong to a key: its own, and those that are deeper."""
    indent = name - line
    end = _end_of_line(text, name)
    deeper = re.compile(rf"\r?\n(?:[ \t]*(?=\r?\n)|[ \t]{{{indent + 1},}}|[ \t]{{{indent}}}- )")
    while match := deeper.match(text, end):
        end = _end_of_line(text, match.end())
    return end


def _end_of_line(text: str, start: int) -> int:
    match = _LINE.match(text, start)
    return match.end() if match else start
