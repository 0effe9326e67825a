"""What some tests need beyond Python's packages: where it is, and how a machine gets it.

Run as a script (``make services``) it installs what is missing, where that needs no password, and
names what is still missing afterwards; the exit code is 1 then. Needs nothing but Python.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REQUIRE_SERVICES = "LIGHTNING_SECURE_REQUIRE_SERVICES"
LIBRARY = "libsofthsm2.so"
#: Where distributions put SoftHSM's library, below the prefix of its tool.
LIBRARIES = ("lib*/softhsm", "lib*/*/softhsm", "lib*/pkcs11", "lib*")


@dataclass(frozen=True)
class Service:
    """One of them.

    Attributes:
        package: The name of Debian's package.
        found: Tells whether it is on this machine.
        covers: Files that only tests with this service can cover.
    """

    package: str
    found: Callable[[], bool]
    covers: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """Return the sentence for tests that are skipped without it."""
        return f"{self.package} is not installed: make services"


def softhsm_library() -> Path | None:
    """Return the PKCS#11 library that belongs to the ``softhsm2-util`` on the path."""
    tool = shutil.which("softhsm2-util")
    if tool is None:
        return None
    prefix = Path(tool).resolve().parents[1]
    places = (path for pattern in LIBRARIES for path in sorted(prefix.glob(pattern)))
    return next((place / LIBRARY for place in places if (place / LIBRARY).exists()), None)


def postgresql_program(name: str) -> str | None:
    """Return where one of PostgreSQL's programs is, if this user can run it."""
    users = {entry.pw_name for entry in pwd.getpwall()}
    if os.geteuid() == 0 and "postgres" not in users:  # which root runs it as
        return None
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(places[-1]) if places else None)


SOFTHSM = Service(
    "softhsm2",
    lambda: softhsm_library() is not None,
    ("lightning_secure/crypto/providers/pkcs11.py",),
)
POSTGRESQL = Service("postgresql", lambda: postgresql_program("initdb") is not None)


def missing() -> list[Service]:
    """Return the services that are not on this machine."""
    return [service for service in (SOFTHSM, POSTGRESQL) if not service.found()]


def say(text: str) -> None:
    """Print a line at once, before what other programs print."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def is_root() -> bool:
    """Return whether packages can be installed without sudo; by `id`, as scripts ask."""
    return subprocess.run(["id", "-u"], capture_output=True, text=True).stdout.strip() == "0"


def succeeds(command: list[str]) -> bool:
    """Return whether a command ends well; its output is dropped."""
    return subprocess.run(command, capture_output=True).returncode == 0


def install(packages: list[str]) -> str:
    """Install Debian packages, each for itself, and return what to say if one is still missing."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    run = ["env"] if is_root() else ["sudo", "-n", "env"]
    if not is_root() and not (shutil.which("sudo") and succeeds(run)):
        return "that needs root, or sudo without a password"
    say(f"installing {' and '.join(packages)} for the tests that need it (apt-get)")
    apt = [*run, "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    apt += ["-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::http::Timeout=30"]
    commands = [["update"], *(["install", "-y", "--no-install-recommends", p] for p in packages)]
    done = [subprocess.run([*apt, *c], capture_output=True, text=True) for c in commands]
    failed = [[*d.stderr.strip().splitlines(), "apt-get failed"] for d in done if d.returncode]
    return failed[-1][max(0, len(failed[-1]) - 2)] if failed else "apt-get put it elsewhere"


def main() -> int:
    """Install what is missing, and return 1 if something is missing still."""
    wanted = [service.package for service in missing()]
    if not wanted:
        return 0
    problem = install(wanted)
    left = [service.package for service in missing()]
    if not left:
        return 0
    names = " and ".join(left)
    required = os.environ.get(REQUIRE_SERVICES)
    effect = f"{REQUIRE_SERVICES} is set" if required else "the tests that need it are skipped"
    say(
        f"{names} could not be installed ({problem}): {effect}. "
        f"As root: apt-get update && apt-get install {' '.join(left)}"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
