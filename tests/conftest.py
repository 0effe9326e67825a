from __future__ import annotations

import logging
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError

import fsspec
import pytest
from hypothesis import settings

from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.mlflow_store import enforce, server_tls
from lightning_secure.redaction.policy import Rules
from lightning_secure.util import events

REQUIRE_SERVICES = "LIGHTNING_SECURE_REQUIRE_SERVICES"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything must be installed, a skipped test is a failed one."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get(REQUIRE_SERVICES):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and {REQUIRE_SERVICES} allows no skip"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """The same for a file that skips itself when it is imported, with all of its tests."""
    report = yield
    if report.skipped and os.environ.get(REQUIRE_SERVICES):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped, and {REQUIRE_SERVICES} allows no skip"
    return report


@pytest.fixture(autouse=True)
def _no_listeners() -> Iterator[None]:
    """Leave no audit log listening for the next test."""
    before = dict(events._listeners)
    yield
    events._listeners.clear()
    events._listeners.update(before)


@pytest.fixture(autouse=True)
def _quiet_libraries() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def in_fork() -> Callable[[Callable[[], bytes]], bytes]:
    """What a function returns in a forked process, if it returns."""

    def run(function: Callable[[], bytes]) -> bytes:
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                os.write(write, function())
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        with open(read, "rb") as pipe:
            found = pipe.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return found

    return run


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> LocalKeyProvider:
    return LocalKeyProvider.generate(tmp_path_factory.mktemp("keys") / "project.kek")


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> LocalKeyProvider:
    return LocalKeyProvider.generate(tmp_path_factory.mktemp("other") / "other.kek")


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    """Everything that was announced during the test."""
    seen: list[events.Event] = []
    events.subscribe("test", seen.append)
    yield seen
    events.unsubscribe("test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "dataset"


@pytest.fixture
def url() -> Iterator[str]:
    """Where a dataset behind a URL may be made."""
    root = f"{uuid.uuid4().hex}/dataset"
    yield f"memory://{root}"
    files = fsspec.filesystem("memory")
    if files.exists(f"/{root}"):
        files.rm(f"/{root}", recursive=True)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A real MLflow server on this machine: its address, and the folder with all that it stores."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
            "--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1",
            "--artifacts-destination", str(folder / "artifacts"),
        ],
        stdout=log, stderr=subprocess.STDOUT, cwd=folder,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                pytest.fail((folder / "server.log").read_text()[-2000:])
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except (URLError, OSError):
                time.sleep(0.25)
        else:
            pytest.fail("the MLflow server did not come up within a minute")
        yield address, folder
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, to be copied: making one takes a second."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("mlflow-database")
    SqlAlchemyStore(f"sqlite:///{folder}/m.db", str(folder / "artifacts")).engine.dispose()
    with sqlite3.connect(folder / "m.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "m.db"


@pytest.fixture(autouse=True)
def _no_redactors_left() -> Iterator[None]:
    """Leave no test's own redactor, nor what it let pass, to the whole process."""
    known = enforce._POLICY.redactors
    before = list(known)
    yield
    known[:] = before or known[:1]
    enforce._POLICY.rules = Rules()
    server_tls._in_the_clear.clear()
    for counter in (finding_counts._found, finding_counts._told, finding_counts._due):
        counter.clear()


# The same examples each time: whether the suite passes must not depend on luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
