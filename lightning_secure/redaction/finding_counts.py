"""Counts of findings for the audit log: sink, rule and number, never a value.

A text in which something is found does not cost a record of its own. Of each rule in each sink the
first finding is announced, then whenever as many again have come: the record is never behind by
more than half. :func:`announce_all` tells the rest, at the end of a run and of the process.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from contextvars import ContextVar, Token
from typing import Any, Final, NamedTuple

from lightning_secure.util import events
from lightning_secure.util.fork_lock import ForkLock


class _Looking(NamedTuple):
    sink: str
    strict: bool


_LOOKING: Final[ContextVar[_Looking | None]] = ContextVar("lightning_secure_looking", default=None)
_LOCK: Final = ForkLock()
_found: Final[Counter[tuple[str, str]]] = Counter()
_told: Final[Counter[tuple[str, str]]] = Counter()
_due: Final[set[tuple[str, str]]] = set()


class looking:  # noqa: N801 # reads as a statement, and is used as one
    """While this lasts, what this thread finds is counted as found in ``sink``.

    Args:
        sink: The sink whose values are inspected, for example ``params``.
        strict: Whether what could not be checked raises.
    """

    __slots__ = ("_looking", "_token")

    def __init__(self, sink: str, *, strict: bool = False) -> None:
        self._looking = _Looking(sink, strict)
        self._token: Token[_Looking | None] | None = None

    def __enter__(self) -> None:
        self._token = _LOOKING.set(self._looking)

    def __exit__(self, *_: Any) -> None:
        if self._token is not None:
            _LOOKING.reset(self._token)


def strict() -> bool:
    """Return whether what cannot be checked must raise here."""
    now = _LOOKING.get()
    return now is not None and now.strict


def count(rule: str, times: int = 1) -> None:
    """Count a finding for the sink that is being redacted, if one is named.

    Args:
        rule: The rule that matched, or ``<what>-failed`` for a check that failed.
        times: How often.
    """
    now = _LOOKING.get()
    if now is None or not times:
        return
    key = (now.sink, rule)
    with _LOCK:
        _found[key] += times
        if _found[key] >= 2 * _told[key]:
            _due.add(key)


def announce() -> None:
    """Announce what is due, before what it was found in is released.

    Raises:
        AuditWriteError: if a listener cannot record the finding; nothing must be released then.
    """
    if _due:
        _announce(lambda: set(_due))


def announce_all() -> None:
    """Announce all that was counted and not announced yet.

    Raises:
        AuditWriteError: if a listener cannot record a finding.
    """
    _announce(lambda: {key for key, found in _found.items() if found > _told[key]})


def _announce(chosen: Any) -> None:
    with _LOCK:
        # Taken before it is told: of two threads one tells it.
        news = {key: _found[key] - _told[key] for key in chosen()}
        _told.update(news)
        _due.difference_update(news)
    waiting = dict(news)
    try:
        for (sink, rule), number in news.items():
            if number:
                events.announce(
                    "redaction",
                    {"sink": sink, "rule": rule, "count": number},
                    outcome="failure" if rule.endswith("-failed") else "success",
                )
            del waiting[sink, rule]
    finally:
        if waiting:  # a listener could not record it
            with _LOCK:
                _told.subtract(waiting)
                _due.update(waiting)


def _at_exit() -> None:
    # A log that cannot be written any more has refused what was to be released already.
    try:
        announce_all()
    except Exception:  # noqa: BLE001 # the process ends, and its text may name what is recorded
        return


def _in_child() -> None:
    # The parent announces its own findings.
    for counted in (_found, _told, _due):
        counted.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
