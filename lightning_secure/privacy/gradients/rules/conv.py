"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` by formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_secure.privacy.gradients.formulas import (
    Grams,
    gram,
    gram_squares,
    grams_squares,
    rounding,
)
from lightning_secure.privacy.gradients.products import (
    is_short,
    on_device,
    operands,
    product,
    widened,
)
from lightning_secure.privacy.gradients.rules.layer_rule import (
    Gradients,
    Unit,
    Way,
    norm_squared,
    require_default,
    trainable,
)

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvUnit(Unit):
    """A convolution with zero padding.

    Two ways form its per-sample gradients: a product with the unfolded input, and one convolution
    whose groups are the samples (Rochette et al. 2019, arXiv:1912.06015). The ghost norm on the
    unfolded input (Bu et al. 2022, arXiv:2205.10683) forms none. What two places of the output see
    are the same offsets of two places of the input, so where it is small, the Gram matrix of the
    unfolded input is a sum of shifted ones of the input itself, and nothing is unfolded.
    """

    forms = ("grouped", "unfold")
    forms_on_devices = ("unfold",)  # convolutions have no float32 result of bfloat16 operands
    has_ghost = True
    multiplies = True

    def __init__(self, name: str, module: _Conv) -> None:
        self.weight = trainable(module.weight)
        self.bias = trainable(module.bias)
        super().__init__(name, module, [p for p in (self.weight, self.bias) if p is not None])
        require_default(
            self,
            f"padding_mode={module.padding_mode!r}",
            ok=module.padding_mode == "zeros",
            advice="Pad with torch.nn.functional.pad before a layer without padding.",
        )
        self._conv = module
        self._groups = module.groups
        self._kernel: tuple[int, ...] = module.kernel_size
        self._stride: tuple[int, ...] = module.stride
        self._dilation: tuple[int, ...] = module.dilation

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return the gradients, by the way that ``form`` names."""
        inputs, grads = operands(inputs, grads)
        found: dict[nn.Parameter, Tensor] = {}
        if self.weight is not None:
            shape = (len(grads), *self.weight.shape)
            if form == "grouped":
                inputs, grads = self._widened(inputs, grads)
                weight = self._backward(
                    inputs.flatten(0, 1).unsqueeze(0),
                    grads.flatten(0, 1).unsqueeze(0),
                    (len(grads) * self.weight.shape[0], *self.weight.shape[1:]),
                    groups=len(grads) * self._groups,
                )
            else:
                columns, flat = self._columns(inputs, grads)
                weight = product(flat.flatten(0, 1), columns.flatten(0, 1).transpose(1, 2))
            found[self.weight] = weight.reshape(shape)
        if self.bias is not None:
            found[self.bias] = grads.flatten(2).sum(2, dtype=widened(grads.dtype))
        return found

    def ghost_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the squared norms by Gram matrices over the output's places."""
        inputs, grads = operands(inputs, grads)
        squares = self._bias_squares(grads)
        if self.weight is not None:
            if self._small(inputs, grads):
                grams = self._shifted(inputs, grads)
                block = grams.inputs, grams.grads, (0, 0)
                found = grams_squares([block], grams.error_in, grams.error_out, grams.dtype)
            else:
                found = self._unfolded(inputs, grads)
            weights = found.view(len(grads), -1).sum(1)
            squares = weights if squares is None else weights + squares
        assert squares is not None  # noqa: S101 # a unit has a parameter
        return squares

    def grams(self, inputs: Tensor, grads: Tensor, *, known: Tensor | None = None) -> Grams | None:
        """Return the Gram matrices over the output's places, of a convolution in one group."""
        inputs, grads = operands(inputs, grads)
        if self.weight is None or self._groups > 1:
            return None
        if self._small(inputs, grads):
            found = self._shifted(inputs, grads, known=known)
        else:
            columns, flat = self._columns(inputs, grads)
            both = [item.squeeze(1).transpose(1, 2) for item in (columns, flat)]
            a = gram(both[0], both[0]) if known is None else known
            g = gram(both[1], both[1])
            error_in, error_out = (rounding(item.shape[2], item.dtype) for item in both)
            found = Grams(a, g, error_in, error_out, grads.dtype)
        return found._replace(beside=self._bias_squares(grads))

    def _bias_squares(self, grads: Tensor) -> Tensor | None:
        if self.bias is None:
            return None
        return grads.flatten(2).sum(2, dtype=widened(grads.dtype)).square().sum(1)

    def _unfolded(self, inputs: Tensor, grads: Tensor) -> Tensor:
        columns, flat = self._columns(inputs, grads)
        return gram_squares(
            columns.transpose(2, 3).flatten(0, 1), flat.transpose(2, 3).flatten(0, 1)
        )

    def _shifted(self, inputs: Tensor, grads: Tensor, *, known: Tensor | None = None) -> Grams:
        places = grads.shape[2:]
        flat = grads.reshape(len(grads) * self._groups, -1, math.prod(places))
        size = flat.shape[2]
        if known is None:
            known = self._pixel_gram(inputs, places).view(-1, size, size)
        error_in = rounding(
            inputs.shape[1] // self._groups, inputs.dtype, more=math.prod(self._kernel)
        )
        other = gram(*2 * [flat.transpose(1, 2)])
        return Grams(known, other, error_in, rounding(flat.shape[1], flat.dtype), flat.dtype)

    def _pixel_gram(self, inputs: Tensor, places: torch.Size) -> Tensor:
        groups = self._groups
        padded = functional.pad(inputs, self._padding())
        pixels = padded.reshape(len(padded) * groups, -1, math.prod(padded.shape[2:]))
        whole = gram(*2 * [pixels.transpose(1, 2)]).view(-1, *2 * padded.shape[2:])
        total = torch.zeros(len(pixels), *2 * places, dtype=whole.dtype, device=whole.device)
        for offset in itertools.product(*map(range, self._kernel)):
            seen = [
                slice(o * d, o * d + (n - 1) * s + 1, s)
                for o, d, n, s in zip(offset, self._dilation, places, self._stride, strict=True)
            ]
            total += whole[(slice(None), *seen, *seen)]
        return total

    def _small(self, inputs: Tensor, grads: Tensor) -> bool:
        """Return whether the input's own Gram matrix is cheaper than that of its unfolding."""
        places, kernel = math.prod(grads.shape[2:]), math.prod(self._kernel)
        return kernel > 1 and self._pixels(inputs) ** 2 < places**2 * kernel

    def _pixels(self, inputs: Tensor) -> int:
        pads = self._padding()
        ends = zip(inputs.shape[2:], pads[-2::-2], pads[::-2], strict=True)
        return math.prod(n + before + after for n, before, after in ends)

    def working_bytes(self, inputs: Tensor, grads: Tensor, way: Way) -> int:
        """Return how many bytes a row takes on the way."""
        columns = inputs.shape[1] * math.prod(self._kernel)
        places = math.prod(grads.shape[2:])
        numbers = self.formed_bytes(inputs[:1], grads[:1]) // widened(grads.dtype).itemsize
        if way.form:
            numbers += columns * places if way.form == "unfold" else 2 * inputs[0].numel()
        elif self._small(inputs, grads):
            numbers = self._groups * (self._pixels(inputs) ** 2 + 3 * places**2)
        else:
            numbers = columns * places + 3 * self._groups * places**2
        return numbers * widened(grads.dtype).itemsize

    def ghost_share(self, inputs: Tensor, grads: Tensor) -> float:
        """Return the multiplications of Gram matrices over those of products."""
        places, kernel = math.prod(grads.shape[2:]), math.prod(self._kernel)
        size_in, size_out = inputs.shape[1], grads.shape[1]
        products = places * size_in * kernel * size_out / self._groups
        if self._small(inputs, grads):
            return (self._pixels(inputs) ** 2 * size_in + places**2 * size_out) / products
        return places**2 * (size_in * kernel + size_out) / products

    def multiplications(self, inputs: Tensor, grads: Tensor) -> float:
        """Return those of one product of unfolded inputs and gradients."""
        columns = inputs.shape[1] * math.prod(self._kernel)
        return float(columns * grads.numel() / self._groups)

    def operand_bytes(self, inputs: Tensor, grads: Tensor) -> float:
        """Return how many bytes they have, and those of unfolded inputs, written and read."""
        places = len(grads) * math.prod(grads.shape[2:])
        columns = 2 * inputs.shape[1] * math.prod(self._kernel) * places
        return inputs.nbytes + grads.nbytes + columns * grads.itemsize

    def weighted_sum(self, inputs: Tensor, grads: Tensor, weights: Tensor) -> Gradients:
        """Return the weighted sums, as autograd would compute them from weighted gradients."""
        inputs, grads = self._widened(inputs, grads)
        scaled = grads * weights.to(grads.dtype).view(-1, *[1] * (grads.ndim - 1))
        found: dict[nn.Parameter, Tensor] = {}
        if self.weight is not None:
            found[self.weight] = self._backward(
                inputs, scaled, self.weight.shape, groups=self._groups
            )
        if self.bias is not None:
            found[self.bias] = weights.to(grads.dtype) @ grads.flatten(2).sum(2)
        return found

    def total(self, inputs: Tensor, grads: Tensor) -> Gradients:
        """Return the sums over rows and places; on a GPU as products with a float32 result."""
        if not (on_device(grads) and is_short(grads)):
            return super().total(inputs, grads)
        inputs, grads = operands(inputs, grads)
        found: dict[nn.Parameter, Tensor] = {}
        if self.weight is not None:
            columns, flat = (item.permute(1, 2, 0, 3) for item in self._columns(inputs, grads))
            weight = product(flat.flatten(2), columns.flatten(2).transpose(1, 2))
            found[self.weight] = weight.reshape(self.weight.shape)
        if self.bias is not None:
            # Within each row first: parts that cancel there must not round the other rows away.
            found[self.bias] = grads.flatten(2).sum(2, dtype=widened(grads.dtype)).sum(0)
        return found

    def apart_squares(self, inputs: Tensor, grads: Tensor) -> Tensor | None:
        """Return the products of the norms; a place of the input is seen once by each offset."""
        return norm_squared(inputs) * norm_squared(grads) * math.prod(self._kernel)

    def _widened(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        dtype = widened(grads.dtype)
        return inputs.to(dtype), grads.to(dtype)

    def _padding(self) -> list[int]:
        return list(cast("Any", self._conv)._reversed_padding_repeated_twice)

    def _backward(
        self, inputs: Tensor, grads: Tensor, shape: Sequence[int], *, groups: int
    ) -> Tensor:
        """Return the gradient of a weight of such a shape, whose values do not matter."""
        zeros = [0] * len(self._kernel)
        pads = self._padding()[::-1]
        even = pads[::2] == pads[1::2]
        _, result, _ = torch.ops.aten.convolution_backward(
            grads.contiguous(),
            inputs if even else functional.pad(inputs, self._padding()),
            grads.new_empty(1).expand(*shape),
            None,
            self._stride,
            pads[::2] if even else zeros,
            self._dilation,
            False,
            zeros,
            groups,
            [False, True, False],
        )
        return cast("Tensor", result)

    def _columns(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as ``(batch, groups, features, places)``."""
        padded = functional.pad(inputs, self._padding())
        columns = unfolded(padded, self._kernel, self._stride, self._dilation)
        batch, groups = len(grads), self._groups
        return columns.view(batch, groups, -1, columns.shape[2]), grads.reshape(
            batch, groups, grads.shape[1] // groups, -1
        )


def unfolded(
    inputs: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Return the places that each output of a convolution sees.

    Args:
        inputs: Padded, shape ``(batch, channels, *size)`` with one to three dimensions of size.
        kernel: Its size in each of them.
        stride: Likewise.
        dilation: Likewise.

    Returns:
        Shape ``(batch, channels * prod(kernel), places)``; like ``torch.nn.functional.unfold``,
        which knows two dimensions only.
    """
    inputs = inputs.contiguous()
    size = inputs.shape[2:]
    places = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    steps = inputs.stride()[2:]
    view = inputs.as_strided(
        (*inputs.shape[:2], *kernel, *places),
        (
            *inputs.stride()[:2],
            *(step * d for step, d in zip(steps, dilation, strict=True)),
            *(step * s for step, s in zip(steps, stride, strict=True)),
        ),
    )
    return view.reshape(len(inputs), inputs.shape[1] * math.prod(kernel), math.prod(places))
