"""An append-only log in which each record carries the hash of the one before it.

Changing, removing or inserting a record breaks the chain from there on. Cutting records off the
*end* does not, unless the process that wrote them is still there and writes another: keep the head
that :meth:`AuditLog.append` returns somewhere else, and give it to :meth:`AuditLog.verify`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.errors import AuditChainError, AuditWriteError, DataError, IntegrityError
from lightning_secure.util.append_log import AppendLog, read_lines
from lightning_secure.util.files import open_regular
from lightning_secure.util.fork_lock import ForkLock
from lightning_secure.util.ranks import host_name, job_id, rank_of_process

_GENESIS: Final = "0" * 64
_VERSION: Final = 2
_FIRST: Final = {"version", "seq", "time", "action", "outcome", "pid", "details", "prev"}
#: By version. A log that an older version began is gone on with.
_FIELDS: Final = {1: _FIRST, 2: _FIRST | {"host", "rank", "job"}}
_BLOCK: Final = 65536
#: The longest line that is read or written, in bytes: a record is a few hundred.
_MAX_LINE: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AuditSummary:
    """The summary of a verified log.

    Attributes:
        records: How many there are.
        head: SHA-256 of the last one, in hexadecimal; zeros if there is none.

    >>> log = AuditLog(folder / "audit.jsonl")
    >>> head = log.append("export.approved", {"rows": 120})
    >>> log.verify() == AuditSummary(records=1, head=head)
    True
    """

    records: int
    head: str


class _Seen(NamedTuple):
    """The last record that an object knows of; exchanged as a whole, so a fork copies no half.

    Attributes:
        end: Where it ends in the file, in bytes.
        length: Of its line.
        seq: Number of the next.
        head: Its hash.
    """

    end: int = 0
    length: int = 0
    seq: int = 0
    head: str = _GENESIS


class AuditLog:
    """A log file of JSON lines, chained by hashes.

    Args:
        path: The file. It is made, with mode 0600, by the first record.

    A record is one line of canonical JSON: ``version``, ``seq`` (from 0), ``time`` (UTC, RFC
    3339), ``action``, ``outcome``, ``pid``, ``host``, ``rank`` of the process in its run (0 if it
    is alone), ``job``, which is the scheduler's or launcher's id of it or empty, ``details``, and
    ``prev``, the SHA-256 of the line before it without its newline. Records of version 1, by older
    versions of this package, have no host, rank and job.

    Several threads and processes may write to one log; each record is on disk before
    :meth:`append` returns. An object that has written or read a record writes no other unless that
    one is still in its place: a log that was cut or exchanged under a running process is not
    silently begun anew.

    >>> log = AuditLog(folder / "audit.jsonl")
    >>> head = log.append("export.approved", {"rows": 120})
    >>> log.verify(expected_head=head).records
    1
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._lock = ForkLock()
        self._seen = _Seen()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (str(self._path.absolute()),))  # also where the folder is another

    @property
    def path(self) -> Path:
        """The log file."""
        return self._path

    def append(
        self,
        action: str,
        details: Mapping[str, str | int | float] | None = None,
        *,
        outcome: str = "success",
    ) -> str:
        """Write one record and flush it to disk.

        Args:
            action: Dotted name, for example ``key.unwrap``.
            details: Ids, counts and names. Never a key, a plaintext or a personal value.
            outcome: ``success`` or ``failure``.

        Returns:
            The new head: SHA-256 of the record, in hexadecimal.

        Raises:
            AuditWriteError: if the record could not be written. Whatever it was to record must not
                be done.

        >>> log = AuditLog(folder / "audit.jsonl")
        >>> head = log.append("export.refused", {"rows": 120}, outcome="failure")
        >>> len(head)  # the digest to keep elsewhere
        64
        """
        with self._lock:
            try:
                return self._append(action, dict(details or {}), outcome)
            except OSError as error:
                reason = error.strerror
            except DataError:
                reason = "a detail has no JSON form, or is text without a UTF-8 form"
        # Outside the handlers: what could not be recorded must not hang on the error.
        raise AuditWriteError(
            f"audit log {str(self._path)!r} cannot be written ({reason}), so {action!r} was "
            "refused."
        )

    def _append(self, action: str, details: dict[str, Any], outcome: str) -> str:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_APPEND  # a log may be marked, chattr +a, so as to grow only
        with contextlib.closing(AppendLog(self._path, flags, mode=0o600, wait=True)) as log:
            self._require_kept(log)
            seq, head = self._seen.seq, self._seen.head
            if log.end != self._seen.end:
                # Another process wrote meanwhile, or this is the first record of this object.
                seq, head = self._last(log)
            record = {
                "version": _VERSION,
                "seq": seq,
                "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
                "action": action,
                "outcome": outcome,
                "pid": os.getpid(),
                "host": host_name(),
                "rank": rank_of_process(),
                "job": job_id(),
                "details": details,
                "prev": head,
            }
            line = canonical_json(record)
            if len(line) >= _MAX_LINE:
                raise OSError(errno.EMSGSIZE, f"the record is longer than {_MAX_LINE} bytes")
            log.append(line + b"\n")
        head = hashlib.sha256(line).hexdigest()
        self._seen = _Seen(log.end, len(line) + 1, seq + 1, head)
        return head

    def _require_kept(self, log: AppendLog) -> None:
        """Refuse to go on if the last record that this object knows of is not where it was."""
        end, length, _, head = self._seen
        last = os.pread(log.fd, length, end - length)
        if length and hashlib.sha256(last[:-1]).hexdigest() != head:
            raise AuditWriteError(
                f"audit log {str(self._path)!r} no longer holds the record that this process saw "
                "last: it was cut off, removed or exchanged. Nothing was written to it."
            )

    def _last(self, log: AppendLog) -> tuple[int, str]:
        """Return the next number and the hash of the last record of a log that has one."""
        tail = b""
        start = log.end
        while start > 0 and b"\n" not in tail[:-1] and len(tail) <= _MAX_LINE:
            start = max(0, start - _BLOCK)
            tail = os.pread(log.fd, log.end - start, start)
        if not tail.endswith(b"\n"):
            raise AuditWriteError(
                f"audit log {str(self._path)!r} ends in the middle of a record, as after a power "
                "cut. Move the file aside, so that it can be examined, and begin a new one; "
                "nothing was written to it."
            )
        line = tail[:-1].rpartition(b"\n")[2]
        try:
            record = _parse(line)
        except IntegrityError:
            record = None
        if record is None:
            raise AuditWriteError(
                f"the last record of audit log {str(self._path)!r} cannot be read: the file was "
                "altered. Nothing was written to it."
            )
        return record["seq"] + 1, hashlib.sha256(line).hexdigest()

    def records(self, *, allow_empty: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the records, each checked against the one before it.

        Args:
            allow_empty: Whether the log may be absent or hold no record, because nothing may have
                been written to it yet.

        Raises:
            AuditChainError: if the chain breaks; the message says at which record. Also if there is
                no record, and there should be.

        >>> log = AuditLog(folder / "audit.jsonl")
        >>> _ = log.append("export.approved", {"rows": 120})
        >>> [(record["action"], record["outcome"]) for record in log.records()]
        [('export.approved', 'success')]
        """
        head, number = _GENESIS, 0
        try:
            fd = open_regular(self._path) if self._path.exists() else None
            for line in () if fd is None else read_lines(fd, limit=_MAX_LINE):
                yield self._checked(number, line, head)
                head = hashlib.sha256(line[:-1]).hexdigest()
                number += 1
        except OSError as error:
            raise AuditChainError(
                f"audit log {str(self._path)!r} cannot be read ({error.strerror})."
            ) from None
        if number == 0 and not allow_empty:
            raise AuditChainError(
                f"audit log {str(self._path)!r} is missing or empty: it was removed or emptied, or "
                "it lies elsewhere. Pass allow_empty=True only where nothing was written to it yet."
            )

    def _checked(self, number: int, line: bytes, head: str) -> dict[str, Any]:
        if not line.endswith(b"\n"):
            long = len(line) >= _MAX_LINE
            raise self._broken(number, "it is too long" if long else "it was cut off")
        try:
            record = _parse(line[:-1])
        except IntegrityError:
            record = None
        if record is None:
            raise self._broken(number, "it is not a record")
        if record["seq"] != number or record["prev"] != head:
            raise self._broken(number, "it does not follow the record before it")
        return record

    def verify(
        self, *, expected_head: str | None = None, allow_empty: bool = False
    ) -> AuditSummary:
        """Check the whole chain.

        Args:
            expected_head: A head that was kept elsewhere. It must be that of some record, so
                everything up to then is still there, unchanged. What was written after it can
                still have been cut off: keep a newer one. Zeros, the head of a log without
                records, ask for nothing.
            allow_empty: Whether the log may be absent or hold no record, because nothing may have
                been written to it yet.

        Raises:
            AuditChainError: if a record was changed, removed, inserted or cut off, the record with
                the expected head is gone, or there is no record at all.

        >>> log = AuditLog(folder / "audit.jsonl")
        >>> head = log.append("export.approved", {"rows": 120})
        >>> _ = log.path.write_text(log.path.read_text().replace("120", "12"))
        >>> log.verify(expected_head=head)
        Traceback (most recent call last):
        lightning_secure.errors.AuditChainError: ...
        """
        head, count = _GENESIS, 0
        seen = expected_head in (None, _GENESIS)
        for record in self.records(allow_empty=allow_empty):
            head = hashlib.sha256(canonical_json(record)).hexdigest()
            count += 1
            seen = seen or head == expected_head
        if not seen:
            raise AuditChainError(
                f"audit log {str(self._path)!r} has no record with the expected head: records were "
                "cut off its end, or all of it was exchanged."
            )
        return AuditSummary(records=count, head=head)

    def _broken(self, number: int, reason: str) -> AuditChainError:
        return AuditChainError(
            f"audit log {str(self._path)!r} is broken at record {number}: {reason}. Nothing from "
            "there on can be relied on."
        )


def _parse(line: bytes) -> dict[str, Any]:
    record = parse_json_object(line, what="a record", canonical=True)
    version = record.get("version")
    known = type(version) is int and record.keys() == _FIELDS.get(version)
    if not known or type(record["seq"]) is not int:
        raise IntegrityError("not a record")
    return record
