"""Where the noise is added."""

from __future__ import annotations

import secrets

import torch
from torch import Tensor

__all__ = ["GaussianNoise"]


class GaussianNoise:
    """Gaussian noise from generators of its own, one a device.

    Args:
        seed: Makes the noise repeatable, and so not private. By default each generator is seeded
            by the operating system, in each process anew: ``seed_everything`` has no effect on it,
            and a resumed run does not repeat the noise of the run before.

    The generators are torch's: Philox on CUDA and Mersenne Twister on the CPU. They are fit for
    noise that an adversary sees the sum of, and are no cryptographic generators.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def add_(self, tensor: Tensor, *, std: float) -> Tensor:
        """Add independent noise to every element, in place.

        Args:
            tensor: Any shape, floating point; its dtype is that of the noise.
            std: Standard deviation, in the unit of ``tensor``. Zero adds nothing.
        """
        if std == 0:
            return tensor
        noise = torch.empty_like(tensor).normal_(0, std, generator=self._generator(tensor.device))
        return tensor.add_(noise)

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
        self._generators = {}
