"""A call of an fsspec file system, and the meaning of its failure."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, Final

#: An S3 client gets its answer to HEAD without a body, and then an expired token is just a 400.
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL})


def call(
    file_system: Any,
    method: str,
    arguments: tuple[str, ...],
    options: dict[str, Any],
    *,
    timeout: float,
) -> Any:
    """Call a method of a file system, within ``timeout`` seconds if it can be interrupted."""
    if not file_system.async_impl:
        return getattr(file_system, method)(*arguments, **options)
    if method == "pipe_file":  # the coroutine has another name for it
        arguments, options = (*arguments, options["value"]), options.copy()
        del options["value"]
    work = getattr(file_system, f"_{method}")(*arguments, **options)
    waiting = asyncio.wait_for(work, timeout)
    future = asyncio.run_coroutine_threadsafe(waiting, file_system.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()  # for a KeyboardInterrupt; otherwise it is done
        raise


def kind_of(error: BaseException) -> str:
    """Return ``missing``, ``exists``, ``denied``, or ``transient`` for all else."""
    # fsspec's HTTP says of anything that failed that it is not found; the status tells.
    status = getattr(error, "status", None) or getattr(error.__cause__, "status", None)
    if status in (401, 403):
        return "denied"
    if isinstance(error, FileNotFoundError):
        failed = status not in (None, 404, 410) or isinstance(error.__cause__, OSError)
        return "transient" if failed else "missing"
    if isinstance(error, FileExistsError) or _precondition_failed(error):
        return "exists"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) in _DENIED:
        return "denied"
    return "transient"


def _precondition_failed(error: BaseException) -> bool:
    response = getattr(error.__cause__, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict")
