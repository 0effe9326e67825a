"""Runs pytest on copies of the package, each in a child forked after the heavy imports.

Reads a line of JSON for each run, ``{"package": FOLDER, "arguments": [...], "output": FILE}``, and
answers with the exit code; -1 if it took longer than ``seconds``.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import traceback

import pytest

# They take long to import, and start no thread that a fork would lose.
HEAVY = ("torch", "lightning.pytorch", "torchmetrics", "opacus", "dp_accounting")


def child(package: str, arguments: list[str], output: str) -> int:
    """Run pytest on the package in ``package``, which must be the one that is imported."""
    os.setsid()
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ["PYTHONPATH"] = package
    sys.path.insert(0, package)
    importlib.invalidate_caches()
    import lightning_secure

    assert lightning_secure.__file__ == os.path.join(package, "lightning_secure", "__init__.py")
    return int(pytest.main(arguments))


def run(package: str, arguments: list[str], output: str, seconds: float) -> int:
    """Return pytest's exit code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child(package, arguments, output)
        except BaseException:  # noqa: BLE001 # whoever reads the output wants to know
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    handle = os.pidfd_open(pid)
    ended = bool(select.select([handle], [], [], seconds)[0])
    if not ended:
        os.killpg(pid, signal.SIGKILL)
    os.close(handle)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else -1


def main() -> None:
    """Serve until the input ends."""
    for name in HEAVY:
        importlib.import_module(name)
    assert "lightning_secure" not in sys.modules
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
