"""The rule that no test may be skipped where everything must be installed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("required", "outcomes"), [("", {"skipped": 2}), ("1", {"failed": 1})])
def test_a_skip_is_a_failure_where_everything_must_be_installed(
    pytester, monkeypatch, required, outcomes
):
    rule = Path(__file__).with_name("conftest.py").read_text()
    pytester.makeconftest(rule)
    pytester.makepyfile(
        """
        import pytest

        def test_in_the_body():
            pytest.skip("softhsm2 is not installed; apt-get install softhsm2")

        @pytest.mark.skip(reason="service")
        def test_by_mark():
            raise AssertionError
        """
    )
    monkeypatch.setenv("LIGHTNING_SECURE_REQUIRE_SERVICES", required)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    counted = result.parseoutcomes()
    assert counted.get("skipped", 0) == outcomes.get("skipped", 0)
    assert bool(counted.get("failed", 0) + counted.get("errors", 0)) == bool(required)


@pytest.mark.parametrize("required", ["", "1"])
def test_a_file_that_skips_itself_is_a_failure_as_well(pytester, monkeypatch, required):
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest

        pytest.importorskip("a_service_that_is_not_there")

        def test_nothing():
            raise AssertionError
        """
    )
    # The switch of the rule; the run is a process of its own.
    monkeypatch.setenv("LIGHTNING_SECURE_REQUIRE_SERVICES", required)
    counted = pytester.runpytest_subprocess("-p", "no:cacheprovider").parseoutcomes()
    assert counted == ({"errors": 1} if required else {"skipped": 1})
