"""Whatever draws at random between the rows and their gradients: dropout, augmentation.

A mask that depends on the user's seed can be computed. Worse, masks are drawn
one row after the other, so with a fixed seed one more row shifts the mask of every row behind it,
and the sum of the clipped gradients moves by far more than one row's. Only unknown masks
are as likely with the row as without it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from lightning_secure.compat.torch import mps_generator

_LEGACY: Final[Any] = np.random  # its stubs leave out what exchanges the generator
# torch's CPU generator as `get_state` returns it: the seed (8 bytes), where it is in its block
# (16), 624 words of 32 bits in 8 bytes each, and what is left of a pair of normals. Its own seeding
# keeps 32 bits of a seed, which could all be tried, so the words are set.
_WORDS_AT: Final = 24
_WORDS: Final = 624


class FreshRandomness:
    """Global generators that the operating system has seeded, for as long as a block lasts.

    Args:
        seed: Makes them repeatable, and so not private.
        stream: Tells apart what has the same seed.

    Covered are torch's generator on the CPU and that of one device, Python's ``random``, and
    numpy's legacy functions. A generator that the module or dataset has made is its own affair.

    Guarantees:
        What is drawn inside depends on nothing outside and is not repeated, whatever
        ``seed_everything`` was given; what is drawn after it depends on nothing inside.
    """

    def __init__(self, seed: int | None = None, *, stream: int = 0) -> None:
        self._bytes: Callable[[int], bytes] = os.urandom
        if seed is not None:
            sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
            self._bytes = np.random.default_rng(sequence).bytes
        self._numpy = np.random.MT19937()
        self._state = torch.Generator().manual_seed(0).get_state()

    @contextmanager
    def apart(self, device: torch.device | None = None) -> Iterator[None]:
        """Run a block with fresh generators, and put the former ones back.

        Args:
            device: Whose generator is covered besides those of the CPU.
        """
        generators = [torch.default_generator, *_generators(device)]
        states = [generator.get_state() for generator in generators]
        python, legacy = random.getstate(), _LEGACY.get_bit_generator()
        try:
            # Exchanged and not copied: copying costs more than all the rest.
            _LEGACY.set_bit_generator(self._numpy)
            self.seed_all(device)
            yield
        finally:
            _LEGACY.set_bit_generator(legacy)
            random.setstate(python)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def seed_all(self, device: torch.device | None = None) -> None:
        """Seed the generators for good, as in a process that does nothing else."""
        draw = self._bytes
        state = self._state.numpy()
        state[:8] = np.frombuffer(draw(8), np.uint8)  # what torch.initial_seed returns
        state[7] &= 0x7F
        words = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(np.uint64)
        words[:] = np.frombuffer(draw(4 * _WORDS), np.uint32)
        torch.default_generator.set_state(self._state)
        for generator in _generators(device):
            generator.manual_seed(int.from_bytes(draw(8), "little") >> 1)
        random.seed(int.from_bytes(draw(16), "little"))
        _LEGACY.seed(np.frombuffer(draw(32), np.uint32))


class WorkerInit:
    """Seeds a loader's worker by the operating system, before and after the user's own function.

    Args:
        user: The user's ``worker_init_fn``.

    torch seeds each worker from a number that it draws by the user's seed.
    """

    def __init__(self, user: Callable[[int], None] | None) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        """Seed this process; the user's function may set up what it likes in between."""
        randomness = FreshRandomness()
        # Before it, because it may derive generators from torch.initial_seed.
        randomness.seed_all()
        if self._user is not None:
            self._user(worker)
            randomness.seed_all()


def _generators(device: torch.device | None) -> list[torch.Generator]:
    kind: str = "cpu" if device is None else device.type
    if device is None or kind == "cpu":
        return []
    module: Any = torch.get_device_module(device)
    if kind == "cuda":
        index: Any = device.index
        return [module.default_generators[module.current_device() if index is None else index]]
    return [mps_generator(module)] if kind == "mps" else []
