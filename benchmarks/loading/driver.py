"""The other end of :mod:`loading.serving`: starts the processes and asks them."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loading.serving import Cell

__all__ = ["Process", "SystemFailedError"]

_HERE = Path(__file__).parent.parent
_PATIENCE_SECONDS = 300


class SystemFailedError(Exception):
    """A system under measurement did not answer, or not with what it should have."""


class Process:
    """A system in a process of its own.

    Args:
        name: What it is called in messages.
        python: The interpreter, of this project's environment or of the peers'.
        module: What it runs, with arguments.
        log: Where the system's own output goes.
    """

    def __init__(self, name: str, python: Path, module: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        path = os.pathsep.join([str(_HERE), str(_HERE.parent)])
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", *module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=log.parent,
                env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
                bufsize=0,
            )
        self._answers = b""

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Return the answer to one request.

        Raises:
            SystemFailedError: if the system failed, ended, or was silent for five minutes.
        """
        assert self._process.stdin is not None
        line = json.dumps({"do": do, **request}) + "\n"
        try:
            self._process.stdin.write(line.encode())
        except BrokenPipeError:
            raise self._failed("has ended") from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise self._failed(f"failed at {do!r}: {answer['error']}")
        return answer

    def cell(self, do: str, cell: Cell) -> dict[str, Any]:
        """Ask about one cell."""
        paths = {"data": str(cell.data), "source": str(cell.source)}
        return self.ask(do, **{**asdict(cell), **paths})

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._answers:
                if not selector.select(_PATIENCE_SECONDS):
                    raise self._failed("was silent for too long")
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._failed("has ended")
                self._answers += part
        line, _, self._answers = self._answers.partition(b"\n")
        return line

    def _failed(self, how: str) -> SystemFailedError:
        tail = self._log.read_text(errors="replace")[-2000:]
        return SystemFailedError(f"{self.name} {how}\n{tail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10 if kind is None else 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
