"""`make test` where services are absent: it installs what it can, and says what it leaves out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_ROOT = {"id": "echo 1000", "apt-get": "exit 1"}
INSTALLS = 'case "$*" in *softhsm2) : > {bin}/softhsm2-util; {chmod} +x {bin}/softhsm2-util;; esac'


class Machine:
    """A prefix with programs of its own, and none of this machine's but `env` and `id`."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        (folder / "lib" / "softhsm").mkdir(parents=True)
        (folder / "lib" / "softhsm" / "libsofthsm2.so").touch()
        self.bin.mkdir()
        for name in ("env", "id"):
            (self.bin / name).symlink_to(shutil.which(name))

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script.format(bin=self.bin, chmod=shutil.which('chmod'))}\n")
        path.chmod(0o755)

    def run(self, *command: object, required: str = "", **options):
        environment = {**os.environ, "LIGHTNING_SECURE_REQUIRE_SERVICES": required}
        environment["PATH"] = str(self.bin)
        for name in [name for name in environment if name.startswith(("COV_", "MAKE", "MFLAGS"))]:
            del environment[name]
        return subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=environment, **options
        )


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({"id": "echo 0"}, "there is no apt-get"),
        (NO_ROOT, "that needs root, or sudo without a password"),
        ({**NO_ROOT, "sudo": "exit 1"}, "that needs root, or sudo without a password"),
        ({"id": "echo 0", "apt-get": "echo 'E: no such package' >&2; exit 100"}, "E: no such"),
        ({"id": "echo 0", "apt-get": "exit 100"}, "apt-get failed"),
        ({"id": "echo 0", "apt-get": "exit 0"}, "apt-get put it elsewhere"),
        ({"id": "echo 0", "apt-get": INSTALLS}, ""),
        ({"id": "echo 1000", "sudo": 'shift; exec "$@"', "apt-get": INSTALLS}, ""),
    ],
)
def test_what_is_missing_is_installed_or_named(machine, programs, words):
    for name, script in programs.items():
        machine.program(name, script)
    done = machine.run(sys.executable, HERE / "services.py")
    named = re.search(r"^(.*) could not be installed \((.*)\).*apt-get install", done.stdout, re.M)
    if words:
        assert done.returncode == 1
        assert "softhsm2" in named[1]
        assert words in named[2]
    else:
        assert "installing softhsm2" in done.stdout
        assert named is None or "softhsm2" not in named[1]
    assert not done.stderr


# ---------------------------------------------------------------- the gate


def measured(folder: Path, *, missed: str) -> None:
    """Measure a package of the same layout, in which one file has a line that nothing runs."""
    names = (
        "crypto/keys.py",
        "crypto/providers/pkcs11.py",
        "data/format/columns.py",
        "data/format/header.py",
    )
    for name in names:
        path = folder / "lightning_secure" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a = 1\n\n\ndef f():\n    return a\n" + ("f()\n" if name != missed else ""))
    (folder / "pyproject.toml").write_text(
        '[tool.coverage.run]\nbranch = true\nsource = ["lightning_secure"]\n'
    )
    (folder / "run.py").write_text(
        "import runpy\n" + "".join(f"runpy.run_path('lightning_secure/{n}')\n" for n in names)
    )
    command = [sys.executable, "-m", "coverage", "run", "run.py"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("missed", "installed", "required", "code"),
    [
        ("", False, "", 0),
        ("crypto/providers/pkcs11.py", False, "", 0),
        ("crypto/providers/pkcs11.py", False, "1", 2),
        ("crypto/providers/pkcs11.py", True, "", 2),
        ("crypto/keys.py", False, "", 2),
        ("data/format/header.py", False, "", 2),
    ],
)
def test_only_the_files_of_an_absent_service_are_left_out(
    tmp_path, machine, missed, installed, required, code
):
    measured(tmp_path, missed=missed)
    if installed:
        machine.program("softhsm2-util", "exit 0")
    done = machine.run(sys.executable, HERE / "gate.py", required=required, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    left_out = "softhsm2 is missing: its tests were skipped" in done.stdout
    assert left_out is (not installed and not required)
    assert ("pkcs11.py not held to 100 %" in done.stdout) is left_out


@pytest.mark.parametrize("required", ["", "1"])
def test_the_suite_runs_without_services_unless_they_are_required(tmp_path, machine, required):
    make = shutil.which("make")
    for name, script in NO_ROOT.items():
        machine.program(name, script)
    for name in ("sh", "test"):
        (machine.bin / name).symlink_to(shutil.which(name))
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text('#!/bin/sh\necho "called: $*"\n')
    (environment / "bin" / "python").chmod(0o755)
    for stamp in (".demo", ".installed"):
        (environment / stamp).touch()
    chosen = (f"VENV={environment}", f"PYTHON={sys.executable}")
    done = machine.run(make, "test", *chosen, required=required, cwd=ROOT)
    assert "softhsm2" in done.stdout
    calls = [line for line in done.stdout.splitlines() if line.startswith("called:")]
    assert len(calls) == (0 if required else 2), done.stdout + done.stderr
    assert (done.returncode == 0) is (not required)
