"""The recorder: writes each event of a process, and of its workers with keys, to an audit log."""

from __future__ import annotations

from lightning_secure.audit.log import AuditLog
from lightning_secure.util import events


class EventRecorder:
    """A listener of :mod:`~lightning_secure.util.events` that can be pickled.

    Args:
        log: Where events are written.

    Attributes:
        run: Id of the run that goes on, which each record names.
    """

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self.run = ""

    def __call__(self, event: events.Event) -> None:
        """Write the event, before what it announces is done."""
        self.log.append(event.action, {"run": self.run, **event.details}, outcome=event.outcome)
