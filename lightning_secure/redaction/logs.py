"""Log records and tracebacks without secrets and personal data."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Self

from lightning_secure.redaction import redactor as redactor_module
from lightning_secure.redaction.redactor import REDACTED, Redactor

#: Attributes of every record, and those that formatters add; all others came by ``extra=``.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_DROPPED: Final = "a log record could not be checked for secrets and personal data and was dropped"
_UNCHECKED: Final = "its text could not be checked for secrets and personal data"
_BUSY: Final[ContextVar[bool]] = ContextVar("lightning_secure_redacting_a_record", default=False)
_LOCK: Final = threading.Lock()
_HANDLE: Final = logging.Handler.handle
_installed: tuple[RedactingFilter, ...] = ()
_hooks: tuple[Any, Any, Any] | None = None


class RedactingFilter(logging.Filter):
    """Takes secrets and personal data out of log records and of tracebacks that are printed.

    Args:
        redactor: Decides what is taken out.

    Of a record the message with its arguments, the traceback (with all causes, contexts, notes and
    members of groups), the stack, the fields that ``extra=`` adds and all other texts are redacted.
    The record itself is changed: the message is formatted, ``args`` is empty, and the exception is
    text in ``exc_text`` instead of an object in ``exc_info``, so that no handler prints its locals
    (``RichHandler(tracebacks_show_locals=True)`` prints the text). A record that cannot be checked
    is replaced by a remark.

    As a filter it belongs on handlers, ``handler.addFilter(RedactingFilter())``: a filter on a
    logger is not asked about records of the loggers below it. :meth:`install` covers the process.

    >>> record = logging.makeLogRecord({"msg": "mail %s", "args": ("jo@clinic.example",)})
    >>> RedactingFilter().filter(record), record.getMessage()
    (True, 'mail REDACTED')
    """

    def __init__(self, redactor: Redactor | None = None) -> None:
        super().__init__()
        self._redactor = redactor or Redactor()

    @property
    def redactor(self) -> Redactor:
        """The redactor; its ``counts`` say how often each rule has found something."""
        return self._redactor

    def install(self) -> Self:
        """Redact what every handler of the process is given, and every uncaught exception.

        Also of handlers that are added later, after all filters of their own; not of those with a
        ``handle`` of their own that asks no filter. Uncaught exceptions (of the program, of
        threads, and those that are ignored) are printed as plain text without locals. A
        ``sys.excepthook`` set afterwards, as ``rich.traceback.install`` does, prints them again.
        It ends with :meth:`remove`, or with a ``with`` statement.

        Returns:
            Itself.

        >>> redacting = RedactingFilter().install()
        >>> record = logging.makeLogRecord({"msg": "mail jo@clinic.example", "name": "doctest"})
        >>> redacting.filter(record), record.getMessage()
        (True, 'mail REDACTED')
        >>> redacting.remove()
        """
        global _hooks, _installed
        with _LOCK:
            if self not in _installed:
                _installed = (*_installed, self)
            setattr(logging.Handler, "filter", _filter)  # noqa: B010 # loggers keep theirs
            if logging.Handler.handle is _HANDLE:
                setattr(logging.Handler, "handle", _handle)  # noqa: B010 # mypy
            if _hooks is None:
                _hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
            sys.excepthook = _print
            threading.excepthook = _print_of_thread
            sys.unraisablehook = _print_ignored
        return self

    def remove(self) -> None:
        """Undo :meth:`install`; others that are installed go on."""
        global _hooks, _installed
        with _LOCK:
            _installed = tuple(other for other in _installed if other is not self)
            if _installed or _hooks is None:
                return
            del logging.Handler.filter
            # A hook that other code has set since is left alone.
            if logging.Handler.handle is _handle:
                setattr(logging.Handler, "handle", _HANDLE)  # noqa: B010 # mypy
            if sys.excepthook is _print:
                sys.excepthook = _hooks[0]
            if threading.excepthook is _print_of_thread:
                threading.excepthook = _hooks[1]
            if sys.unraisablehook is _print_ignored:
                sys.unraisablehook = _hooks[2]
            _hooks = None

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record in place.

        Returns:
            True; False for what is logged by what redacting calls, as ``__str__`` may do, for that
            cannot be redacted without end.
        """
        if _BUSY.get():
            return record.name == redactor_module.__name__  # which says what it dropped
        token = _BUSY.set(True)
        try:
            fields = self._redacted(record)
        except Exception:  # noqa: BLE001 # whatever it is, the record was not checked
            fields = None
        finally:
            _BUSY.reset(token)
        if fields is None:
            for name in [name for name in vars(record) if name not in _STANDARD]:
                delattr(record, name)
            fields = {"msg": _DROPPED, "args": (), "exc_info": None, "exc_text": None}
            fields |= dict.fromkeys(("stack_info", "threadName", "processName", "taskName"))
            fields |= {"message": _DROPPED} if hasattr(record, "message") else {}
        vars(record).update(fields)
        return True

    def _redacted(self, record: logging.LogRecord) -> dict[str, Any]:
        clean = {
            name: self._redactor.redact(value, name="" if name in _STANDARD else name)
            for name, value in vars(record).items()
            if name not in ("msg", "args", "exc_info")
        }
        clean |= {"msg": self._message(record), "args": (), "exc_info": None}
        if record.exc_info and record.exc_info[1] is not None:
            clean["exc_text"] = self._redactor.redact_text(_traceback(record.exc_info[1]))
        if "message" in clean:  # a formatter of another handler was here before
            clean["message"] = clean["msg"]
        return clean

    def _message(self, record: logging.LogRecord) -> str:
        if not isinstance(record.msg, str):
            template = str(self._argument(record.msg))
        else:
            template = record.msg
        args: Any = record.args
        if not args:
            return self._redactor.redact_text(template)
        # Before they are formatted too: half of a secret, as in "%.8s", is recognised by nothing.
        if isinstance(args, Mapping):
            args = {key: self._argument(item, name=str(key)) for key, item in args.items()}
        else:
            args = tuple(map(self._argument, args))
        text: str | None = None
        try:
            text = template % args
        except Exception:  # noqa: BLE001 # logging would print the arguments to stderr
            text = None
        if text is None:
            return f"{self._redactor.redact_text(template)} (its arguments do not fit: {REDACTED})"
        return self._redactor.redact_text(text)

    def _argument(self, value: Any, *, name: str = "") -> Any:
        clean = self._redactor.redact(value, name=name)
        # As it was, if there is nothing to take out: "%r" and "%d" want what they were given.
        return clean if REDACTED in str(clean) else value


