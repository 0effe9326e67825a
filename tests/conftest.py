from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lightning_secure import events
from lightning_secure.crypto.providers import LocalKeyProvider

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


# The same examples each time: whether the suite passes must not depend on luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
