"""The position of a run in an epoch, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from lightning_secure.data.loader.epoch_order import Interval
from lightning_secure.errors import ManifestMismatchError

_VERSION: Final = 1
#: A window is in memory as a whole, so that more than this is a mistake.
MAX_WINDOW_BYTES: Final = 2**40


@dataclass(frozen=True, kw_only=True)
class Position:
    """The rows of an epoch that are still to be read, by any process.

    Attributes:
        epoch: Number of the epoch, from 0.
        seed: Of its order.
        window_bytes: Of its order.
        shuffle: Whether it has an order of its own.
        order: Digest of the order, see :func:`~lightning_secure.data.loader.epoch_order.digest`.
        content: The split's content digest.
        left: Intervals of the epoch's line that no process has read.
    """

    epoch: int
    seed: int
    window_bytes: int
    shuffle: bool
    order: str
    content: str
    left: tuple[Interval, ...]

    def to_state(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, which every checkpoint can hold."""
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "seed": self.seed,
            "window_bytes": self.window_bytes,
            "shuffle": self.shuffle,
            "order": self.order,
            "content": self.content,
            "left": [[start, stop] for start, stop in self.left],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, rows: int, content: str) -> Self:
        """Parse what :meth:`to_state` returned.

        Args:
            state: From a checkpoint.
            rows: Rows of the split.
            content: Its content digest.

        Raises:
            ManifestMismatchError: if the position was saved while other rows were read, by a
                version of this package that orders them in another way, or is damaged.
        """
        try:
            if state["version"] != _VERSION:
                raise ManifestMismatchError(
                    f"the checkpoint's position in the epoch has version {state['version']!r}, "
                    "which this package does not know: it cannot say which rows were seen. "
                    "Nothing was read."
                )
            if state["content"] != content:
                raise ManifestMismatchError(
                    "the checkpoint was saved in the middle of an epoch over other rows than the "
                    "split holds now: it cannot say which of these were seen. Nothing was read."
                )
            left = tuple(Interval(int(start), int(stop)) for start, stop in state["left"])
            position = cls(
                epoch=int(state["epoch"]),
                seed=int(state["seed"]),
                window_bytes=int(state["window_bytes"]),
                shuffle=bool(state["shuffle"]),
                order=str(state["order"]),
                content=content,
                left=left,
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            position, left = None, ()
        ends = [0, *(end for interval in left for end in interval)]
        if (
            position is None
            or any(start >= stop for start, stop in left)
            or ends != sorted(ends)
            or ends[-1] > rows
            or not 1 <= position.window_bytes <= MAX_WINDOW_BYTES
            or not 0 <= position.epoch < 2**64
            or not 0 <= position.seed < 2**64
        ):
            raise ManifestMismatchError(
                "the checkpoint's position in the epoch is damaged: it cannot say which rows were "
                "seen. Nothing was read."
            )
        return position
