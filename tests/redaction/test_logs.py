"""What log records and tracebacks carry into handlers; without the filter all of it is found."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import sys
import threading

import pytest
import rich.console
import rich.logging
import rich.traceback

from lightning_secure.redaction.logs import RedactingFilter
from lightning_secure.redaction.redactor import REDACTED, Redactor

PASSWORD, ADDRESS, TOKEN = "Wintergreen-90210", "mary.q@clinic.example", "AKIAIOSFODNN7EXAMPLE"
CANARIES = (PASSWORD, ADDRESS, TOKEN, TOKEN[:12])


@dataclasses.dataclass
class Database:
    host: str = "db"
    password: str = PASSWORD


class Loud:
    def __str__(self):
        logging.getLogger("loud").error("inside: %s", ADDRESS)
        return f"loud {ADDRESS}"


class Failing:
    def __str__(self):
        raise RuntimeError(ADDRESS)


class Everything(logging.Formatter):
    """Prints all that a record has, as formatters for JSON do."""

    def format(self, record):
        return f"{super().format(record)} {vars(record)}"


@pytest.fixture
def logger():
    """A logger whose records only its own handlers see, and what they have written."""
    logger = logging.Logger("test")  # noqa: LOG001 # its own, for each test
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Everything())
    logger.addHandler(handler)
    return logger, handler, stream


def chained():
    try:
        try:
            raise KeyError(f"context token={TOKEN}")
        except KeyError:
            raise ValueError(f"cause {ADDRESS}") from OSError(f"https://u:{PASSWORD}@host/")
    except ValueError as error:
        error.add_note(f"note {ADDRESS}")
        later = RuntimeError("later")
        later.__context__ = error
        group = ExceptionGroup(f"group of {ADDRESS}", [ConnectionError(f"key {TOKEN}"), later])
    try:
        raise group
    except ExceptionGroup as error:
        return error


def report(logger):
    try:
        raise chained()
    except ExceptionGroup:
        logger.exception("failed for %s", ADDRESS)


def made(**fields):
    return logging.makeLogRecord({"levelno": logging.ERROR, **fields})


RECORDS = [
    lambda log: log.warning(" and ".join(["see", ADDRESS, f"password={PASSWORD}"])),
    lambda log: log.warning("see %s, password=%s", ADDRESS, PASSWORD),
    lambda log: log.warning("key %.12s of %r", TOKEN, ADDRESS),
    lambda log: log.warning("in with %(user)s, %(password)s", {"user": "u", "password": PASSWORD}),
    lambda log: log.warning("config %s", {"db": [{"password": PASSWORD}]}),
    lambda log: log.warning("config %r", Database()),
    lambda log: log.warning(Database()),
    lambda log: log.warning({"api_key": PASSWORD, "mail": ADDRESS}),
    lambda log: log.warning("pairs %s", [("password", PASSWORD)]),
    lambda log: log.warning("bytes %s", f"password={PASSWORD}".encode()),
    lambda log: log.warning("%s", Loud()),
    lambda log: log.warning("done", extra={"owner": ADDRESS, "db": Database(), "pwd": PASSWORD}),
    lambda log: log.warning("number", extra={"pin_password": 90210, "note": f"pwd={PASSWORD}"}),
    lambda log: log.handle(made(msg="here", stack_info=f"Stack\n  connect({ADDRESS!r})")),
    lambda log: log.handle(made(msg="here", exc_text=f"ValueError: {ADDRESS}")),
    lambda log: log.handle(made(msg="here", threadName=f"for {ADDRESS}", processName=ADDRESS)),
    lambda log: log.handle(made(msg="here", processName=Database())),
    report,
]  # fmt: skip


@pytest.mark.parametrize("send", RECORDS)
def test_nothing_reaches_a_handler(logger, send):
    log, handler, stream = logger
    loud = logging.getLogger("loud")
    loud.addHandler(handler)
    send(log)
    assert any(canary in stream.getvalue() for canary in CANARIES)  # that is what it is about
    stream.seek(0), stream.truncate()
    handler.addFilter(RedactingFilter())
    send(log)
    loud.removeHandler(handler)
    for canary in CANARIES:
        assert canary not in stream.getvalue()
    begins = (
        "see key in config Database {'api_key' {'host' pairs bytes loud done number here failed"
    )
    assert stream.getvalue().startswith(tuple(begins.split()))


def test_what_is_clean_stays_as_it_is(logger):
    log, handler, stream = logger
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(step)d"))
    handler.addFilter(RedactingFilter())
    log.info("%03d of %.2f in %r, %s", 7, 2.5, (1, 2), REDACTED, extra={"step": 3})
    assert stream.getvalue() == "INFO test 007 of 2.50 in (1, 2), REDACTED 3\n"


def test_a_traceback_keeps_its_lines(logger):
    log, handler, stream = logger
    handler.setFormatter(None)
    handler.addFilter(RedactingFilter())
    report(log)
    text = stream.getvalue()
    for words in (
        "failed for", "ExceptionGroup: group of", "OSError: https://REDACTED@host/",
        "direct cause", "another exception occurred", "+---", "note REDACTED",
    ):  # fmt: skip
        assert words in text


def test_a_message_that_does_not_fit_is_not_printed_to_stderr(logger, capsys):
    log, handler, stream = logger
    log.warning("%d patients", ADDRESS)
    assert ADDRESS in capsys.readouterr().err
    # Text, message and msg of each record:
    handler.addFilter(RedactingFilter())
    log.warning("%d patients", ADDRESS)
    log.warning("%d and %s", ADDRESS)
    log.warning("%(password)d", {"password": 90210})
    assert capsys.readouterr().err == ""
    assert ADDRESS not in stream.getvalue()
    assert stream.getvalue().count("its arguments do not fit") == 3 * 3


def test_what_another_handler_has_formatted_before_is_redacted_too(logger):
    log, _, stream = logger
    second = logging.StreamHandler(io.StringIO())
    second.setFormatter(Everything())
    second.addFilter(RedactingFilter())
    log.addHandler(second)
    report(log)
    assert ADDRESS in stream.getvalue()  # the first one has no filter, and caches its text
    for canary in CANARIES:
        assert canary not in second.stream.getvalue()


@pytest.mark.parametrize("strict", [False, True])
def test_a_record_that_cannot_be_checked_is_dropped(logger, monkeypatch, strict):
    log, handler, stream = logger
    redacting = RedactingFilter(Redactor(strict=strict))

    def fail(text):
        raise RuntimeError(ADDRESS)

    # As a detector with an error would; none has one that is known.
    monkeypatch.setattr(redacting.redactor._detectors[0], "find", fail)
    handler.addFilter(redacting)
    handler.setFormatter(logging.Formatter("%(message)s"))
    redactors_own = logging.getLogger("lightning_secure.redaction.redactor")
    redactors_own.addHandler(handler)
    log.error("a%s", ADDRESS, exc_info=chained(), extra={"owner": ADDRESS})
    redactors_own.removeHandler(handler)
    text = stream.getvalue()
    assert ADDRESS not in text
    assert ("could not be checked" in text) if strict else (REDACTED in text)


def test_an_object_that_cannot_be_text_is_dropped(logger):
    log, handler, stream = logger
    handler.addFilter(RedactingFilter())
    log.error("%s", Failing())
    assert ADDRESS not in stream.getvalue()


def rich_handler():
    console = rich.console.Console(file=io.StringIO(), width=200)
    return rich.logging.RichHandler(
        console=console, rich_tracebacks=True, tracebacks_show_locals=True
    )


def fail_with_locals():
    db_password, config = PASSWORD, {"owner": ADDRESS}
    raise RuntimeError(f"no connection for {len(db_password)} {len(config)}")


def test_richs_handler_prints_no_locals():
    log, handler = logging.Logger("rich"), rich_handler()  # noqa: LOG001 # as above
    log.addHandler(handler)
    for redacting in (False, True):
        if redacting:
            handler.addFilter(RedactingFilter())
        try:
            fail_with_locals()
        except RuntimeError:
            log.exception("failed")
        text = handler.console.file.getvalue()
        assert (PASSWORD in text) is not redacting
        assert "no connection" in text
        handler.console.file = io.StringIO()


def printed(capsys):
    """What is printed of an exception that nobody catches."""
    try:
        fail_with_locals()
    except RuntimeError as error:
        error.add_note(f"see {ADDRESS}")
        sys.excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


def test_uncaught_exceptions_are_printed_without_locals(capsys):
    hooks = sys.excepthook
    rich.traceback.install(show_locals=True, console=rich.console.Console(stderr=True, width=200))
    richs = sys.excepthook
    try:
        text = printed(capsys)
        assert PASSWORD in text
        assert ADDRESS in text
        with RedactingFilter().install():
            text = printed(capsys)
        assert PASSWORD not in text
        assert ADDRESS not in text
        assert "RuntimeError: no connection" in text
        assert sys.excepthook is richs
    finally:
        sys.excepthook = hooks


class Ignored:
    def __del__(self):
        raise ValueError(ADDRESS)


def test_so_are_those_of_threads_and_those_that_are_ignored(capsys):
    def fail():
        raise KeyError(ADDRESS)

    with RedactingFilter().install():
        for target in (fail, sys.exit):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        Ignored()
    text = capsys.readouterr().err
    assert ADDRESS not in text
    assert f"KeyError: '{REDACTED}'" in text
    assert f"ValueError: {REDACTED}" in text
    assert "SystemExit" not in text


def test_an_exception_that_cannot_be_checked_is_named_only(capsys, monkeypatch):
    redacting = RedactingFilter(Redactor(strict=True))

    def fail(text):
        raise RuntimeError(ADDRESS)

    # As a detector with an error would; none has one that is known.
    monkeypatch.setattr(redacting.redactor._detectors[0], "find", fail)
    with redacting.install():
        text = printed(capsys)
    assert text.startswith("RuntimeError: its text could not be checked")
    assert ADDRESS not in text


def test_installed_it_covers_handlers_of_any_logger_and_any_time(logger):
    log, _, stream = logger
    child = logging.getLogger("some.library")
    child.propagate = False
    late = logging.StreamHandler(io.StringIO())
    with RedactingFilter().install() as redacting:
        redacting.install()  # twice is once
        child.addHandler(late)

        def adding(record):
            record.owner = ADDRESS  # a filter of the user's, which runs before ours
            return True

        late.addFilter(adding)
        late.setFormatter(Everything())
        child.error("mail %s", ADDRESS)
        log.error("mail %s", ADDRESS)
    assert late.stream.getvalue().startswith(f"mail {REDACTED} ")
    assert stream.getvalue().startswith(f"mail {REDACTED} ")
    assert ADDRESS not in late.stream.getvalue() + stream.getvalue()
    assert redacting.redactor.counts["e-mail"] >= 2
    log.error("mail %s", ADDRESS)
    assert ADDRESS in stream.getvalue()
    assert "filter" not in vars(logging.Handler)
    child.removeHandler(late)


class Own(logging.StreamHandler):
    """As handlers of libraries, which do not ask the filters of logging."""

    refuses = False

    def filter(self, record):
        return not self.refuses


def test_installed_it_covers_handlers_with_a_filter_method_of_their_own(logger):
    log, handler, _ = logger
    own, stand_in = Own(io.StringIO()), logging.StreamHandler(io.StringIO())
    stand_in.filter = lambda record: True
    handle = logging.Handler.handle
    log.handlers = [own, stand_in]
    with RedactingFilter().install():
        log.error("mail %s", ADDRESS)
        own.refuses = True
        log.error("no")
    log.handlers = [handler]
    assert own.stream.getvalue() == f"mail {REDACTED}\n"
    assert stand_in.stream.getvalue() == f"mail {REDACTED}\nno\n"
    assert logging.Handler.handle is handle


def test_a_filter_that_refuses_still_refuses(logger):
    log, handler, stream = logger
    handler.addFilter(lambda record: False)
    with RedactingFilter().install():
        log.error("no")
    assert stream.getvalue() == ""


def test_what_somebody_else_has_set_meanwhile_stays(capsys):
    before = sys.excepthook, threading.excepthook, sys.unraisablehook
    hooks = [lambda *args: None for _ in range(3)]
    redacting = RedactingFilter().install()
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    redacting.remove()
    redacting.remove()  # twice is once
    after = [sys.excepthook, threading.excepthook, sys.unraisablehook]
    sys.excepthook, threading.excepthook, sys.unraisablehook = before
    assert after == hooks


def test_two_that_are_installed_add_up(logger, capsys):
    log, _, stream = logger
    first, second = RedactingFilter(Redactor(extra_patterns=[r"MRN-\d+"])), RedactingFilter()
    first.install(), second.install()
    try:
        log.error("MRN-17 of %s", ADDRESS)
        sys.excepthook(ValueError, ValueError(f"MRN-17 of {ADDRESS}"), None)
        second.remove()
        log.error("MRN-18")
    finally:
        first.remove()
        second.remove()
    text = stream.getvalue() + capsys.readouterr().err
    assert "MRN" not in text
    assert ADDRESS not in text


def test_it_is_configured_by_a_dict():
    import logging.config

    stream = io.StringIO()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"redacting": {"()": "lightning_secure.RedactingFilter"}},
            "handlers": {
                "file": {
                    "class": "logging.StreamHandler",
                    "stream": stream,
                    "filters": ["redacting"],
                }
            },
            "loggers": {"configured": {"handlers": ["file"], "propagate": False}},
        }
    )
    logging.getLogger("configured").warning("mail %s", ADDRESS)
    assert stream.getvalue() == f"mail {REDACTED}\n"


def test_a_copied_record_is_not_changed():
    record = logging.makeLogRecord({"msg": "mail %s", "args": (ADDRESS,)})
    other = copy.copy(record)
    RedactingFilter().filter(record)
    assert (record.getMessage(), other.getMessage()) == (f"mail {REDACTED}", f"mail {ADDRESS}")
