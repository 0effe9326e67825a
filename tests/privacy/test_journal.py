"""A run's journal: what it holds, when it reaches the disk, and who tries to talk it down."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest

from lightning_secure.errors import AuditWriteError, ConfigError, LedgerError
from lightning_secure.privacy.accounting import journal as module
from lightning_secure.privacy.accounting.ledger import (
    Ledger,
    attach_journal,
    journal_path,
    known_releases,
    restore_journal,
)
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.util.events import subscribe

PUBLIC = PublicNumbers(
    dataset_size=1000, dataset_size_declared=False, expected_batch_size=10, steps_per_epoch=100
)


@pytest.fixture
def ledger(tmp_path):
    """An attached account of three steps."""
    account = Ledger(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, public=PUBLIC)
    attach_journal(account, tmp_path)
    take(account, 3)
    yield account
    account.close_journal()


_resumed: list[Ledger] = []


@pytest.fixture(autouse=True)
def _let_go():
    """A test that fails must not fail by the files that it leaves open."""
    yield
    while _resumed:
        _resumed.pop().close_journal()


def take(account, steps):
    for _ in range(steps):
        account.record()


def again(account):
    """The account as a checkpoint of this moment would bring it back."""
    _resumed.append(Ledger.from_state_dict(json.loads(json.dumps(account.state_dict()))))
    return _resumed[-1]


def entries(account, folder):
    return [json.loads(line) for line in journal_path(account, folder).read_bytes().splitlines()]


def known(account, folder):
    return sum(release.steps for release in known_releases(account, folder))


# ---------------------------------------------------------------- what it holds


def test_every_step_is_on_the_disk_before_it_is_taken(tmp_path, ledger):
    for _ in range(200):
        ledger.record()
        assert known(ledger, tmp_path) >= ledger.steps


def test_it_is_exact_once_the_run_has_ended_in_order(tmp_path, ledger):
    take(ledger, 100)
    ledger.close_journal()
    assert known(ledger, tmp_path) == 103
    assert entries(ledger, tmp_path)[-1]["settled"] is True


def test_many_steps_share_one_line(tmp_path, ledger):
    """Each line is flushed, which takes milliseconds; a step may take less."""
    take(ledger, 5000)
    assert len(entries(ledger, tmp_path)) < 40


def test_slow_steps_are_entered_one_by_one(tmp_path, ledger, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    # Two seconds a step, and no test waits that long.
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    take(ledger, 5)
    for _ in range(5):
        ledger.record()
        assert known(ledger, tmp_path) - ledger.steps <= 1


def test_no_more_is_entered_than_the_budget_allows(tmp_path, ledger):
    """Else a crash would cost a run what it could still have spent."""
    ledger.certify(9.0, steps=20)
    while ledger.steps < 20:
        ledger.record()
        assert known(ledger, tmp_path) <= 20


def test_other_releases_are_entered_as_they_are(tmp_path, ledger):
    ledger.charge(Release(7.0, 1.0, 2))
    ledger.record()
    (steps, metric) = known_releases(ledger, tmp_path)
    assert metric == Release(7.0, 1.0, 2)
    assert steps.steps >= 4


def test_another_release_takes_back_what_was_certified(ledger):
    ledger.certify(1.0, steps=10**6)
    ledger.charge(Release(0.9, 1.0, 1))  # far above an epsilon of 1
    assert not ledger.affords_a_step(1.0)


def test_its_key_is_in_the_checkpoint_and_in_no_text(tmp_path, ledger):
    key = ledger.state_dict()["journal_key"]
    assert key not in repr(ledger)
    assert key not in journal_path(ledger, tmp_path).read_text()


# ---------------------------------------------------------------- going on


def test_an_account_that_missed_nothing_is_charged_nothing(tmp_path, ledger):
    ledger.close_journal()
    resumed = again(ledger)
    attach_journal(resumed, tmp_path)
    assert (resumed.steps, resumed.abandoned) == (3, 0)
    resumed.close_journal()


def test_what_another_branch_took_is_charged(tmp_path, ledger, heard):
    old = again(ledger)
    take(ledger, 4)
    ledger.charge(Release(7.0, 1.0, 1))
    ledger.close_journal()
    attach_journal(old, tmp_path)
    assert (old.steps, old.abandoned) == (8, 5)
    assert old.epsilon() == ledger.epsilon()
    assert old.state_dict()["abandoned"] == 5
    assert [(e.action, e.details["steps"]) for e in heard] == [("privacy.abandoned", 5)]
    take(old, 2)
    old.close_journal()
    # And the first branch pays for the second.
    attach_journal(ledger, tmp_path)
    assert (ledger.steps, ledger.abandoned) == (10, 2)


def test_a_charge_that_cannot_be_recorded_stops_the_resume(tmp_path, ledger):
    old = again(ledger)
    take(ledger, 1)
    ledger.close_journal()

    def full(event):
        raise AuditWriteError("full")

    subscribe("test", full)
    with pytest.raises(AuditWriteError):
        attach_journal(old, tmp_path)
    subscribe("test", lambda event: None)
    attach_journal(old, tmp_path)  # it was let go of
    old.close_journal()


def test_a_copy_in_memory_is_another_branch(tmp_path, ledger):
    for twin in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):
        take(twin, 50)  # not attached: nothing was entered
        with pytest.raises(LedgerError, match="in use"):
            attach_journal(twin, tmp_path)


def test_in_one_process_the_directory_may_change(tmp_path, ledger):
    ledger.close_journal()
    attach_journal(ledger, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    assert ledger.steps == 3


def test_two_processes_do_not_train_one_run(tmp_path, ledger):
    """The other one opens the same file; the lock is the operating system's."""
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "from lightning_secure.privacy.accounting.ledger import attach_journal\n"
        "from lightning_secure.errors import LedgerError\n"
        "ledger = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "try: attach_journal(ledger, Path(sys.argv[2]))\n"
        "except LedgerError as error: print(error)"
    )
    argument = pickle.dumps(again(ledger)).hex()
    done = subprocess.run(
        [sys.executable, "-c", code, argument, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "in use" in done.stdout
    assert "No step was taken" in done.stdout


def test_a_process_that_is_killed_has_entered_at_least_what_it_took(tmp_path, ledger):
    ledger.close_journal()
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "from lightning_secure.privacy.accounting.ledger import attach_journal\n"
        "ledger = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "attach_journal(ledger, Path(sys.argv[2]))\n"
        "while True: ledger.record(); sys.stdout.write('.'); sys.stdout.flush()"
    )
    argument = pickle.dumps(again(ledger)).hex()
    with subprocess.Popen(
        [sys.executable, "-c", code, argument, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        process.stdout.read(1500)
        process.send_signal(signal.SIGKILL)
        taken = 1500 + len(process.stdout.read())
    resumed = again(ledger)
    attach_journal(resumed, tmp_path)
    assert resumed.abandoned >= taken
    resumed.close_journal()


# ---------------------------------------------------------------- attacks and accidents


def write(account, folder, lines):
    journal_path(account, folder).write_bytes(b"".join(lines))


def lines(account, folder):
    return journal_path(account, folder).read_bytes().splitlines(keepends=True)


def fewer(line):
    body = json.loads(line)
    body["releases"][0][2] = 1
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda old: [*old[:-1], fewer(old[-1])],
        lambda old: [old[0], *old[2:]],
        lambda old: [old[0], old[-1]],
        lambda old: old[1:],
        lambda old: old[:1],
        lambda old: [],
        lambda old: [*old, old[1]],
        lambda old: [*old, b"{}\n"],
        lambda old: [*old, b"garbage\n"],
        lambda old: [old[0].replace(b'"format":1', b'"format":2'), *old[1:]],
        lambda old: [line.replace(b"]]", b"] ]") for line in old],
    ],
)
def test_an_altered_journal_is_refused(tmp_path, ledger, damage):
    take(ledger, 30)
    ledger.close_journal()
    write(ledger, tmp_path, damage(lines(ledger, tmp_path)))
    resumed = again(ledger)
    for look in (lambda: attach_journal(resumed, tmp_path), lambda: known(resumed, tmp_path)):
        with pytest.raises(LedgerError, match=ledger.run_id):
            look()
    assert resumed.steps == ledger.steps


def test_the_journal_of_another_run_is_refused(tmp_path, ledger):
    ledger.close_journal()
    other = Ledger(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, public=PUBLIC)
    attach_journal(other, tmp_path)
    take(other, 9)
    other.close_journal()
    os.replace(journal_path(other, tmp_path), journal_path(ledger, tmp_path))
    with pytest.raises(LedgerError, match="not what this run wrote"):
        attach_journal(again(ledger), tmp_path)


def test_an_older_state_of_the_journal_is_seen_by_a_newer_checkpoint(tmp_path, ledger):
    ledger.close_journal()
    old = journal_path(ledger, tmp_path).read_bytes()
    attach_journal(ledger, tmp_path)
    take(ledger, 5)
    ledger.close_journal()
    journal_path(ledger, tmp_path).write_bytes(old)
    resumed = again(ledger)
    with pytest.raises(LedgerError, match="knows 5 steps fewer"):
        attach_journal(resumed, tmp_path)
    attach_journal_again_after_repair(ledger, resumed, tmp_path)


def attach_journal_again_after_repair(ledger, resumed, folder):
    """Refusing has let go of the file, and the declared way leads on."""
    journal_path(ledger, folder).unlink()
    restore_journal(ledger, folder, steps=11)
    attach_journal(resumed, folder)
    assert (resumed.steps, resumed.abandoned) == (11, 3)
    resumed.close_journal()


def test_a_removed_journal_is_missed(tmp_path, ledger):
    ledger.close_journal()
    journal_path(ledger, tmp_path).unlink()
    with pytest.raises(LedgerError, match="nothing was resumed"):
        attach_journal(again(ledger), tmp_path)
    with pytest.raises(LedgerError, match="budget recover"):
        known_releases(ledger, tmp_path)


def test_half_a_line_was_never_relied_on(tmp_path, ledger):
    ledger.close_journal()
    path = journal_path(ledger, tmp_path)
    whole = path.read_bytes()
    for torn in (b'{"mac":"12', b"\0" * 512):
        path.write_bytes(whole + torn)
        resumed = again(ledger)
        attach_journal(resumed, tmp_path)
        assert resumed.steps == 3
        resumed.record()
        resumed.close_journal()
        assert known(resumed, tmp_path) == 4


def test_a_full_disk_stops_the_step_and_the_journal_survives(tmp_path, ledger):
    path = journal_path(ledger, tmp_path)
    while known(ledger, tmp_path) > ledger.steps:
        ledger.record()
    steps, soft_hard = ledger.steps, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, soft_hard[1]))
    try:
        with pytest.raises(LedgerError, match="could not be written"):
            ledger.record()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert ledger.steps == steps
    ledger.record()
    ledger.close_journal()
    assert known(ledger, tmp_path) == steps + 1


