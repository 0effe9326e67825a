"""Copying batches to a CUDA device while the batch before is computed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class CopyStream(Protocol):
    """A queue of copies that runs beside the computation."""

    def copy(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Begin copying; return the copy, and something to wait for."""

    def hand_over(self, batch: dict[str, Any], done: Any) -> None:
        """Let the computation wait for a copy."""


class CudaCopyStream:
    """Copies on a CUDA stream of its own.

    Args:
        device: Where to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event]:
        """Begin copying from page-locked memory; the host does not wait."""
        with torch.cuda.stream(self._stream):
            moved = {
                name: column.to(self._device, non_blocking=True)
                if isinstance(column, Tensor)
                else column
                for name, column in batch.items()
            }
            return moved, self._stream.record_event()

    def hand_over(self, batch: dict[str, Any], done: torch.cuda.Event) -> None:
        """Make the current stream wait, and tell the allocator that it uses the memory."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for column in batch.values():
            if isinstance(column, Tensor):
                column.record_stream(current)


def on_device(batches: Iterable[dict[str, Any]], stream: CopyStream) -> Iterator[dict[str, Any]]:
    """Return copies of ``batches``, the next one always under way.

    Args:
        batches: In page-locked memory. Each is kept until its copy was handed over and another one
            begun; torch itself does not use page-locked memory again before the copy is done.
        stream: The CUDA stream that copies.
    """
    ahead: tuple[dict[str, Any], Any] | None = None
    for batch in batches:
        following = stream.copy(batch)
        if ahead is not None:
            stream.hand_over(*ahead)
            yield ahead[0]
        ahead = following
    if ahead is not None:
        stream.hand_over(*ahead)
        yield ahead[0]
