"""Per-sample gradient norms and clipped sums of layers, without the per-sample gradients.

For a linear layer with inputs ``a`` and output gradients ``g``, the gradient of sample ``i`` is
``g_i^T a_i``. Its norm and the weighted sum over samples can be had from ``a`` and ``g`` alone.

Source:
    Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679 (ghost norm);
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from lightning_secure.privacy.gradients.products import (
    is_short,
    on_device,
    product,
    unit_roundoff,
    widened,
)
from lightning_secure.util.validate import positive

#: From so many time steps on, Gram matrices are formed in quarters.
_HALVED: Final = 64
#: On devices that are idle between many small steps, from so many on.
_HALVED_ON_DEVICES: Final = 512
#: Inner products of more features are added up in blocks of about so many,
_BLOCK: Final = 512
#: or of more where these would be more blocks than so many.
_BLOCKS: Final = 64


def clip_factor(norms: Tensor, *, max_grad_norm: float) -> Tensor:
    """Return the per-sample factor that bounds each gradient's L2 norm.

    Args:
        norms: L2 norms, shape ``(batch,)``, float32, same unit as ``max_grad_norm``.
        max_grad_norm: Clipping bound C > 0.

    Returns:
        Factors in ``[0, 1]``, shape ``(batch,)``. A norm that is not finite gets 0: the sample is
        left out, whatever made it overflow.

    Raises:
        ConfigError: if ``max_grad_norm`` is not positive.

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