def _filter(handler: logging.Handler, record: logging.LogRecord) -> Any:
    """Stand in for ``logging.Handler.filter``: redact what a handler's own filters let pass."""
    return _redacting(logging.Filterer.filter(handler, record), record)


def _redacting(passed: Any, record: logging.LogRecord) -> Any:
    """Return what filters said of a record; if they let it pass, it is redacted."""
    if passed:
        record = passed if isinstance(passed, logging.LogRecord) else record
        if not all(redacting.filter(record) for redacting in _installed):
            return False
    return passed


def _handle(handler: logging.Handler, record: logging.LogRecord) -> Any:
    """Stand in for ``logging.Handler.handle``: redact also for a ``filter`` of its own."""
    if getattr(handler.filter, "__func__", None) is _filter:
        return _HANDLE(handler, record)
    passed = _redacting(handler.filter(record), record)
    if passed:
        handler.acquire()
        try:
            handler.emit(passed if isinstance(passed, logging.LogRecord) else record)
        finally:
            handler.release()
    return passed


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip("\n")


def _text_of(error: BaseException) -> str:
    text: str | None = None
    try:
        text = _traceback(error)
        for redacting in _installed:
            text = redacting.redactor.redact_text(text)
    except Exception:  # noqa: BLE001 # whatever it is, the text was not checked
        text = None
    return f"{type(error).__qualname__}: {_UNCHECKED}" if text is None else text


def _print(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    del kind, trace
    if sys.stderr is not None:
        print(_text_of(error), file=sys.stderr)  # noqa: T201 # an excepthook prints


def _print_of_thread(args: Any) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        _print(args.exc_type, args.exc_value, None)


def _print_ignored(args: Any) -> None:
    if args.exc_value is not None:
        _print(args.exc_type, args.exc_value, None)
