"""Clocks in a checkpoint's content: changes that time makes, and not the rows.

What a training step changes in a checkpoint is taken to come from the rows. What changes just so
between two checkpoints with no training step in between is a clock or a counter of checkpoints, as
``Timer`` has one. It is passed if it has moved in the trial runs as a clock has that was read
before and after. In texts, numbers, dates and times are clocks, and long identifiers may be new
each time; all else in them must stay.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from torch import Tensor

from lightning_secure.privacy.checks.snapshot import differences
from lightning_secure.privacy.checks.trial_run import seed_all

#: Longer than what a clock of whole seconds stands still.
_PAUSE_S: Final = 1.1
#: What may be in a checkpoint; they do not all go at one rate, since time.time() is set by others.
_CLOCKS: Final = (time.time, time.monotonic, time.perf_counter)
#: Seconds, milliseconds, microseconds, nanoseconds.
_RATES: Final = (1.0, 1e3, 1e6, 1e9)
_DIGITS: Final = 6  # after the point, of a rounded clock
_FAR: Final = 1e20  # from any clock
_ID: Final = (
    r"(?<![0-9A-Za-z])(?:[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|[0-9a-fA-F]{32,})"
    r"(?![0-9A-Za-z])"
)
_DATE: Final = (
    r"(?<!\d)\d{4}[-/.]?\d\d[-/.]?\d\d[T _-]?\d\d[:-]?\d\d[:-]?\d\d(?!\d)(?:[.,]\d{1,6}(?!\d))?"
)
_TIME: Final = r"(?<!\d)\d+:\d\d:\d\d(?!\d)(?:[.,]\d{1,6}(?!\d))?"
_NUMBER: Final = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_MOVING: Final = re.compile(f"({_ID}|{_DATE}|{_TIME}|{_NUMBER})")


@dataclass(frozen=True)
class Snapshot:
    """The content that a checkpoint would hold at some time.

    Attributes:
        content: A copy.
        begun: What the clocks showed when it was begun.
        done: What they showed when it was there.
    """

    content: dict[str, Any]
    begun: tuple[float, ...]
    done: tuple[float, ...]

    @classmethod
    def of(
        cls, hold: Callable[[], dict[str, Any]], copy: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> Snapshot:
        """Return one of what is there now, drawn from the same random numbers each time.

        A row that is chosen at random is then the same in two snapshots, as no clock is. The
        caller puts the random states back.
        """
        seed_all(0)
        begun = _read()
        held = hold()
        done = _read()
        return cls(copy(held), begun, done)


def _read() -> tuple[float, ...]:
    return tuple(clock() for clock in _CLOCKS)


def first_change(before: Snapshot, after: Snapshot, take: Callable[[], Snapshot]) -> str | None:
    """Return the name of the first part that trial runs have changed; None if there is none.

    Args:
        before: Taken before the trial runs.
        after: Taken after them.
        take: Takes another one.
    """
    changed = list(differences(before.content, after.content))
    # A second time for clocks that count in whole seconds.
    for pause in (0.0, _PAUSE_S) if changed else ():
        time.sleep(pause)
        later = take()
        alone = {name: new for name, _, new in differences(after.content, later.content)}
        moves = _Moves(before, after, later)
        changed = [
            (name, old, new)
            for name, old, new in changed
            if name not in alone or not moves.explain(old, new, alone[name])
        ]
        if not changed:
            return None
    return changed[0][0] if changed else None


class _Moves:
    """The moves of clocks between three snapshots, the last two without a training step."""

    def __init__(self, before: Snapshot, after: Snapshot, later: Snapshot) -> None:
        pairs = ((before, after), (after, later))
        #: For each clock, and of both pairs, the least and the most.
        self._moved = [
            [
                (two.begun[clock] - one.done[clock], two.done[clock] - one.begun[clock])
                for one, two in pairs
            ]
            for clock in range(len(_CLOCKS))
        ]

    def explain(self, old: Any, new: Any, later: Any) -> bool:
        """Return whether a value has moved from ``old`` over ``new`` to ``later`` as a clock."""
        if not type(old) is type(new) is type(later):
            return False
        if isinstance(old, str):
            return self._texts(old, new, later)
        if isinstance(old, list):
            return self._lists(old, new, later)
        numbers = [_number(value) for value in (old, new, later)]
        if any(number is None for number in numbers):
            return False
        first, second, third = (number or 0.0 for number in numbers)
        return self._clock(first, second, third)

    def _clock(self, old: float, new: float, later: float) -> bool:
        moves = (new - old, later - new)
        whole = all(number == int(number) for number in (old, new, later))
        if whole and moves[0] == moves[1] != 0:
            return True  # counts the checkpoints themselves
        slack = _resolution(old, new, later) + 4 * math.ulp(max(map(abs, (old, new, later))))
        sign = math.copysign(1, moves[1])
        return moves[1] != 0 and any(
            all(
                rate * least - slack <= sign * move <= rate * most + slack
                for move, (least, most) in zip(moves, gaps, strict=True)
            )
            for gaps in self._moved
            for rate in _RATES
        )

    def _texts(self, old: str, new: str, later: str) -> bool:
        parts = [_MOVING.split(text) for text in (old, new, later)]
        if len({*map(len, parts)}) > 1:
            return False
        return all(
            one == two == three or (place % 2 == 1 and self._part(one, two, three))
            for place, (one, two, three) in enumerate(zip(*parts, strict=True))
        )

    def _part(self, old: str, new: str, later: str) -> bool:
        """Return whether a number, a date, a time or an identifier in a text is a clock or new."""
        if all(re.fullmatch(_ID, text) for text in (old, new, later)):
            return len({old, new, later}) == 3 and len({*map(len, (old, new, later))}) == 1
        first, second, third = map(_parsed, (old, new, later))
        return (
            first is not None
            and second is not None
            and third is not None
            and self._clock(first, second, third)
        )

    def _lists(self, old: list[Any], new: list[Any], later: list[Any]) -> bool:
        """Return whether an entry is appended for each checkpoint, such as its time."""
        more = len(new) - len(old)
        if not 0 < more == len(later) - len(new) <= len(old):
            return False
        kept = [*differences(old, new[: len(old)]), *differences(new, later[: len(new)])]
        ends = zip(old[-more:], new[-more:], later[-more:], strict=True)
        return not kept and all(
            not [*differences(a, b)] or self.explain(a, b, c) for a, b, c in ends
        )


def _number(value: Any) -> float | None:
    if isinstance(value, datetime):
        return value.timestamp()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Tensor):
        value = float(value) if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _FAR else None


def _parsed(text: str) -> float | None:
    digits = re.sub(r"\D", "", text)
    try:
        if re.fullmatch(_DATE, text):
            moment = datetime.strptime(digits[:14], "%Y%m%d%H%M%S")
            return (moment - datetime(1970, 1, 1)).total_seconds() + _fraction(text)
        if re.fullmatch(_TIME, text):
            hours, minutes, seconds = re.split(r"[.,]", text)[0].split(":")
            return 3600 * int(hours) + 60 * int(minutes) + int(seconds) + _fraction(text)
        return _number(float(text))
    except ValueError:
        return None


def _fraction(text: str) -> float:
    """Return the part of a second in a text."""
    found = re.search(r"(?<=\d\d)[.,](\d{1,6})$", text)
    return float(f"0.{found[1]}") if found else 0.0


def _resolution(*numbers: float) -> float:
    """Return of how many seconds, or the like, numbers are all multiples; 0 if of very few."""
    for digits in range(_DIGITS + 1):
        if all(round(number, digits) == number for number in numbers):
            return float(10.0**-digits)
    return 0.0
