"""Products of bfloat16 operands in float32, as the tensor cores of a GPU form them.

The product of two bfloat16 numbers is exact in float32, so that a norm or a sum of operands that
hold such numbers anyway loses nothing but the rounding of float32 additions. On a GPU that is the
fast unit; elsewhere the operands are widened, which gives the same products.

Source:
    Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores": additions may truncate, which is
    an error of twice the unit roundoff.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_devices_only = True


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type that norms and sums are computed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operands(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer's products are formed of: as it is in bfloat16, otherwise widened.

    Args:
        inputs: Of a layer; where its output is bfloat16, they are what it multiplied.
        grads: Gradients of its output.
    """
    dtype = grads.dtype if is_short(grads) else widened(grads.dtype)
    return inputs.to(dtype), grads.to(dtype)


def is_short(tensor: Tensor) -> bool:
    """Return whether a tensor holds bfloat16 numbers."""
    return tensor.dtype == torch.bfloat16


def on_device(tensor: Tensor) -> bool:
    """Return whether a tensor's products are formed by a GPU, or as if they were."""
    return tensor.device.type != "cpu" or not _devices_only


@contextlib.contextmanager
def as_on_a_device() -> Iterator[None]:
    """Choose every way of the block as on a GPU, to count and to test there what it would do.

    >>> with as_on_a_device():
    ...     on_device(torch.zeros(1))
    True
    """
    global _devices_only  # one setting of the process, as those of torch are
    before, _devices_only = _devices_only, False
    try:
        yield
    finally:
        _devices_only = before


def product(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of two matrices, or of two batches of them, added up in :func:`widened`.

    Args:
        one: Shape ``(n, k)`` or ``(batch, n, k)``.
        other: Shape ``(k, m)`` or ``(batch, k, m)``.

    Returns:
        Shape ``(n, m)`` or ``(batch, n, m)``.
    """
    multiply = torch.mm if one.ndim == 2 else torch.bmm
    if is_short(one) and is_short(other) and one.device.type in ("cuda", "meta"):
        return multiply(one, other, out_dtype=torch.float32)
    dtype = torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
    return multiply(one.to(dtype), other.to(dtype))


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return by how much an addition in a :func:`product` of such numbers may be off, relatively.

    >>> unit_roundoff(torch.bfloat16) == 2 * unit_roundoff(torch.float32) == 2.0**-23
    True
    """
    eps = torch.finfo(widened(dtype)).eps
    return eps if dtype == torch.bfloat16 else eps / 2
