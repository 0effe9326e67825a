"""Files of rows in which a column's name stands once, at its head: CSV and its kin."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Final

from lightning_secure.redaction.detect.secret_names import KeyNameDetector

#: Suffixes of such files, with the delimiters that may stand between their cells.
DELIMITED: Final = {".csv": ",;\t|", ".tsv": "\t"}
_NAMES: Final = KeyNameDetector()


def by_columns(text: str, *, between: str, redact: Callable[[str, str], str]) -> str:
    r"""Return rows with the columns redacted whose names are those of secrets.

    Args:
        text: The rows. The first one has the names.
        between: Possible delimiters; the most frequent one of the first line is taken.
        redact: Is given a cell and the name of its column, and returns the cell redacted.

    >>> by_columns("who;password\njo;hunter2\n", between=",;", redact=lambda cell, name: "-")
    'who;password\njo;-\n'
    """
    head = io.StringIO(text, newline="").readline()
    sign = max(between, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    secret: dict[int, str] = {}
    try:
        names = next(reader, [])
        secret = {place: name for place, name in enumerate(names) if _NAMES.matches(name)}
        rows = [names, *reader] if secret else []
    except csv.Error:  # a cell of more than 128 KiB, among others
        rows = []
    if not secret:
        return text
    if not rows:  # such a column is there, and nothing shows where
        return head + redact(text[len(head) :], next(iter(secret.values())))
    for row in rows[1:]:
        for place, name in secret.items():
            if place < len(row) and row[place]:
                row[place] = redact(row[place], name)
    clean = io.StringIO(newline="")
    csv.writer(clean, delimiter=sign, lineterminator="\n").writerows(rows)
    return clean.getvalue()
