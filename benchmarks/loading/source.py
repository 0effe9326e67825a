"""The rows that every system stores, and the sum that shows that it delivered them.

Only numpy and the standard library: the peers' environment imports this too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Size", "digest", "make_rows", "open_rows", "row_digests"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A kind of row: an image as raw bytes, and a label of 64 bits.

    Attributes:
        name: What it is called in results.
        shape: Shape of the image, uint8.
        rows: How many rows the dataset has.
        batch: Rows a batch where rows are read in order or shuffled.
        random_batch: Rows a batch in fully random access.
        random_rows: How many rows a pass of fully random access reads.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    batch: int
    random_batch: int
    random_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, label included."""
        return math.prod(self.shape) + 8


def make_rows(folder: Path, size: Size, *, seed: int) -> None:
    """Write ``x.npy``, ``y.npy`` and ``order.npy``, the order of fully random access."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pixels = generator.bytes(size.rows * (size.row_bytes - 8))
    np.save(folder / "x.npy", np.frombuffer(pixels, np.uint8).reshape(size.rows, *size.shape))
    # As good as unique: a row that comes twice, or under another's label, changes the sum.
    np.save(folder / "y.npy", generator.integers(0, 2**62, size.rows))
    np.save(folder / "order.npy", generator.permutation(size.rows)[: size.random_rows])


def open_rows(folder: Path) -> tuple[Array, Array, Array]:
    """Return images, labels and the random order, the images mapped from the disk."""
    x = np.load(folder / "x.npy", mmap_mode="r")
    return x, np.load(folder / "y.npy"), np.load(folder / "order.npy")


def row_digests(x: Array, y: Array) -> npt.NDArray[np.int64]:
    """Return for each row a number that depends on every byte of the image, and on the label.

    Args:
        x: Images, shape ``(n, ...)``, uint8, each a multiple of 8 bytes.
        y: Labels, shape ``(n,)``, int64.
    """
    total: npt.NDArray[np.int64] = x.reshape(len(x), -1).view(np.int64).sum(1) * (2 * y + 1)
    return total


def digest(x: Array, y: Array) -> int:
    """Return the sum of :func:`row_digests` modulo 2**64: how the consumer touches a batch."""
    return int(row_digests(x, y).sum()) % 2**64