def test_settling_that_fails_counts_too_much_and_says_so(tmp_path, ledger, caplog):
    take(ledger, 20)
    entered = known(ledger, tmp_path)
    soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = journal_path(ledger, tmp_path).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft_hard[1]))
    try:
        ledger.close_journal()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert "charged" in caplog.text
    assert known(ledger, tmp_path) == entered > ledger.steps


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    account = Ledger(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, public=PUBLIC)
    with pytest.raises(LedgerError, match="No step was taken"):
        attach_journal(account, tmp_path / "file")
    assert not account.journaled


def test_a_journal_that_cannot_be_read_is_refused(tmp_path, ledger):
    ledger.close_journal()
    path = journal_path(ledger, tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        attach_journal(again(ledger), tmp_path)
    with pytest.raises(LedgerError, match="cannot be read"):
        known_releases(ledger, tmp_path)


@pytest.mark.parametrize("run_id", ["../../elsewhere", "", "A" * 32, "0" * 33, 7])
def test_a_checkpoint_cannot_choose_the_file(ledger, run_id):
    with pytest.raises(LedgerError):
        Ledger.from_state_dict({**ledger.state_dict(), "run_id": run_id})


# ---------------------------------------------------------------- older ledgers, lost journals


def version_1(account):
    state = account.state_dict()
    for name in ("accountant", "abandoned", "journaled", "journal_key"):
        del state[name]
    return {**state, "version": 1}


def test_a_checkpoint_from_before_journals_gets_one(tmp_path, ledger):
    ledger.close_journal()
    state, folder = version_1(ledger), tmp_path / "new"
    first = Ledger.from_state_dict(state)
    attach_journal(first, folder)
    take(first, 2)
    first.close_journal()
    second = Ledger.from_state_dict(state)  # the same checkpoint once more
    attach_journal(second, folder)
    assert (second.steps, second.abandoned) == (5, 2)
    second.close_journal()


def test_a_forged_journal_of_such_a_checkpoint_is_no_account(tmp_path, ledger):
    """Its key is no secret, so its lines may say anything."""
    ledger.close_journal()
    account = Ledger.from_state_dict(version_1(ledger))
    key = account.journal_key()
    assert key == hashlib.sha256(b"lightning_secure journal of " + account.run_id.encode()).digest()
    head, mac = module._line({"format": 1, "run_id": account.run_id}, bytes(32), key)
    entry, _ = module._line({"releases": [[1.0]], "settled": True}, mac, key)
    write(account, tmp_path, [head, entry])
    with pytest.raises(LedgerError, match="no account of releases"):
        attach_journal(account, tmp_path)


def test_a_lost_journal_is_begun_anew_with_what_is_declared(tmp_path, ledger):
    ledger.close_journal()
    journal_path(ledger, tmp_path).unlink()
    with pytest.raises(LedgerError, match="the checkpoint alone has 3"):
        restore_journal(ledger, tmp_path, steps=2)
    with pytest.raises(ConfigError):
        restore_journal(ledger, tmp_path, steps=0)
    restore_journal(ledger, tmp_path, steps=7)
    resumed = again(ledger)
    attach_journal(resumed, tmp_path)
    assert (resumed.steps, resumed.abandoned) == (7, 4)
    resumed.close_journal()
    with pytest.raises(LedgerError, match="File exists"):
        restore_journal(ledger, tmp_path, steps=3)


def test_an_interruption_while_it_is_read_keeps_no_lock(ledger, tmp_path, monkeypatch):
    resumed = again(ledger)
    ledger.close_journal()

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_parsed", interrupted)  # a signal cannot be timed so
        with pytest.raises(KeyboardInterrupt) as held:  # and its traceback holds the file
            attach_journal(resumed, tmp_path)
    attach_journal(resumed, tmp_path)
    assert resumed.steps == ledger.steps
    del held


# ---------------------------------------------------------------- what is no journal, and forks


class HungError(BaseException):
    """No OSError, which would be taken for one of the file's."""


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "long"])
def test_what_is_no_journal_is_refused_at_once(ledger, tmp_path, kind):
    resumed = again(ledger)
    ledger.close_journal()
    path = journal_path(ledger, tmp_path)
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data)
        os.truncate(path, len(data) + 3 * 2**30)

    def over(*_):
        raise HungError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(10)
    try:
        with pytest.raises(LedgerError, match="No step was taken"):
            attach_journal(resumed, tmp_path)
        with pytest.raises(LedgerError, match="privacy journal"):
            known_releases(ledger, tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_forked_child_releases_nothing_for_its_parent(ledger, tmp_path, in_fork):
    def child():
        try:
            take(ledger, 1)
        except LedgerError as error:
            said = str(error)
        else:
            said = "released"
        ledger.close_journal()
        return said.encode()

    before = journal_path(ledger, tmp_path).read_bytes()
    assert b"forked" in in_fork(child)
    assert journal_path(ledger, tmp_path).read_bytes() == before
    take(ledger, 2)
    ledger.close_journal()
    assert known(ledger, tmp_path) == 5
