"""The quickstart runs as it is, and its table says no when it should."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lightning_secure import WriteWatch
from lightning_secure.errors import ShardCorruptedError

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart.py"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, QUICKSTART, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patients(quickstart):
    return quickstart.load_patients()


def test_the_main_job_holds_all_that_it_claims(tmp_path):
    done = run("--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for line in (
        "validation accuracy",
        "privacy spent",
        "the ledger went on",
        "secrets kept out of MLflow",
        "leaks in",
        "ShardCorruptedError",
        "LedgerError",
    ):
        assert line in done.stdout
    assert "NO" not in done.stdout
    assert "0 hits (a planted one is seen)" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} <= {"run", ".config", ".cache"}


def test_a_planted_leak_is_found_and_fails_the_run(tmp_path):
    done = run("--out", tmp_path / "run", "--epochs", 1, "--plant-leak", cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "1 hits" in done.stdout
    assert "name 3" in done.stdout
    assert "notes.txt" in done.stdout
    assert "NO" in done.stdout
    # One epoch is too few to judge the model by, and what was not judged is not "ok".
    lines = {name: verdict for verdict, name in re.findall(r"│ *(\S+) *│ *(\w+)", done.stdout)}
    assert lines["validation"] == lines["throughput"] == "-"
    assert lines["privacy"] == "ok"


def test_the_search_finds_whatever_is_planted(quickstart, patients, tmp_path):
    planted = {
        "name 3": f"<td>{patients[3].name.upper()}</td>".encode(),
        "e-mail 41": patients[41].email.encode(),
        "record 52": patients[52].record.encode().hex().encode(),
        "row 77 as float32": b"xx" + patients[77].x.tobytes(),
        "password": quickstart.PASSWORD.encode(),
    }
    (tmp_path / "deep").mkdir()
    for number, data in enumerate(planted.values()):
        (tmp_path / "deep" / f"{number}.bin").write_bytes(b"\0\1" + data)
    hits, megabytes, works = quickstart.search(tmp_path, patients, WriteWatch())
    assert works
    assert {hit.path.rpartition("/")[2]: hit.label for hit in hits} == {
        f"{number}.bin": label for number, label in enumerate(planted)
    }
    assert megabytes > 0


def test_a_leak_outside_of_the_folder_is_found_too(quickstart, patients, tmp_path):
    watch = WriteWatch()
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere.log").write_text(patients[7].email)
    hits, _, _ = quickstart.search(tmp_path / "in", patients, watch)
    assert [hit.label for hit in hits if hit.path.endswith("elsewhere.log")] == ["e-mail 7"]


def test_an_attack_that_is_not_refused_is_reported(quickstart):
    def refused():
        raise ShardCorruptedError("no")

    assert quickstart.attack("a", lambda: None) == ("a", False, "it was ACCEPTED")
    assert quickstart.attack("b", refused) == ("b", True, "ShardCorruptedError: no")
    with pytest.raises(ZeroDivisionError):  # any other error is no refusal
        quickstart.attack("c", lambda: 1 / 0)


def test_the_example_empties_its_own_folder_only(quickstart, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="choose another"):
        quickstart.fresh_folder(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    mine = tmp_path / "mine"
    quickstart.fresh_folder(mine)
    (mine / "old").touch()
    quickstart.fresh_folder(mine)
    assert not (mine / "old").exists()


def test_patients_look_like_patients(patients):
    assert len(patients) == 569
    assert len({patient.record for patient in patients}) == 569
    assert all("@" in patient.email for patient in patients)


def test_the_public_ranges_are_those_of_the_data_sets_description(quickstart):
    from sklearn.datasets import load_breast_cancer

    text = load_breast_cancer().DESCR
    printed = re.findall(r"^[a-z ]+ \([a-z ]+\): +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    assert tuple((float(low), float(high)) for low, high in printed) == quickstart.RANGES
