r"""A run's own count of its releases, on the disk before each of them.

A checkpoint holds the account of the run as it was then. If the run went on, and is then resumed
from that checkpoint, what happened since has been released and is missing from the account. So one
file a run, which all its branches share, holds how much was released in all.

The file is ``<run id>.journal``, text, a JSON object a line::

    {"format":1,"mac":"...","run_id":"..."}
    {"mac":"...","releases":[[noise multiplier, sample rate, steps],...],"settled":false}
    ...

Its last whole line holds. ``releases`` are an upper bound on everything that the run has released
so far; with ``settled`` they are exact, because the process ended in order. ``mac`` is HMAC-SHA256
over the line's object without it, in canonical JSON, behind the 32 bytes of the line before (zeros
for the first), under a key that only the run's checkpoints hold.

Flushing to the disk takes milliseconds, so steps are entered in blocks of about a second, ahead of
time. A process that dies then has entered more than it did, never less.

Guarantees:
    No release of a run with a journal happens before a line that covers it has reached the disk. A
    checkpoint is resumed only with everything charged to it that its journal has and it has not.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import time
from pathlib import Path
from typing import Any, Final, Self

from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.errors import IntegrityError, LedgerError
from lightning_secure.privacy.accounting.mechanism import Release, merged
from lightning_secure.util.append_log import AppendLog, whole_lines
from lightning_secure.util.files import open_regular, sync_directory

log = logging.getLogger(__name__)

_FORMAT: Final = 1
#: How long a block of steps lasts: what is entered too much if the process dies.
BLOCK_SECONDS: Final = 1.0
#: A block may also have this part of the steps so far, which keeps the file short.
_BLOCK_PART: Final = 1000
#: The longest line that is read, in bytes: each mechanism takes some forty.
_MAX_LINE: Final = 1 << 20
Totals = dict[tuple[float, float], int]


class Journal:
    """The journal of one run, open and locked for one process.

    Args:
        path: The file.
        key: For its authentication codes, 32 bytes.
        file: The open log, which ends with its last whole line.
        totals: The totals in that line.
        mac: Of that line.
    """

    def __init__(
        self, path: Path, *, key: bytes, file: AppendLog, totals: Totals, mac: bytes
    ) -> None:
        self._path = path
        self._key = key
        self._file = file
        self._mac = mac
        self._entered = dict(totals)
        self._used = dict(totals)
        self._block = 1
        self._since = time.monotonic()
        self._steps_then = self.steps

    @property
    def entered(self) -> Totals:
        """The entries on the disk: all that was released, and may be released now."""
        return dict(self._entered)

    @property
    def steps(self) -> int:
        """Steps released so far, of all mechanisms."""
        return sum(self._used.values())

    def cover(self, release: Release, *, at_most: int | None = None) -> None:
        """Make sure that a release stands on the disk before it happens.

        Args:
            release: The release that is about to happen.
            at_most: No more steps than these are entered ahead, because the budget affords no more.

        Raises:
            LedgerError: if the release could not be written. Nothing may be released.
        """
        if os.getpid() != self._file.owner:
            raise LedgerError(
                f"the privacy journal {str(self._path)!r} belongs to the process that this one was "
                "forked from, which does not see what is released here. The step was not taken. "
                "Train in one of the two only."
            )
        mechanism = (release.noise_multiplier, release.sample_rate)
        used = self._used.get(mechanism, 0) + release.steps
        if used > self._entered.get(mechanism, 0):
            ahead = self._ahead()
            if at_most is not None:
                ahead = min(ahead, at_most)
            self._enter({**self._entered, mechanism: used + max(0, ahead - release.steps)})
        self._used[mechanism] = used

    def close(self) -> None:
        """Give back what was entered and not used, and let others in.

        If that cannot be written, the next to resume is charged for it.
        """
        if self._file.fd < 0:
            return
        if os.getpid() != self._file.owner:  # what its parent entered is its parent's to give back
            self._file.close()
            return
        try:
            if self._used != self._entered:
                self._enter(self._used, settled=True)
        except LedgerError as error:
            log.warning("%s The next fit is charged for steps that were not taken.", error)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()

    def _ahead(self) -> int:
        """Return how many steps to enter now, from how long the last ones took."""
        now, steps = time.monotonic(), self.steps
        lasted = max(now - self._since, 1e-6)
        per_second = (steps - self._steps_then) / lasted
        # At most twice as many as last time: the first steps are no measure of the others.
        self._block = max(1, min(2 * self._block, round(per_second * BLOCK_SECONDS)))
        self._since, self._steps_then = now, steps
        return max(self._block, steps // _BLOCK_PART)

    def _enter(self, totals: Totals, *, settled: bool = False) -> None:
        line, mac = _line({"releases": _listed(totals), "settled": settled}, self._mac, self._key)
        failure = None
        try:
            self._file.append(line)
        except OSError as error:
            failure = error.strerror or type(error).__name__
        if failure is not None:
            raise LedgerError(
                f"the privacy journal {str(self._path)!r} could not be written: {failure}. What "
                "is not entered there is not released: the step was not taken."
            )
        self._mac, self._entered = mac, dict(totals)

    @classmethod
    def create(cls, path: Path, *, key: bytes, run_id: str, totals: Totals) -> Self:
        """Begin the journal of a run.

        Raises:
            LedgerError: if the journal exists, or cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as failing:
                file = AppendLog(path, os.O_CREAT | os.O_EXCL)
                failing.callback(file.close)
                head, mac = _line({"format": _FORMAT, "run_id": run_id}, bytes(32), key)
                entry, mac = _line({"releases": _listed(totals), "settled": True}, mac, key)
                file.append(head + entry)
                sync_directory(path.parent)
                failing.pop_all()
                return cls(path, key=key, file=file, totals=totals, mac=mac)
        except OSError as error:
            failure = error.strerror or type(error).__name__
        raise LedgerError(
            f"the privacy journal {str(path)!r} cannot be begun: {failure}. Give a directory "
            "that can be written and is kept, PrivateStrategy(journal=...). No step was taken."
        )

    @classmethod
    def open(cls, path: Path, *, key: bytes, run_id: str) -> Self:
        """Open the journal of a run that is going on.

        Raises:
            LedgerError: if the journal is absent, was altered, or is in use.
        """
        try:
            with contextlib.ExitStack() as failing:  # an interruption must not keep the lock
                file = AppendLog(path)
                failing.callback(file.close)
                totals, mac, whole = _parsed(os.dup(file.fd), key=key, run_id=run_id)
                file.cut(whole)  # the rest of a line that a crash has torn was never relied on
                failing.pop_all()
                return cls(path, key=key, file=file, totals=totals, mac=mac)
        except FileNotFoundError:
            raise _absent(path) from None
        except BlockingIOError:
            failure = "it is in use: another process, or another Trainer of this one, trains the "
            failure += "same run now. Two branches at once cannot see what the other spends"
        except IntegrityError as error:
            failure = str(error).rstrip(".")
        except OSError as error:
            failure = f"it cannot be read: {error.strerror or type(error).__name__}"
        raise LedgerError(f"privacy journal {str(path)!r}: {failure}. No step was taken.")


