"""The audit log has what was taken out of what, how often, before the rest is released."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lightning_secure.audit.log import AuditLog
from lightning_secure.errors import AuditWriteError, RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.redactor import REDACTED, Redactor
from lightning_secure.util import events

ADDRESS = "mary.q@clinic.example"


def told(heard):
    return [tuple(event.details.values()) for event in heard if event.action == "redaction"]


def test_the_first_is_told_at_once_and_then_whenever_as_many_again_have_come(heard):
    redactor = Redactor()
    for _ in range(1000):
        with finding_counts.looking("params"):
            redactor.redact(f"of {ADDRESS}")
        finding_counts.announce()
    assert told(heard) == [("params", "e-mail", 1)] * 2 + [
        ("params", "e-mail", 2**n) for n in range(1, 9)
    ]
    finding_counts.announce_all()
    assert sum(number for _, _, number in told(heard)) == 1000
    finding_counts.announce_all()
    assert len(told(heard)) == 11
    assert ADDRESS not in repr(heard)


def test_each_rule_in_each_sink_is_counted_by_itself_and_only_where_somebody_looks(heard):
    redactor = Redactor()
    redactor.redact(ADDRESS)
    with finding_counts.looking("params"):
        redactor.redact({"api_key": "k", "who": ADDRESS})
        with finding_counts.looking("tags"):
            redactor.redact(ADDRESS)
        redactor.redact({"password": REDACTED})  # as another one has left it
    redactor.redact(ADDRESS)
    finding_counts.announce()
    assert sorted(told(heard)) == [
        ("params", "e-mail", 1), ("params", "secret-name", 1), ("tags", "e-mail", 1),
    ]  # fmt: skip
    assert redactor.counts == {"e-mail": 4, "secret-name": 1}


@pytest.mark.parametrize("strict", [False, True])
def test_what_could_not_be_checked_is_told_as_a_failure(heard, strict):
    redactor = Redactor()
    with finding_counts.looking("params", strict=strict):
        if strict:
            with pytest.raises(RedactionError, match="encoding failed"):
                redactor.redact("half \ud800")
        else:
            assert redactor.redact("half \ud800") == REDACTED
    finding_counts.announce()
    assert [(e.outcome, e.details["rule"]) for e in heard] == [("failure", "encoding-failed")]


def test_what_could_not_be_recorded_is_told_again():
    def full(event):
        raise AuditWriteError("no space left")

    events.subscribe("full", full)
    with finding_counts.looking("params"):
        finding_counts.count("e-mail")
        finding_counts.count("card")
    with pytest.raises(AuditWriteError):
        finding_counts.announce()
    with pytest.raises(AuditWriteError):  # it stays due: nothing passes until it is recorded
        finding_counts.announce()
    events.unsubscribe("full")
    seen = []
    events.subscribe("test", seen.append)
    finding_counts.announce()
    assert sorted(told(seen)) == [("params", "card", 1), ("params", "e-mail", 1)]


def test_threads_lose_and_double_nothing(heard):
    def work():
        for _ in range(500):
            with finding_counts.looking("tags"):
                finding_counts.count("e-mail")
            finding_counts.announce()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finding_counts.announce_all()
    assert sum(number for _, _, number in told(heard)) == 2000


def test_a_forked_child_counts_on_and_only_its_own(in_fork, heard):
    with finding_counts.looking("params"):
        finding_counts.count("e-mail", 3)
    with finding_counts._LOCK:  # as a thread that counts while another one forks

        def child():
            with finding_counts.looking("tags"):
                finding_counts.count("e-mail")
            finding_counts.announce_all()
            return repr(told(heard)).encode()

        assert in_fork(child) == b"[('tags', 'e-mail', 1)]"
    finding_counts.announce_all()
    assert told(heard) == [("params", "e-mail", 3)]


def test_the_rest_is_told_when_the_process_ends(tmp_path):
    code = (
        "from lightning_secure import AuditLog, Redactor\n"
        "from lightning_secure.redaction import finding_counts as tally\n"
        "from lightning_secure.util import events\n"
        "log, redactor = AuditLog('audit.jsonl'), Redactor()\n"
        "events.subscribe('log', lambda event: log.append(event.action, event.details))\n"
        "with tally.looking('params'):\n"
        "    for n in range(7): redactor.redact(f'{n} mary@clinic.example')\n"
        "    tally.announce()\n"
        "    for n in range(6): redactor.redact(f'{n} mary@clinic.example')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    records = list(AuditLog(tmp_path / "audit.jsonl").records())
    assert [record["details"]["count"] for record in records] == [7, 6]
    assert {record["action"] for record in records} == {"redaction"}
    assert "clinic" not in (tmp_path / "audit.jsonl").read_text()
