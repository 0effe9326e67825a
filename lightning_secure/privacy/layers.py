"""Per-sample gradient norms and clipped sums of layers, without the per-sample gradients.

For a linear layer with inputs ``a`` and output gradients ``g``, the gradient of sample ``i`` is
``g_i^T a_i``. Its norm and the weighted sum over samples can be had from ``a`` and ``g`` alone.

Source:
    Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679 (ghost norm);
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from lightning_secure.validate import positive

__all__ = [
    "clip_factor",
    "gram_squares",
    "grams_squares",
    "linear_ghost_squares",
    "linear_per_sample",
    "linear_weighted_sum",
]

#: From so many time steps on, Gram matrices are formed in quarters.
_HALVED: Final = 64


def clip_factor(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """Return the per-sample factor that bounds each gradient's L2 norm.

    Args:
        norms: L2 norms, shape ``(batch,)``, float32, same unit as ``max_grad_norm``.
        max_grad_norm: Clipping bound C > 0.

    Returns:
        Factors in ``[0, 1]``, shape ``(batch,)``. A norm that is not finite gets 0: the sample is
        left out, whatever made it overflow.

    Raises:
        ConfigError: ``max_grad_norm`` is not positive.

    Guarantees:
        ``factor[i] * norms[i] <= max_grad_norm`` for every finite norm, up to rounding.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> clip_factor(torch.tensor([0.5, 4.0, float("inf")]), max_grad_norm=1.0)
    tensor([1.0000, 0.2500, 0.0000])
    """
    positive(max_grad_norm=max_grad_norm)
    factors = (max_grad_norm / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def gram_squares(inputs: Tensor, grads: Tensor) -> Tensor:
    """Return the squared norms of the products ``grads[i]^T inputs[i]``, without forming them.

    Args:
        inputs: Shape ``(batch, time, features_in)``.
        grads: Shape ``(batch, time, features_out)``.

    Returns:
        Shape ``(batch,)``: ``sum((a a^T) * (g g^T))``, and a bound of its rounding error. Where
        time steps cancel, it is a small difference of large numbers, and a row whose norm was
        rounded away would not be clipped.

    Source:
        Li et al. 2021, arXiv:2110.05679; Higham 2002, Accuracy and Stability of Numerical
        Algorithms, section 3.1 (the bound).
    """
    terms = inputs.shape[2] + grads.shape[2]
    time = inputs.shape[1]
    if time < _HALVED:
        return grams_squares([(_gram(inputs, inputs), _gram(grads, grads), True)], terms=terms)
    # Gram matrices are symmetric: one of the quarters beside the diagonal stands for both.
    halves = [slice(0, time // 2), slice(time // 2, time)]
    quarters = [(halves[0], halves[0]), (halves[1], halves[1]), halves]
    return grams_squares(
        (
            (_gram(inputs[:, a], inputs[:, b]), _gram(grads[:, a], grads[:, b]), a is b)
            for a, b in quarters
        ),
        terms=terms,
    )


def grams_squares(blocks: Iterable[tuple[Tensor, Tensor, bool]], *, terms: int) -> Tensor:
    """Return the squared norms from Gram matrices, with a bound of their rounding error.

    Args:
        blocks: Of the inputs and of the output gradients the same block of their Gram matrices,
            ``(batch, time, time)``, and whether it lies on the diagonal. One beside it counts
            twice. The first may be overwritten.
        terms: How many products the inner products of both are sums of.

    Returns:
        Shape ``(batch,)``.
    """
    totals: list[Tensor] = []
    steps: list[Tensor] = []
    for inputs, grads, diagonal in blocks:
        if diagonal:
            lengths = [item.diagonal(dim1=1, dim2=2).sqrt() for item in (inputs, grads)]
            steps.append((lengths[0] * lengths[1]).sum(1))
        total = inputs.mul_(grads).sum((1, 2), dtype=torch.float64)
        totals.append(total if diagonal else 2 * total)
        dtype = inputs.dtype
    # n * eps times the sum of the magnitudes, which Cauchy and Schwarz bound by the steps' norms;
    # the last sum, over time, is in float64 and adds nothing to n but its products' own rounding.
    error = (terms + 2) * torch.finfo(dtype).eps * torch.stack(steps).sum(0).square()
    result: Tensor = torch.stack(totals).sum(0).to(dtype).clamp(min=0) + error
    return result


def _gram(one: Tensor, other: Tensor) -> Tensor:
    return torch.bmm(one, other.transpose(1, 2))


def linear_ghost_squares(inputs: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """Return the squared norm of each sample's gradient of a linear layer, not forming any.

    Args:
        inputs: Shape ``(batch, features_in)`` or ``(batch, time, features_in)``, float32.
        grads: Gradients of the samples' losses by the outputs, same leading shape, float32.
        bias: Whether the layer has a bias, whose gradient counts too.

    Returns:
        Shape ``(batch,)``.
    """
    if inputs.ndim == 2:
        squares = grads.square().sum(1)
        result = inputs.square().sum(1) * squares
        return result + squares if bias else result
    result = gram_squares(inputs, grads)
    return result + grads.sum(1).square().sum(1) if bias else result


def linear_weighted_sum(
    inputs: Tensor, grads: Tensor, weights: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``sum_i weights[i] * gradient_i`` of a linear layer's weight and bias.

    Args:
        inputs: As for :func:`linear_ghost_squares`.
        grads: As for :func:`linear_ghost_squares`.
        weights: Shape ``(batch,)``.
        bias: Whether the layer has a bias.

    Returns:
        Shapes ``(features_out, features_in)`` and ``(features_out,)``.
    """
    weights = weights.to(grads.dtype).view(-1, *[1] * (grads.ndim - 1))
    rows = grads.flatten(0, -2)
    if inputs.shape[-1] < grads.shape[-1]:  # the smaller one is weighed
        weight = rows.T @ (inputs * weights).flatten(0, -2)
        return weight, weights.expand(*grads.shape[:-1], 1).flatten() @ rows if bias else None
    scaled = (grads * weights).flatten(0, -2)
    return scaled.T @ inputs.flatten(0, -2), scaled.sum(0) if bias else None


def linear_per_sample(inputs: Tensor, grads: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return each sample's gradient of a linear layer's weight and bias.

    Args:
        inputs: As for :func:`linear_ghost_squares`.
        grads: As for :func:`linear_ghost_squares`.
        bias: Whether the layer has a bias.

    Returns:
        Shapes ``(batch, features_out, features_in)`` and ``(batch, features_out)``.
    """
    if grads.ndim == 2:
        weight = grads.unsqueeze(2) * inputs.unsqueeze(1)
    else:
        weight = torch.bmm(grads.transpose(1, 2), inputs)
    if not bias:
        return weight, None
    return weight, grads if grads.ndim == 2 else grads.sum(1)
