"""The table of attacks is what was measured, and this package's column of it is so today."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attacks
import pytest

ROOT = Path(__file__).parent.parent.parent
RESULTS = json.loads(max((ROOT / "benchmarks" / "results").glob("attacks-*.json")).read_text())


def test_the_document_shows_the_newest_results():
    text = (ROOT / "docs" / "attacks.md").read_text()
    assert text.split(attacks.MARK)[1] == f"\n{attacks.table(RESULTS)}\n"


def test_every_system_and_every_attack_was_run():
    assert list(RESULTS["systems"]) == list(attacks.SYSTEMS)
    for system in RESULTS["systems"].values():
        assert list(system["attacks"]) == list(attacks.ATTACKS)
        assert system["versions"]


def test_this_package_refuses_all_but_the_roll_back_that_nobody_pinned(tmp_path):
    found = dict(attacks.run_system(attacks.OURS, Path(sys.executable), tmp_path))
    found.pop("versions")
    expected = RESULTS["systems"][attacks.OURS]["attacks"]
    assert {name: result["outcome"] for name, result in found.items()} == {
        name: result["outcome"] for name, result in expected.items()
    }
    refused = [name for name, result in found.items() if result["outcome"] == "refused"]
    assert set(found) - set(refused) == {"an older, complete state", "rows declared as pickled"}


def test_the_table_is_put_between_its_marks(tmp_path):
    path = tmp_path / "x.md"
    path.write_text(f"before\n{attacks.MARK}\nold\n{attacks.MARK}\nafter\n")
    attacks.write_table(RESULTS, path)
    text = path.read_text()
    assert text.startswith(f"before\n{attacks.MARK}\n| attack |")
    assert text.endswith(f"\n{attacks.MARK}\nafter\n")
    assert "old\n" not in text


@pytest.mark.parametrize(
    ("answer", "marked", "outcome"),
    [
        ({"rows": attacks.rows_of(attacks.TRAIN).tolist()}, False, "no effect"),
        ({"rows": []}, False, "accepted"),
        ({"rows": []}, True, "ran code"),
        ({"hung": 10}, False, "hung"),
        ({"refused": "x"}, False, "refused"),
        ({"crashed": "x"}, False, "crashed"),
    ],
)
def test_an_answer_is_judged(answer, marked, outcome):
    assert attacks.judge(answer, marked=marked) == outcome
