from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from lightning_secure import __version__, cli
from lightning_secure.cli import doctor


def by_name():
    return {check.name: check for check in cli.run_checks()}


def test_the_command_is_installed_and_knows_its_version():
    command = Path(sys.executable).with_name("lightning-secure")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_the_doctor_finds_this_machine_well():
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in ("lightning", "torch", "AES-256-GCM", "opacus"):
        assert name in result.output


def test_every_required_package_is_looked_at():
    checks = by_name()
    assert {"lightning", "torch", "cryptography", "opacus", "mlflow-skinny"} <= set(checks)
    assert checks["torch"].detail == version("torch")


def installed(monkeypatch, **versions):
    def fake(name):
        found = versions.get(name.replace("-", "_"), version(name))
        if found is None:
            raise PackageNotFoundError(name)
        return found

    # Other releases cannot be installed beside the ones under test.
    monkeypatch.setattr(doctor, "version", fake)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"cryptography": "41.0.0"}, "and >=50 is needed"),
        ({"opacus": None}, "not installed"),
        ({"lightning": "2.6.2"}, "malware"),
        ({"lightning": "2.6.3"}, "malware"),
        ({"torch": "2.9.1"}, "is needed"),
    ],
)
def test_the_doctor_says_no(monkeypatch, found, words):
    installed(monkeypatch, **found)
    (name,) = found
    check = by_name()[name]
    assert check.status == "bad"
    assert words in check.detail
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1


def test_local_builds_count_as_their_release():
    requirement = Requirement("torch>=2.10,<3")
    assert requirement.specifier.contains("2.13.0+cpu", prereleases=True)


def test_an_optional_package_may_be_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = doctor._extra("mlflow", "tracking")
    assert (check.status, check.detail) == ("missing", "pip install 'lightning-secure[tracking]'")


def test_broken_cryptography_is_noticed(monkeypatch):
    from cryptography.hazmat.primitives.ciphers import aead

    class Careless:
        def __init__(self, key):
            pass

        def encrypt(self, nonce, data, aad):
            return bytes(32)

        def decrypt(self, nonce, data, aad):
            return bytes(16)  # accepts whatever comes

    monkeypatch.setattr(aead, "AESGCM", Careless)
    assert doctor._encryption().status == "bad"


def test_a_gpu_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H200")
    assert doctor._accelerator().detail == "2 x NVIDIA H200"
