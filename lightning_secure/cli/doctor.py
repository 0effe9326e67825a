"""``lightning-secure doctor``: what is installed, what is missing, what must not stay."""

from __future__ import annotations

import functools
import importlib.machinery
import json
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Final, Literal

import click
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_secure._version import __version__

_DISTRIBUTION: Final = "lightning-secure"
#: Releases that must not be used, and why.
_KNOWN_BAD: Final = {
    ("lightning", "2.6.2"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("lightning", "2.6.3"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.2"): "carried malware (GHSA-w37p-236h-pfx3)",
    ("pytorch-lightning", "2.6.3"): "carried malware (GHSA-w37p-236h-pfx3)",
}
#: The extra that holds the tools of this package's own development.
_DEVELOPMENT: Final = "dev"
#: Modules whose names are not those of their distributions.
_MODULES: Final = {
    "google-re2": "re2",
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "pyahocorasick": "ahocorasick",
    "python-pkcs11": "pkcs11",
    "python-stdnum": "stdnum",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
#: How long the imports of one process may take.
_SECONDS: Final = 300
_IMPORT: Final = """
import importlib, json, os, sys
sys.path[:], names = json.loads(sys.argv[1])
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name in names:
    try:
        importlib.import_module(name)
        problem = None
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
    print(json.dumps([name, problem]), file=answers)
os._exit(0)
"""

_Status = Literal["ok", "missing", "bad"]


@dataclass(frozen=True)
class Check:
    """A line of the doctor's report.

    Attributes:
        name: The part that was checked.
        status: ``ok``; ``missing`` for something optional; ``bad`` for what must be mended.
        detail: The finding, and the way on.
    """

    name: str
    status: _Status
    detail: str


@click.command()
def doctor() -> None:
    """Show what is installed, what is missing, and what must not stay as it is."""
    console = Console()
    with console.status("importing what is installed"):
        checks = run_checks()
    table = Table(title=f"{_DISTRIBUTION} {__version__}")
    for heading in ("", "", "found"):
        table.add_column(heading)
    colours = {"ok": "green", "missing": "yellow", "bad": "red"}
    for check in checks:
        colour = colours[check.status]
        table.add_row(f"[{colour}]{check.status}[/]", escape(check.name), escape(check.detail))
    console.print(table)
    if any(check.status == "bad" for check in checks):
        sys.exit(1)


def run_checks() -> list[Check]:
    """Look at Python, the packages, the extras and the cryptography."""
    python = Check("python", "ok", platform.python_version())
    try:
        required, extras = _needed(_DISTRIBUTION), {name: _of_extra(name) for name in _extras()}
    except Exception:  # noqa: BLE001 - damaged metadata fails in many ways
        required, extras = [], {}
    if not required:
        found = f"its metadata is missing or damaged; pip install --force-reinstall {_DISTRIBUTION}"
        return [python, Check(_DISTRIBUTION, "bad", found), _encryption({}), _accelerator({})]
    everything = [*required, *(need for needs in extras.values() for need in needs)]
    modules = sorted({_module(need.name) for need in everything})
    broken = _unimportable(tuple(modules), tuple(map(str, sys.path)))
    return [
        python,
        *(_package(requirement, broken) for requirement in required),
        *_infected({requirement.name for requirement in required}),
        *(_extra(name, needs, broken) for name, needs in extras.items()),
        _encryption(broken),
        _accelerator(broken),
    ]


def _extras() -> list[str]:
    """Return the extras that the installed package declares, without that of its development."""
    declared = metadata(_DISTRIBUTION).get_all("Provides-Extra") or []
    return [name for name in declared if name != _DEVELOPMENT]


def _needed(distribution: str, extra: str = "") -> list[Requirement]:
    """Return what a distribution requires here: always, or for one of its extras only."""
    needed = []
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        asked = marker is None or marker.evaluate({"extra": extra})
        if asked and (always is (not extra)):
            needed.append(requirement)
    return needed


def _of_extra(name: str) -> list[Requirement]:
    """Return what an extra requires, with the extras of others that it names, once each."""
    needed = _needed(_DISTRIBUTION, name)
    for requirement in needed:  # grows
        for extra in sorted(requirement.extras):
            try:
                further = _needed(requirement.name, extra)
            except Exception:  # noqa: BLE001 - absent or damaged, as `_look` will say
                break
            needed += [need for need in further if need.name not in {n.name for n in needed}]
    return needed


def _module(distribution: str) -> str:
    return _MODULES.get(distribution, distribution.replace("-", "_"))


@functools.cache
def _unimportable(modules: tuple[str, ...], path: tuple[str, ...]) -> dict[str, str]:
    """Return why modules cannot be imported: tried in other processes, which one may end."""
    broken: dict[str, str] = {}
    left = list(modules)
    while left:
        asked = json.dumps([path, left])
        try:
            done = subprocess.run(  # noqa: S603 - this Python, and names from metadata
                [sys.executable, "-W", "ignore", "-c", _IMPORT, asked],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_SECONDS,
            )
            output, ending = done.stdout, f"it ends Python ({_ending(done.returncode)})"
        except subprocess.TimeoutExpired as error:
            output, ending = error.stdout or b"", f"it takes more than {_SECONDS} s"
        answers = [json.loads(line) for line in output.splitlines()]
        broken |= {name: problem for name, problem in answers if problem is not None}
        left = left[len(answers) :]
        if left:
            broken[left.pop(0)] = ending
    return broken


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _look(requirement: Requirement, broken: dict[str, str]) -> tuple[_Status, str]:
    """Return whether a requirement is met, and what was found."""
    name, module = requirement.name, _module(requirement.name)
    try:
        found = Version(version(name))
    except PackageNotFoundError:
        return "missing", "not installed" + _impostor(module)
    except Exception:  # noqa: BLE001 - damaged metadata fails in many ways
        return "bad", f"its metadata is damaged; pip install --force-reinstall '{name}'"
    if (name, str(found)) in _KNOWN_BAD:
        return "bad", f"{found} {_KNOWN_BAD[name, str(found)]}"
    if not requirement.specifier.contains(found, prereleases=True):
        return "bad", f"{found}, and {requirement.specifier} is needed"
    if module in broken:
        return "bad", f"{found}, but importing {module} fails: {_line(broken[module])}"
    return "ok", str(found)


def _impostor(module: str) -> str:
    """Return a remark on a module that is there although its distribution is not installed."""
    spec = importlib.machinery.PathFinder.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    return f" ({Path(spec.origin).parent} belongs to another distribution, or to none)"


def _package(requirement: Requirement, broken: dict[str, str]) -> Check:
    status, found = _look(requirement, broken)
    if status == "missing":
        return Check(requirement.name, "bad", f"{found}; pip install '{requirement}'")
    return Check(requirement.name, status, found)


def _infected(known: set[str]) -> list[Check]:
    """Find bad releases of packages that this one does not require itself."""
    names = sorted({name for name, _ in _KNOWN_BAD} - known)
    looks = [(name, *_look(Requirement(name), {})) for name in names]
    return [Check(name, status, found) for name, status, found in looks if status == "bad"]


def _extra(name: str, needs: list[Requirement], broken: dict[str, str]) -> Check:
    looks = [(need.name, *_look(need, broken)) for need in needs]
    statuses = {status for _, status, _ in looks}
    worst: _Status = "bad" if "bad" in statuses else "missing" if "missing" in statuses else "ok"
    shown = [look for look in looks if look[1] == worst]
    between = " " if worst == "ok" else ": "
    detail = ", ".join(f"{package}{between}{found}" for package, _, found in shown)
    if worst == "missing":
        detail = f"{detail}; pip install '{_DISTRIBUTION}[{name}]'"
    return Check(f"extra {name}", worst, detail)


def _encryption(broken: dict[str, str]) -> Check:
    """Encrypt the test case 14 of the GCM specification, and see a flipped bit refused."""
    if "cryptography" in broken:
        return Check("AES-256-GCM", "bad", "cannot be tried: importing cryptography fails")
    try:
        as_specified = _known_answer()
    except Exception as error:  # noqa: BLE001 - whatever it is, nothing can be encrypted
        return Check("AES-256-GCM", "bad", f"cannot be tried: {_told(error)}")
    if as_specified:
        return Check("AES-256-GCM", "ok", "known answer matches, tampering is refused")
    return Check("AES-256-GCM", "bad", "does not behave as specified; nothing may be sealed here")


def _known_answer() -> bool:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    cipher = AESGCM(bytes(32))
    sealed = cipher.encrypt(bytes(12), bytes(16), None)
    expected = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    flipped = bytes([sealed[0] ^ 1]) + sealed[1:]
    try:
        cipher.decrypt(bytes(12), flipped, None)
    except InvalidTag:
        return sealed.hex() == expected
    return False


def _accelerator(broken: dict[str, str]) -> Check:
    if "torch" in broken:
        return Check("GPU", "missing", "unknown: importing torch fails")
    try:
        import torch

        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            names = {torch.cuda.get_device_name(i) for i in range(count)}
            return Check("GPU", "ok", f"{count} x {', '.join(sorted(names))}")
    except Exception as error:  # noqa: BLE001 - drivers and builds fail in many ways
        return Check("GPU", "missing", f"unknown: {_told(error)}")
    return Check("GPU", "missing", "none; training runs on the CPU")


def _told(error: Exception) -> str:
    return _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    """Put a message into one line of a table."""
    return " ".join(text.split())[:200]
