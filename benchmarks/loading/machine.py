"""The machine of a measurement, without what would name it or its user."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "private_folder"]


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, AES instructions, memory, system and Python."""
    cpu = _fields("/proc/cpuinfo")
    memory = _fields("/proc/meminfo").get("MemTotal", "0 kB")
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "aes_instructions": "aes" in cpu.get("flags", cpu.get("Features", "")).split(),
        "ram_gb": round(int(memory.split()[0]) / 1e6),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def commit(folder: Path) -> str | None:
    """Return the commit that was measured, with ``+`` if files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def private_folder() -> Path:
    """Return a folder below the system's temporary one that no other user can have prepared.

    Raises:
        PermissionError: if it exists and belongs to another user, or others can write there.
    """
    folder = Path(tempfile.gettempdir()) / f"lightning-secure-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not only yours; remove it, or choose --cache")
    return folder


def _fields(path: str) -> dict[str, str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip(): value.strip() for name, _, value in pairs}