def read_totals(path: Path, *, key: bytes, run_id: str) -> Totals:
    """Return what the journal of a run says was released in all, without opening it.

    Raises:
        LedgerError: if the journal is absent or was altered.
    """
    failure = ""
    try:
        return _parsed(open_regular(path), key=key, run_id=run_id)[0]
    except FileNotFoundError:
        raise _absent(path) from None
    except IntegrityError as error:
        failure = str(error).rstrip(".")
    except OSError as error:
        failure = f"it cannot be read: {error.strerror or type(error).__name__}"
    raise LedgerError(f"privacy journal {str(path)!r}: {failure}.")


def _absent(path: Path) -> LedgerError:
    return LedgerError(
        f"the run has a privacy journal, and there is none at {str(path)!r}. It says what was "
        "released since the checkpoint was written, so nothing was resumed. Copy it there from "
        "where the run was trained, or say where it lies, PrivateStrategy(journal=...); if it is "
        "lost, see 'lightning-secure budget recover --help'."
    )


def _listed(totals: Totals) -> list[list[float | int]]:
    return [[*mechanism, steps] for mechanism, steps in totals.items()]


def _line(body: dict[str, Any], before: bytes, key: bytes) -> tuple[bytes, bytes]:
    mac = hmac.digest(key, before + canonical_json(body), "sha256")
    return canonical_json({**body, "mac": mac.hex()}) + b"\n", mac


def _parsed(fd: int, *, key: bytes, run_id: str) -> tuple[Totals, bytes, int]:
    """Return what a journal says, its last code, and how many of its bytes are whole lines.

    Raises:
        IntegrityError: if the journal is not what this run wrote.
    """
    end, mac = 0, bytes(32)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    too_long = "a line is too long for what a run writes"
    for number, line in enumerate(whole_lines(fd, limit=_MAX_LINE, too_long=too_long), 1):
        body = parse_json_object(line, what=f"line {number}")
        body.pop("mac", None)
        expected, mac = _line(body, mac, key)
        if not hmac.compare_digest(expected, line):
            raise IntegrityError(
                f"line {number} is not what this run wrote: it was altered, taken out, or belongs "
                "to another run"
            )
        end += len(line)
        first, last = (body if first is None else first), body
    if first is last or first != {"format": _FORMAT, "run_id": run_id}:
        raise IntegrityError("it is cut off after its beginning, or that of another run")
    totals = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        totals = merged([Release(*entry) for entry in (last or {})["releases"]])
    if totals is None:
        raise IntegrityError("its last line is no account of releases")
    return totals, mac, end
