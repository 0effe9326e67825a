"""Which changes of a checkpoint's content are a clock's, and not the rows'.

What a training step changes in a checkpoint is taken to come from the rows. What changes just so
between two checkpoints with no training step in between is a clock or a counter of checkpoints, as
``Timer`` has one. It is passed if it has moved in the trial runs as it does without them.
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

from lightning_secure.privacy.leftovers import differences

__all__ = ["Snapshot", "first_change"]

#: Longer than what a clock of whole seconds stands still.
_PAUSE_S: Final = 1.1
_SLACK_S: Final = 1e-3
#: Seconds, milliseconds, microseconds, nanoseconds.
_RATES: Final = (1.0, 1e3, 1e6, 1e9)
_WORDS: Final = re.compile(r"[0-9A-Za-z:.+-]+")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint would hold at some time.

    Attributes:
        content: A copy.
        begun: When it was begun, in seconds.
        done: When it was there.
    """

    content: dict[str, Any]
    begun: float
    done: float

    @classmethod
    def of(cls, take: Callable[[], dict[str, Any]]) -> Snapshot:
        """Return one of what is there now."""
        begun = time.monotonic()
        content = take()
        return cls(content, begun, time.monotonic())


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
        gaps = _Gaps(before, after, later)
        changed = [
            (name, old, new)
            for name, old, new in changed
            if name not in alone or not gaps.explain(old, new, alone[name])
        ]
        if not changed:
            return None
    return changed[0][0] if changed else None


class _Gaps:
    """How long it was between three snapshots, the last two without a training step."""

    def __init__(self, before: Snapshot, after: Snapshot, later: Snapshot) -> None:
        self._least = after.begun - before.done
        self._most = after.done - before.begun
        self._alone = later.done - after.begun

    def explain(self, old: Any, new: Any, later: Any) -> bool:
        """Return whether a value has moved from ``old`` to ``new`` as it did to ``later``."""
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
        whole = all(number == int(number) for number in (first, second, third))
        return self._clock(first, second, third, whole=whole)

    def _clock(self, old: float, new: float, later: float, *, whole: bool) -> bool:
        moved, alone = new - old, later - new
        if whole and moved == alone != 0:
            return True  # counts the checkpoints themselves
        sign = 1 if alone > 0 else -1
        for rate in _RATES:
            slack = max(_SLACK_S * rate, 1.0 if whole else 0.0)
            if 0 < sign * alone <= rate * self._alone + slack:
                least, most = rate * self._least - slack, rate * self._most + slack
                return least <= sign * moved <= most
        return False

    def _texts(self, old: str, new: str, later: str) -> bool:
        parsed = [_parsed(text) for text in (old, new, later)]
        if None not in parsed:
            return self.explain(*parsed)
        between = {_WORDS.sub("", text) for text in (old, new, later)}
        words = [_WORDS.findall(text) for text in (old, new, later)]
        if len(between) > 1 or len({*map(len, words)}) > 1:
            return False
        return all(
            one == two or (two != three and len({*map(_shape, (one, two, three))}) == 1)
            for one, two, three in zip(*words, strict=True)
        )

    def _lists(self, old: list[Any], new: list[Any], later: list[Any]) -> bool:
        """Something is appended for each checkpoint, such as its time."""
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
    return value if math.isfinite(value) else None


def _parsed(text: str) -> datetime | float | None:
    for kind in (datetime.fromisoformat, float):
        try:
            found: datetime | float = kind(text)
        except ValueError:
            continue
        return found
    return None


def _shape(word: str) -> str:
    """Return where there are digits and letters, and where points and the like."""
    return re.sub("[0-9A-Za-z]", "0", word)
