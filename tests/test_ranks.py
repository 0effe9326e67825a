"""Which process of a run this is, by what its launcher has put into the environment."""

from __future__ import annotations

import socket

import pytest

from lightning_secure.util import ranks

NAMES = (
    *ranks._GLOBAL, *ranks._JOBS,
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({"LOCAL_RANK": "1"}, 1),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, 1),  # Lightning's launcher on a second machine
        ({"LOCAL_RANK": "1", "GROUP_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, 9),
        ({"SLURM_PROCID": "5"}, 5),
        ({"SLURM_PROCID": "5", "LOCAL_RANK": "0"}, 0),  # Slurm started one process, it the others
        ({"RANK": "what"}, 0),
    ],
)
def test_the_rank_is_the_launchers(monkeypatch, environment, rank):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank_of_process() == rank


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "71"}, "71"),
        ({"TORCHELASTIC_RUN_ID": "none"}, ""),  # torchrun without a name
        ({"TORCHELASTIC_RUN_ID": "none", "LSB_JOBID": "9"}, "9"),
        ({"TORCHELASTIC_RUN_ID": "a\nb\x00" + "c" * 500}, "ab" + "c" * 126),
    ],
)
def test_the_job_is_the_schedulers(monkeypatch, environment, job):
    monkeypatch.setattr(ranks.os, "environ", environment)  # the system takes no zero byte
    assert ranks.job_id() == job


def test_the_host_is_this_machine():
    assert ranks.host_name() == socket.gethostname()