def gram(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner products of the time steps of two tensors, over blocks of the features.

    Args:
        one: Shape ``(batch, time, features)``.
        other: Shape ``(batch, other_time, features)``.

    Returns:
        Shape ``(batch, time, other_time)``.

    Guarantees:
        However a block's products are added up, an entry is off by no more than
        ``rounding(features, dtype)`` times the product of the two steps' lengths.
    """
    other = other.transpose(1, 2)
    features = one.shape[2]
    size = _block(features)
    total = product(one[:, :, :size], other[:, :size])
    for start in range(size, features, size):
        block = slice(start, start + size)
        total += product(one[:, :, block], other[:, block])
    return total


def rounding(features: int, dtype: torch.dtype, *, more: int = 0) -> float:
    """Return by how much :func:`gram` may be off, relative to the sum of the magnitudes.

    Args:
        features: Length of the inner products.
        dtype: Their type. Its arithmetic rounds to nearest, see
            :func:`~lightning_secure.privacy.gradients.float32.exact_products`; that of bfloat16
            adds up in float32, and may truncate.
        more: How many more such sums are added up afterwards.

    Source:
        Higham 2002, Accuracy and Stability of Numerical Algorithms, sections 3.1 and 4.2: a sum
        whose terms go through ``n`` additions and one product each. Three more are for what is
        done with the result, a hundredth for the bound's own rounding and its higher orders.
    """
    size = _block(features)
    steps = size + -(-features // size) - 1 + more + 3
    return 1.01 * steps * unit_roundoff(dtype)


def cancelling(dtype: torch.dtype) -> float:
    """Return what share of its parts' squared magnitude a gradient's square counts for at least.

    Parts of a row's gradient that cancel over time are added to the other rows' sum one by one.
    Were they too large beside their own sum, they would, weighed by its norm, round the others
    away. So no norm is taken to be smaller than the square root of a rounding error times what
    the parts would come to if they did not cancel. Then one of them is rounded, and rounds the
    others, by no more than that root times the clipping norm: by 2.4e-4 of it in float32.
    """
    return unit_roundoff(dtype)


def _block(features: int) -> int:
    """Return how many features a block has: all alike, and not too many blocks to launch."""
    most = max(_BLOCK, -(-features // _BLOCKS))
    return -(-features // -(-features // most)) if features else 1


def gram_squares(inputs: Tensor, grads: Tensor, *, bias: bool = False) -> Tensor:
    """Return the squared norms of the products ``grads[i]^T inputs[i]``, without forming them.

    Args:
        inputs: Shape ``(batch, time, features_in)``.
        grads: Shape ``(batch, time, features_out)``.
        bias: Whether a bias, as of one more feature that is always one, counts too.

    Returns:
        Shape ``(batch,)``: ``sum((a a^T) * (g g^T))``, and a bound of its rounding error. Where
        time steps cancel, it is a small difference of large numbers, and a row whose norm was
        rounded away would not be clipped.

    Source:
        Li et al. 2021, arXiv:2110.05679.
    """
    errors = (
        rounding(inputs.shape[2], inputs.dtype, more=int(bias)),
        rounding(grads.shape[2], grads.dtype),
    )
    time = inputs.shape[1]
    # Gram matrices are symmetric: one of the quarters beside the diagonal stands for both.
    halves, places = [slice(0, time // 2), slice(time // 2, time)], [(0, 0), (1, 1), (0, 1)]
    if time < (_HALVED_ON_DEVICES if on_device(inputs) else _HALVED):
        halves, places = [slice(None)], [(0, 0)]

    def block(i: int, j: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        a, g = (gram(item[:, halves[i]], item[:, halves[j]]) for item in (inputs, grads))
        return a.add_(1) if bias else a, g, (i, j)

    return grams_squares((block(*place) for place in places), *errors, inputs.dtype)


class Grams(NamedTuple):
    """Gram matrices of a layer's inputs and of its output's gradients.

    Attributes:
        inputs: Shape ``(batch, time, time)``.
        grads: Likewise.
        error_in: As in :func:`grams_squares`.
        error_out: As in :func:`grams_squares`.
        dtype: Of the inputs and gradients.
        beside: Squared norms of what else counts, shape ``(batch,)``.
    """

    inputs: Tensor
    grads: Tensor
    error_in: float
    error_out: float
    dtype: torch.dtype
    beside: Tensor | None = None


def grams_together(grams: Sequence[Grams]) -> list[Tensor]:
    """Return the squared norms of several layers, whose matrices have one shape.

    As :func:`grams_squares`, with the largest of the layers' errors, and about as many launches as
    for one. The matrices stay as they are.
    """
    first = grams[0]
    inputs = torch.cat([item.inputs for item in grams])
    grads = torch.cat([item.grads for item in grams])
    errors = max(g.error_in for g in grams), max(g.error_out for g in grams)
    squares = grams_squares([(inputs, grads, (0, 0))], *errors, first.dtype)
    parts = squares.view(len(grams), -1).unbind()
    return [
        part if item.beside is None else part + item.beside
        for part, item in zip(parts, grams, strict=True)
    ]


def grams_squares(
    blocks: Iterable[tuple[Tensor, Tensor, tuple[int, int]]],
    error_in: float,
    error_out: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the squared norms from Gram matrices, with a bound of their rounding error.

    Args:
        blocks: Of the inputs and of the output gradients the same block of their Gram matrices,
            ``(batch, time, time)``, and its place: the numbers of its row and its column. Those on
            the diagonal come first; one beside it counts twice. They are overwritten.
        error_in: How far an entry of the inputs' matrix may be off, relative to the product of the
            lengths of its two steps.
        error_out: Likewise for the output gradients.
        dtype: Of the layer's inputs and gradients.

    Returns:
        Shape ``(batch,)``.

    With entries ``A`` and ``G`` that are off by no more than ``x a_i a_j`` and ``y g_i g_j``, where
    ``a`` and ``g`` are the steps' lengths, ``AG`` is off by no more than
    ``x a_i a_j |G| + y g_i g_j |A| + xy a_i a_j g_i g_j``, of the entries as computed.
    """
    lengths: dict[int, tuple[Tensor, Tensor]] = {}
    parts: list[Tensor] = []
    bounds: list[Tensor] = []
    for inputs, grads, (row, column) in blocks:
        if row == column:
            lengths[row] = _lengths(inputs), _lengths(grads)
        (a, g), (others_a, others_g) = lengths[row], lengths[column]
        times = 1 if row == column else 2
        # Over time in float64, which adds nothing but the products' own rounding.
        parts.append(times * (inputs * grads).sum((1, 2), dtype=torch.float64))
        around = error_in * _form(a, grads.abs_(), others_a)
        bounds.append(times * (around + error_out * _form(g, inputs.abs_(), others_g)))
    steps = torch.stack([(a * g).sum(1) for a, g in lengths.values()]).sum(0)
    least = error_in * error_out + cancelling(dtype)
    error = torch.stack(bounds).sum(0) + least * steps.square()
    result: Tensor = torch.stack(parts).sum(0).to(error.dtype).clamp(min=0) + error
    return result


def _lengths(block: Tensor) -> Tensor:
    """Return the lengths of the steps, no smaller than where squares are too small for a float."""
    return block.diagonal(dim1=1, dim2=2).add(_least(block.dtype)).sqrt()


def _least(dtype: torch.dtype) -> float:
    """Return what is added to a sum of squares, some of which may be lost to zero below it."""
    return 2 * torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _form(left: Tensor, block: Tensor, right: Tensor) -> Tensor:
    return (torch.bmm(block, right.unsqueeze(2)).squeeze(2) * left).sum(1)


def linear_ghost_squares(inputs: Tensor, grads: Tensor, *, bias: bool) -> Tensor:
    """Return the squared norm of each sample's gradient of a linear layer, not forming any.

    Args:
        inputs: Shape ``(batch, features_in)`` or ``(batch, time, features_in)``; float32, or
            bfloat16 if the gradients are.
        grads: Gradients of the samples' losses by the outputs, same leading shape.
        bias: Whether the layer has a bias, whose gradient counts too.

    Returns:
        Shape ``(batch,)``.

    >>> inputs, grads = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]])
    >>> linear_ghost_squares(inputs, grads, bias=False).round()  # (2 * 5) ** 2
    tensor([100.])
    """
    if inputs.ndim == 2:
        squares = _squared_lengths(grads)
        least = _least(squares.dtype)
        result = _squared_lengths(inputs).add(least) * squares.add(least)
        return result + squares if bias else result
    return gram_squares(inputs, grads, bias=bias)


def _squared_lengths(rows: Tensor) -> Tensor:
    if not is_short(rows):
        return rows.square().sum(1)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=widened(rows.dtype))
    return lengths.square()


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

    >>> inputs, grads = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]])
    >>> linear_weighted_sum(inputs, grads, torch.tensor([0.5]), bias=False)
    (tensor([[3., 4.]]), None)
    """
    rows = grads.flatten(0, -2)
    weights = weights.to(grads.dtype).view(-1, *[1] * (grads.ndim - 1))
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

    >>> inputs, grads = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[2.0]]])
    >>> linear_per_sample(inputs, grads, bias=True)
    (tensor([[[6., 8.]]]), tensor([[2.]]))
    """
    if grads.ndim == 2:
        grads = grads.to(widened(grads.dtype))
        return grads.unsqueeze(2) * inputs.unsqueeze(1), grads if bias else None
    weight = product(grads.transpose(1, 2), inputs)
    return weight, grads.sum(1, dtype=weight.dtype) if bias else None
