"""``lightning-secure doctor``: what is installed, what is missing, what must not stay."""

from __future__ import annotations

import importlib.util
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Final, Literal

import click
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_secure._version import __version__

__all__ = ["Check", "doctor", "run_checks"]

_DISTRIBUTION: Final = "lightning-secure"
#: Releases that must not be used, and why.
_KNOWN_BAD: Final = {
    ("lightning", "2.6.2"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("lightning", "2.6.3"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.2"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.3"): "carried malware (GHSA-w37p-236h-pfx3)",
}
_EXTRAS: Final = {
    "mlflow": "tracking",
    "matplotlib": "plot",
    "pkcs11": "pkcs11",
    "hvac": "vault",
    "boto3": "aws",
    "s3fs": "s3",
}
_NAMES_ON_PYPI: Final = {"pkcs11": "python-pkcs11"}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        name: What was looked at.
        status: ``ok``; ``missing`` for something optional; ``bad`` for what must be mended.
        detail: What was found, and what to do.
    """

    name: str
    status: Literal["ok", "missing", "bad"]
    detail: str


@click.command()
def doctor() -> None:
    """Show what is installed, what is missing, and what must not stay as it is."""
    checks = run_checks()
    table = Table(title=f"{_DISTRIBUTION} {__version__}")
    for heading in ("", "", "found"):
        table.add_column(heading)
    colours = {"ok": "green", "missing": "yellow", "bad": "red"}
    for check in checks:
        colour = colours[check.status]
        table.add_row(f"[{colour}]{check.status}[/]", check.name, escape(check.detail))
    Console().print(table)
    if any(check.status == "bad" for check in checks):
        sys.exit(1)


def run_checks() -> list[Check]:
    """Look at Python, the packages and the cryptography."""
    return [
        Check("python", "ok", platform.python_version()),
        *(_package(Requirement(line)) for line in _required()),
        *(_extra(name, extra) for name, extra in _EXTRAS.items()),
        _encryption(),
        _accelerator(),
    ]


def _required() -> list[str]:
    return [line for line in requires(_DISTRIBUTION) or [] if "extra ==" not in line]


def _package(requirement: Requirement) -> Check:
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "bad", f"not installed; pip install '{requirement}'")
    if (requirement.name, found) in _KNOWN_BAD:
        return Check(requirement.name, "bad", f"{found} {_KNOWN_BAD[requirement.name, found]}")
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(requirement.name, "bad", f"{found}, and {requirement.specifier} is needed")
    return Check(requirement.name, "ok", found)


def _extra(name: str, extra: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, "missing", f"pip install '{_DISTRIBUTION}[{extra}]'")
    return Check(name, "ok", version(_NAMES_ON_PYPI.get(name, name)))


def _encryption() -> Check:
    """Encrypt the test case 14 of the GCM specification, and see a flipped bit refused."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(bytes(32))
    sealed = cipher.encrypt(bytes(12), bytes(16), None)
    expected = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
    try:
        cipher.decrypt(bytes(12), flipped, None)
    except InvalidTag:
        if sealed.hex() == expected:
            return Check("AES-256-GCM", "ok", "known answer matches, tampering is refused")
    return Check("AES-256-GCM", "bad", "does not behave as specified; nothing may be sealed here")


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Check("GPU", "ok", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return Check("GPU", "missing", "none; training runs on the CPU")
