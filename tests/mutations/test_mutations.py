"""Each known weakness, brought back on purpose, turns a test red."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

CATALOGUE = [
    mutation
    for path in sorted((HERE / "catalogue").glob("*.py"))
    for mutation in importlib.import_module(f"catalogue.{path.stem}").CATALOGUE
]


def mutated(mutation, folder: Path) -> Path:
    copy = folder / "lightning_secure"
    shutil.copytree(ROOT / "lightning_secure", copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / mutation.file
    text = path.read_text()
    for old, new in ((mutation.old, mutation.new), *mutation.more):
        assert text.count(old) == 1, f"{mutation.file} no longer has this text exactly once: {old}"
        text = text.replace(old, new)
    path.write_text(text)
    return copy


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda m: m.name)
def test_a_weakness_turns_a_test_red(mutation, tmp_path):
    copy = mutated(mutation, tmp_path)
    code = "import lightning_secure, sys; sys.exit(lightning_secure.__file__ != sys.argv[1])"
    # -P: the current folder must not come before the copy on the path.
    python = [sys.executable, "-P"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("COVERAGE_PROCESS_START", None)
    here = subprocess.run(
        [*python, "-c", code, str(copy / "__init__.py")], env=environment, check=False, cwd=ROOT
    )
    assert here.returncode == 0, "the copy is not what would be tested"
    quiet = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest_ = [*python, "-m", "pytest", *quiet, f"--basetemp={tmp_path / 'base'}"]
    done = subprocess.run(
        [*pytest_, *shlex.split(mutation.tests)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=240,
    )
    # 1: a test failed. Anything else (an error while collecting, no test at all) proves nothing.
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-500:]
    assert " failed" in done.stdout
    # A mutant that merely crashes says nothing about the tests.
    for crash in ("NameError", "AttributeError", "SyntaxError", "ImportError"):
        assert f"E   {crash}" not in done.stdout, done.stdout[-3000:]


def test_the_catalogue_names_each_weakness_once():
    names = [mutation.name for mutation in CATALOGUE]
    assert len(set(names)) == len(names) >= 40
