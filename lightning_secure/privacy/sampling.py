"""Poisson sampling: each row takes part in each step by its own coin toss."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from lightning_secure.compat.torch import pin_memory
from lightning_secure.crypto.keystream import Keystream
from lightning_secure.errors import ConfigError


class Gaps(Protocol):
    """A source of geometric numbers: a numpy generator, or :class:`SecureGaps`."""

    def geometric(self, p: float, size: int) -> npt.NDArray[np.int64]:
        """Return ``size`` numbers of tosses up to the first success."""


class SecureGaps:
    """Geometric numbers from an AES-256-CTR keystream.

    Args:
        stream: Source of the bits; by default a new one, keyed by the operating system.
    """

    def __init__(self, stream: Keystream | None = None) -> None:
        self._stream = stream or Keystream()

    def geometric(self, p: float, size: int) -> npt.NDArray[np.int64]:
        """Return ``size`` numbers of tosses up to the first success, by the inverse distribution.

        Args:
            p: Probability of success, above 0 and at most 1.
            size: How many.

        The uniform numbers have 53 bits, so probabilities are met to within 2**-53.

        Source:
            Devroye 1986, Non-Uniform Random Variate Generation, chapter X.2.
        """
        if p >= 1:
            return np.ones(size, np.int64)
        bits = np.frombuffer(self._stream.read(8 * size), np.uint64) >> np.uint64(11)
        tosses = np.log((bits + 0.5) * 2.0**-53) / math.log1p(-p)
        # The rarest success at the smallest rate is beyond what an integer holds.
        gaps: npt.NDArray[np.int64] = np.minimum(tosses, 2.0**62).astype(np.int64) + 1
        return gaps


def poisson_draw(
    dataset_size: int, sample_rate: float, rng: Gaps | np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return the rows of one step, each drawn with probability ``sample_rate`` by itself.

    Args:
        dataset_size: Number of rows.
        sample_rate: Above 0 and at most 1.
        rng: Source of randomness.

    Returns:
        Row numbers in increasing order, without repetition; often not the expected count, and
        sometimes none at all.

    The gaps between drawn rows are geometric, so a draw costs as much as it has rows, not as much
    as there are rows to draw from.

    >>> rows = poisson_draw(1000, 0.1, SecureGaps())
    >>> 30 < len(rows) < 200, bool((rows[1:] > rows[:-1]).all())
    (True, True)
    """
    parts: list[npt.NDArray[np.int64]] = []
    last, expected = -1, dataset_size * sample_rate
    while last < dataset_size:
        # Enough to pass the end at once in all but one of some thousand draws.
        gaps = rng.geometric(sample_rate, size=int(expected + 4 * expected**0.5) + 8)
        # Clipped: numpy returns the largest integer for a gap beyond it, and sums would overflow.
        rows = last + np.cumsum(np.minimum(gaps, dataset_size + 1))
        parts.append(rows)
        last = int(rows[-1])
    rows = np.concatenate(parts)
    return rows[rows < dataset_size]


def seed_of_rank(seed: int | None, rank: int) -> int | None:
    """Return the seed of one of several processes, of which no two draw alike.

    Args:
        seed: Of the run; the first process has it unchanged. None stays None: the operating
            system seeds each process by itself.
        rank: Number of the process, from 0.

    >>> seed_of_rank(7, 0), seed_of_rank(7, 1) == seed_of_rank(7, 2)
    (7, False)
    """
    if seed is None or rank == 0:
        return seed
    words = np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1


class PoissonBatchSampler(Sampler[list[int]]):
    """Yields the rows of one epoch's steps.

    Args:
        dataset_size: Number of rows there are.
        sample_rate: Probability of each row, the same in every step.
        steps: Draws an epoch.
        seed: Makes the draws repeatable, and so not private. By default the operating system
            seeds the generator, in each process and copy anew, whatever ``seed_everything`` was
            given.
        secure: Whether the draws come from an AES-256-CTR keystream instead of numpy's PCG64.
        rank: Number of this process among those that train together.
        world_size: How many they are. Each draws from every ``world_size``-th row, a part that
            follows from the rows' numbers alone, with the rate and not the rate times its part: so
            each row is drawn by one coin toss in one process, as if there were one sampler.

    Raises:
        ConfigError: if ``secure`` is given with a seed.

    >>> batches = list(PoissonBatchSampler(1000, sample_rate=0.1, steps=3, seed=7))
    >>> len(batches), len(set(map(len, batches))) > 1  # the size of a draw varies
    (3, True)
    """

    def __init__(
        self,
        dataset_size: int,
        *,
        sample_rate: float,
        steps: int,
        seed: int | None = None,
        secure: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if secure and seed is not None:
            raise ConfigError(
                "secure_noise contradicts insecure_seed. Leave one of them out. Nothing was drawn."
            )
        self._part = range(rank, dataset_size, world_size)
        self._sample_rate = sample_rate
        self._steps = steps
        self._seed = seed
        self._secure = secure
        self._begin()

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._steps):
            if self._process != os.getpid():
                self._begin()  # a fork has its parent's generator, and would draw its rows
            drawn = poisson_draw(len(self._part), self._sample_rate, self._rng)
            yield (self._part.start + self._part.step * drawn).tolist()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._rng: Gaps | np.random.Generator
        self._rng = SecureGaps() if self._secure else np.random.default_rng(self._seed)

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not draw the same rows.
        return {k: v for k, v in vars(self).items() if k not in ("_rng", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()


class Chunk(NamedTuple):
    """Rows that go through the model at once.

    Attributes:
        size: How many.
        data: The batch that the user's code sees.
    """

    size: int
    data: Any


class LogicalBatch:
    """All rows of one step, in chunks that fit into memory.

    Args:
        chunks: At least one row each.

    To Lightning it is one opaque batch, and no collection that it would look into: one optimizer
    step, one step of the schedule, one entry in the account. It has no chunk when nothing was
    drawn, and is a step nevertheless.

    Attributes:
        chunks: The rows. Their number is as private as they are.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self.chunks = tuple(chunks)

    def pin_memory(self) -> LogicalBatch:
        """Return the same with its tensors in page-locked memory; called by the DataLoader."""
        return LogicalBatch(Chunk(chunk.size, _pinned(chunk.data)) for chunk in self.chunks)


class LogicalCollate:
    """Turns drawn samples into a :class:`LogicalBatch`.

    Args:
        collate_fn: Makes the batch of one chunk, as the user's DataLoader would.
        max_physical_batch_size: Most rows of a chunk.

    >>> import torch
    >>> collate = LogicalCollate(torch.utils.data.default_collate, max_physical_batch_size=2)
    >>> [(chunk.size, chunk.data) for chunk in collate([1, 2, 3]).chunks]
    [(2, tensor([1, 2])), (1, tensor([3]))]
    """

    def __init__(self, collate_fn: Callable[[Any], Any], *, max_physical_batch_size: int) -> None:
        self._collate_fn = collate_fn
        self._limit = max_physical_batch_size

    def __call__(self, samples: Sequence[Any]) -> LogicalBatch:
        """Split ``samples`` and collate each part."""
        parts = (
            samples[start : start + self._limit] for start in range(0, len(samples), self._limit)
        )
        return LogicalBatch(Chunk(len(part), self._collate_fn(part)) for part in parts)


def _pinned(data: Any) -> Any:
    return pin_memory(data)
