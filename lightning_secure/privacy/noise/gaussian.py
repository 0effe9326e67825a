"""Gaussian noise for sums of gradients and other releases."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from typing import Any, Final

import torch
from torch import Tensor

from lightning_secure.crypto.keystream import Keystream
from lightning_secure.errors import ConfigError

#: Numbers are drawn in blocks of at most and at least so many: few calls, and bounded memory.
_LARGEST: Final = 2**17
_SMALLEST: Final = 2**10


class GaussianNoise:
    """Gaussian noise from generators of its own, one a device.

    Args:
        seed: Makes the noise repeatable, and so not private. By default each generator is keyed
            by the operating system, in each process anew, forked ones too: ``seed_everything`` has
            no effect on it, and a resumed run does not repeat the noise of the run before.
        secure: Whether noise on every device comes from the keystream, in double precision, each
            number made of four; see :func:`secure_normals`. It refuses a seed.

    On the CPU the bits are an AES-256-CTR keystream in any case. On CUDA, unless ``secure``, the
    generator is torch's Philox with a seed of 63 bits, which is no cryptographic one.

    Raises:
        ConfigError: if ``secure`` is given with a seed.

    >>> noise = GaussianNoise()
    >>> 0.9 < float(noise.add_(torch.zeros(100_000), std=1.0).std()) < 1.1
    True
    """

    def __init__(self, seed: int | None = None, *, secure: bool = False) -> None:
        if secure and seed is not None:
            raise ConfigError(
                "secure_noise contradicts insecure_seed: noise from a known seed can be "
                "subtracted. Leave one of them out."
            )
        self._seed = seed
        self._secure = secure
        self._begin()

    def add_(self, tensor: Tensor, *, std: float) -> Tensor:
        """Add independent noise to every element, in place.

        Args:
            tensor: Any shape, floating point. Its dtype is that of the noise; with ``secure`` the
                sum is formed in double precision and rounded once.
            std: Standard deviation, in the unit of ``tensor``. Zero adds nothing.
        """
        if std == 0:
            return tensor
        self._forget_another_process()
        if not self._secure and tensor.device.type != "cpu":
            generator = self._generator(tensor.device)
            return tensor.add_(torch.empty_like(tensor).normal_(0, std, generator=generator))
        double = self._secure or tensor.dtype == torch.float64
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()
        start = 0
        while start < len(flat):
            piece = self._next(len(flat) - start, torch.float64 if double else torch.float32)
            flat[start : start + len(piece)].add_(piece.to(flat.device), alpha=std)
            start += len(piece)
        return tensor if tensor.is_contiguous() else tensor.copy_(flat.view_as(tensor))

    def _next(self, most: int, dtype: torch.dtype) -> Tensor:
        """Return standard normals that were never returned before, at least one."""
        ready = self._ready.get(dtype)
        if ready is None or not len(ready):
            pairs = max(_SMALLEST, min(_LARGEST, most + 1)) // 2
            make = secure_normals if self._secure else normals
            ready = make(self._stream, pairs, dtype)
        self._ready[dtype] = ready[most:]
        return ready[:most]

    def _forget_another_process(self) -> None:
        # A fork has its parent's generators, and would draw its noise.
        if self._process != os.getpid():
            self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._ready: dict[torch.dtype, Tensor] = {}
        self._stream = Keystream(None if self._seed is None else _key_of(self._seed))

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.manual_seed(secrets.randbits(63) if self._seed is None else self._seed)
            self._generators[device] = generator
        return self._generators[device]

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process must not draw the same noise.
        return {"_seed": self._seed, "_secure": self._secure}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._seed, self._secure = state["_seed"], state["_secure"]
        self._begin()


def normals(stream: Keystream, pairs: int, dtype: torch.dtype) -> Tensor:
    """Return standard normal numbers, two from each pair of uniform ones.

    Args:
        stream: Source of the bits.
        pairs: Half as many as are returned.
        dtype: float32 or float64, in which they are computed.

    In float32 the radius comes from 63 bits, so that the tail reaches 9.4 standard deviations, and
    the angle from 32; in float64 from 53 bits and half a unit, and 64, and the tail reaches 8.6.

    Source:
        Box and Muller 1958, "A Note on the Generation of Random Normal Deviates".
    """
    wide = dtype == torch.float64
    angles = torch.int64 if wide else torch.int32
    bits = stream.read(pairs * (8 + angles.itemsize))
    radius = torch.frombuffer(bits, dtype=torch.int64, count=pairs)
    angle = torch.frombuffer(bits, dtype=angles, count=pairs, offset=8 * pairs)
    if wide:
        radius.bitwise_right_shift_(11)  # an arithmetic shift: the sign's copies are masked out
    size = 53 if wide else 63
    # Never 0, of which the logarithm is infinite; rounding may make it 1, of which it is 0.
    uniform = radius.bitwise_and_(2**size - 1).to(dtype).add_(0.5).mul_(2.0**-size)
    length = uniform.log_().mul_(-2).sqrt_()
    turn = angle.to(dtype).mul_(math.pi / 2 ** (8 * angles.itemsize - 1))
    found = torch.empty(2, pairs, dtype=dtype)
    torch.cos(turn, out=found[0])
    torch.sin(turn, out=found[1])
    return found.mul_(length).view(-1)


def secure_normals(stream: Keystream, pairs: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers, each the sum of four over two, in double precision.

    Args:
        stream: Source of the bits.
        pairs: Half as many as are returned.
        dtype: Only float64.

    A number that one draw makes can have only some of the floating-point values around it, and
    which ones tells something of what it was added to. A sum of four has so many more ways to come
    about that searching them is out of reach. That answers the known attacks; it is no proof that
    floating-point noise is as private as that of real numbers.

    Source:
        Mironov 2012, "On Significance of the Least Significant Bits for Differential Privacy";
        Holohan and Braghin 2021, arXiv:2107.10138, with n = 2.
    """
    # Two numbers share their four pairs, as those of Box and Muller share one.
    four = normals(stream, 4 * pairs, dtype).view(2, 4, pairs)
    return four.sum(1).div_(2).view(-1)


def _key_of(seed: int) -> bytes:
    return hashlib.sha256(f"lightning_secure insecure_seed {seed}".encode()).digest()
