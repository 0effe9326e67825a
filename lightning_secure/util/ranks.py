"""The rank of this process in its run, on which machine and in which job."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Final

#: Of all processes: set by torchrun, Open MPI, MPICH, and jsrun.
_GLOBAL: Final = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")
#: Slurm, torchrun, LSF, PBS, Grid Engine, AWS Batch, in the order in which they are asked.
_JOBS: Final = (
    "SLURM_JOB_ID",
    "TORCHELASTIC_RUN_ID",
    "LSB_JOBID",
    "PBS_JOBID",
    "JOB_ID",
    "AWS_BATCH_JOB_ID",
)
#: Names that torchrun gives to a job without an id.
_UNNAMED: Final = frozenset({"", "none"})
_LONGEST: Final = 128


def rank_of_process() -> int:
    """Return the number of this process among all of its run, from 0; 0 if it is the only one.

    The process group says so once it is set up; before, what the launcher has put into the
    environment.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    for name in _GLOBAL:
        if (rank := _number(name)) is not None:
            return rank
    local = _number("LOCAL_RANK")
    if local is None:
        return _number("SLURM_PROCID") or 0
    machine = _number("NODE_RANK") or _number("GROUP_RANK") or 0
    return local + machine * (_number("LOCAL_WORLD_SIZE") or 1)


def host_name() -> str:
    """Return the name of this machine."""
    return _printable(socket.gethostname())


def job_id() -> str:
    """Return the id that the scheduler or launcher gave the job; empty if it gave none."""
    found = (os.environ.get(name, "") for name in _JOBS)
    return next((_printable(job) for job in found if job.lower() not in _UNNAMED), "")


def _number(name: str) -> int | None:
    value = os.environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else None


def _printable(text: str) -> str:
    return "".join(filter(str.isprintable, text.encode(errors="ignore").decode()))[:_LONGEST]
