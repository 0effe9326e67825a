"""Seeds of trial runs, drawn anew each time, and some by which a coin is sure to fall."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import torch

from lightning_secure.privacy.checks.trial_run import Seed

#: Comparisons of a pass that draws random numbers: a coin of probability p falls in none with
#: (1 - p) ** COINS, which is 0.01 for 0.1.
COINS: Final = 45
_FORCED: Final = (5, 3)  # with a low and with a high first number
_EXTREME: Final = 1 / 500
_LEGACY: Final = np.random.RandomState(0)


class Seeds:
    """Seeds that the operating system draws, so that no step can be made to fit them.

    Args:
        seed: Makes them repeatable, for tests.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._source = random.SystemRandom() if seed is None else random.Random(seed)  # noqa: S311

    def number(self) -> int:
        """Return a seed that every generator takes."""
        return self._source.getrandbits(31)

    def below(self, stop: int) -> int:
        """Return a number from 0 to ``stop``, exclusively."""
        return self._source.randrange(stop)

    def coins(self, done: int) -> Iterator[Seed]:
        """Yield seeds for ``COINS - done`` comparisons, extreme first numbers before all others.

        By those, a coin that a step tosses before it draws anything else falls, whatever its
        probability is above 1/500; and one that falls in almost all steps does not.
        """
        for high, count in enumerate(_FORCED):
            for _ in range(count):
                yield self.extreme(high=bool(high))
        for _ in range(COINS - sum(_FORCED) - done):
            yield self.number()

    def extreme(self, *, high: bool) -> Seed:
        """Return seeds by which each generator's first uniform number is near 0, or near 1."""
        return tuple(self._search(first, high=high) for first in (_torch, _python, _numpy))  # type: ignore[return-value]

    def _search(self, first: Callable[[int], float], *, high: bool) -> int:
        while True:
            seed = self.number()
            value = first(seed)
            if (1 - value if high else value) < _EXTREME:
                return seed


def _torch(seed: int) -> float:
    return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))


def _python(seed: int) -> float:
    return random.Random(seed).random()  # noqa: S311 # no secret: it is what the module will draw


def _numpy(seed: int) -> float:
    _LEGACY.seed(seed)  # making a new one takes thirty times as long
    return float(_LEGACY.random_sample())
