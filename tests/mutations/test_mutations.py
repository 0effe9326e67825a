"""Each known weakness, brought back on purpose, turns a test red."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
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
    # With the bytecode, which stays valid for what is not changed.
    halves = shutil.ignore_patterns("*.pyc.*")  # what another process is writing
    shutil.copytree(ROOT / "lightning_secure", copy, ignore=halves)
    path = copy / mutation.file
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        stale.unlink()
    text = path.read_text()
    for old, new in ((mutation.old, mutation.new), *mutation.more):
        assert text.count(old) == 1, f"{mutation.file} no longer has this text exactly once: {old}"
        text = text.replace(old, new)
    path.write_text(text)
    return copy


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported what takes long, and forks for each run."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith(("COV_", "COVERAGE_", "PYTEST_"))]:
        del environment[name]
    # -P: the current folder must not come before the copy on the path.
    with subprocess.Popen(
        [sys.executable, "-P", HERE / "zygote.py"],
        env=environment,
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda m: m.name)
def test_a_weakness_turns_a_test_red(mutation, tmp_path, zygote):
    mutated(mutation, tmp_path)
    quiet = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # The zygote has imported anyio, by way of torchmetrics and transformers, and it is a plugin.
    quiet += ["-W", "ignore:Module already imported so cannot be rewritten"]
    request = {
        "package": str(tmp_path),
        "arguments": [*quiet, f"--basetemp={tmp_path / 'base'}", *shlex.split(mutation.tests)],
        "output": str(tmp_path / "output"),
        "seconds": 240,
    }
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    code = json.loads(zygote.stdout.readline())
    output = (tmp_path / "output").read_text()
    # 1: a test failed. Anything else (an error while collecting, no test at all) proves nothing.
    assert code == 1, output[-6000:]
    assert " failed" in output or " error" in output  # where a fixture makes the runs
    # A mutant that merely crashes says nothing about the tests.
    for crash in ("NameError", "AttributeError", "SyntaxError", "ImportError"):
        assert f"E   {crash}" not in output, output[-6000:]


def test_the_catalogue_names_each_weakness_once():
    names = [mutation.name for mutation in CATALOGUE]
    assert len(set(names)) == len(names) >= 40
