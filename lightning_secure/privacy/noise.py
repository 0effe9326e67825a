"""Where the noise is added."""

from __future__ import annotations

import os
import secrets

import numpy as np
import torch
from torch import Tensor

__all__ = ["GaussianNoise"]


class GaussianNoise:
    """Gaussian noise from generators of its own, one a device.

    Args:
        seed: Makes the noise repeatable, and so not private. By default each generator is seeded
            by the operating system, in each process anew, forked ones too: ``seed_everything`` has
            no effect on it, and a resumed run does not repeat the noise of the run before.

    On CUDA the generator is torch's Philox with a seed of 63 bits. On the CPU it is numpy's PCG64
    with 128 bits of the system's entropy, because torch's generator there keeps the low 32 bits of
    its seed, and whoever knows all rows but one could try them all. Neither is a cryptographic
    generator.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._begin()

    def add_(self, tensor: Tensor, *, std: float) -> Tensor:
        """Add independent noise to every element, in place.

        Args:
            tensor: Any shape, floating point; its dtype is that of the noise.
            std: Standard deviation, in the unit of ``tensor``. Zero adds nothing.
        """
        if std == 0:
            return tensor
        self._forget_another_process()
        if tensor.device.type == "cpu":
            return tensor.add_(self._drawn(tensor), alpha=std)
        noise = torch.empty_like(tensor).normal_(0, std, generator=self._generator(tensor.device))
        return tensor.add_(noise)

    def _forget_another_process(self) -> None:
        # A fork has its parent's generators, and would draw its noise.
        if self._process != os.getpid():
            self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._on_cpu: np.random.Generator | None = None

    def _drawn(self, tensor: Tensor) -> Tensor:
        if self._on_cpu is None:
            self._on_cpu = np.random.default_rng(self._seed)
        dtype = np.float64 if tensor.dtype.itemsize > 4 else np.float32
        return torch.from_numpy(self._on_cpu.standard_normal(tuple(tensor.shape), dtype))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(secrets.randbits(63) if self._seed is None else self._seed)
            self._generators[device] = generator
        return self._generators[device]

    def __getstate__(self) -> dict[str, int | None]:
        # A copy in another process must not draw the same noise.
        return {"_seed": self._seed}

    def __setstate__(self, state: dict[str, int | None]) -> None:
        self._seed = state["_seed"]
        self._begin()
