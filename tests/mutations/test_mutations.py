"""Each known weakness, brought back on purpose, turns a test red."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutation import catalogue

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

CATALOGUE = catalogue()


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
    # Where CI is set, pytest shows differences in full, and compares long bytes for minutes. A test
    # that is skipped must not look like a red one.
    for name in ("CI", "BUILD_NUMBER", "LIGHTNING_SECURE_REQUIRE_SERVICES"):
        environment.pop(name, None)
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


def outcome(zygote, package: Path, folder: Path, tests: str) -> tuple[int, str]:
    """Return pytest's exit code, and what it printed."""
    quiet = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # The zygote has imported anyio, by way of torchmetrics and transformers, and it is a plugin.
    quiet += ["-W", "ignore:Module already imported so cannot be rewritten"]
    request = {
        "package": str(package),
        "arguments": [*quiet, f"--basetemp={folder / 'base'}", *shlex.split(tests)],
        "output": str(folder / "output"),
        "seconds": 240,
    }
    zygote.stdin.write(json.dumps(request) + "\n")
    zygote.stdin.flush()
    code = json.loads(zygote.stdout.readline())
    return code, (folder / "output").read_text()


CRASH = re.compile(
    # Also as the last line of a traceback that a process of the test's has left in its output.
    r"^E +(NameError|UnboundLocalError|AttributeError|SyntaxError|IndentationError|ImportError"
    r"|ModuleNotFoundError)\b",
    re.MULTILINE,
)


def noticed(code: int, output: str) -> bool:
    """Whether a test failed, or a check in what a fixture has run for it, and nothing crashed."""
    # 1: a test failed. Anything else (an error while collecting, no test at all) proves nothing.
    if code != 1 or CRASH.search(output):  # a mutant that crashes says nothing about the tests
        return False
    if re.search(r"^1 failed\b.* in [\d.]+s", output, re.MULTILINE):
        return True
    _, setup, error = output.partition(" ERROR at setup of ")
    return bool(setup and re.search(r"^\S+:\d+: AssertionError$", error, re.MULTILINE))


def skipped(code: int, output: str) -> bool:
    """Whether no test ran, because all were skipped."""
    return code == 0 and bool(re.search(r"^\d+ skipped\b(?!.*passed).* in [\d.]+s", output, re.M))


@pytest.mark.parametrize("mutation", CATALOGUE, ids=lambda m: m.name)
def test_a_weakness_turns_a_test_red(mutation, tmp_path, zygote):
    mutated(mutation, tmp_path)
    code, output = outcome(zygote, tmp_path, tmp_path, mutation.tests)
    if skipped(code, output):
        pytest.skip(f"a service is missing for {mutation.tests}: make services")
    assert noticed(code, output), output[-6000:]


FIXTURE = "import pytest\n\n@pytest.fixture\ndef run():\n    {}\n\ndef test(run): assert {}\n"
TRACEBACK = "'Traceback (most recent call last):\\nNameError: it'"


@pytest.mark.parametrize(
    ("fixture", "test", "red"),
    [
        ("pass", "True", False),
        ("pass", "not 'failed'", True),
        ("assert [1] == [0], 'a run failed'", "True", True),
        ("import no_such_module", "True", False),
        ("from os import nothing", "True", False),
        ("raise RuntimeError('1 failed')", "True", False),
        (f"assert [1] == [0], {TRACEBACK}", "True", False),
        ("pass", f"[1] == [0], {TRACEBACK}", False),
        ("pass", "nothing", False),
        ("pass\n\ndef test_another(missing): pass", "True", False),
        ("yield\n    assert False", "True", False),
    ],
)
def test_a_crash_is_no_red_test(tmp_path, zygote, fixture, test, red):
    file = tmp_path / "test_it.py"
    file.write_text(FIXTURE.format(fixture, test))
    assert noticed(*outcome(zygote, ROOT, tmp_path, str(file))) is red


SKIPS = "@pytest.mark.skip(reason='service')\ndef test_one(): pass\n"


@pytest.mark.parametrize(
    ("more", "found"), [("", True), ("def test_two(): pass", False), ("def test_2(): 1/0", False)]
)
def test_only_skips_are_no_answer(tmp_path, zygote, more, found):
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n\n{SKIPS}\n{more}\n")
    assert skipped(*outcome(zygote, ROOT, tmp_path, str(file))) is found


def test_the_catalogue_names_each_weakness_once():
    names = [mutation.name for mutation in CATALOGUE]
    assert len(set(names)) == len(names) >= 40
