"""Starts the processes of one distributed run on this machine."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

SECONDS = 90  # also on a machine with many other things to do


def launch(
    script: Path, folder: Path, *names: str, world: int = 2, seconds: float = SECONDS
) -> dict[str, list]:
    """Run a script's scenarios in several processes; return what each process saw, by their names.

    They are forked, because the imports take longer than the tests; where torch has more than one
    thread, which a fork would lose, they are started anew.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    start = _forked if torch.get_num_threads() == 1 else _started
    waits = [
        start(script, [str(folder), *names], {**common, "LOCAL_RANK": str(rank)}, folder, rank)
        for rank in range(world)
    ]
    until = time.monotonic() + seconds
    codes = [wait(until) for wait in waits]
    outputs = [(folder / f"output{rank}").read_text()[-6000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(outputs)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [rank[name] for rank in ranks] for name in names}


def _started(script, arguments, environment, folder, rank):
    with (folder / f"output{rank}").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return lambda until: process.wait(max(0, until - time.monotonic()))


def _forked(script, arguments, environment, folder, rank):
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return partial(_ended, pid)
    code = 1
    try:
        fd = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except BaseException:  # noqa: BLE001 # whoever reads the output wants to know
        traceback.print_exc()
    finally:
        _save_coverage()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _save_coverage():
    """What a process that is forked has covered counts too."""
    if "coverage" in sys.modules and (running := sys.modules["coverage"].Coverage.current()):
        running.stop()
        running.save()


def _ended(pid, until):
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hung"
