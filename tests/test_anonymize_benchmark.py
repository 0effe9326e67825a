"""The benchmark of anonymisation measures, and gives no result where nothing was taken out."""

from __future__ import annotations

import argparse
import dataclasses

import anonymize
import pytest

from lightning_secure import AnonymizationPlan, Keep

ARGUMENTS = argparse.Namespace(quick=True, rows=120, rounds=2, command="benchmarks/anonymize.py")


@pytest.fixture
def notes_only(monkeypatch):
    # The other kinds take long to make, and are measured the same way.
    monkeypatch.setattr(anonymize, "KINDS", {"notes": anonymize.KINDS["notes"]})


def test_a_run_says_what_it_measured(notes_only):
    result = anonymize.measure(ARGUMENTS)
    of = result["kinds"]["notes"]
    pairs = zip(of["seconds_with"], of["seconds_without"], strict=True)
    low, high = sorted(given / without for given, without in pairs)
    assert low - 0.2 < result["ratios"]["seal_with_vs_without_notes"] < high + 0.2
    assert {"cpu", "cores", "aes_instructions"} <= result["machine"].keys()
    assert (of["rows"], result["target"]) == (120, 1.5)


def test_a_plan_that_takes_nothing_out_gets_no_ratio(notes_only, monkeypatch):
    kept = dataclasses.replace(anonymize.KINDS["notes"], plan=AnonymizationPlan({"note": Keep()}))
    monkeypatch.setattr(anonymize, "KINDS", {"notes": kept})
    with pytest.raises(SystemExit, match="planted"):
        anonymize.measure(ARGUMENTS)
