"""``nn.Linear`` by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_secure.privacy.gradients.formulas import (
    Grams,
    gram,
    linear_ghost_squares,
    linear_per_sample,
    linear_weighted_sum,
    rounding,
)
from lightning_secure.privacy.gradients.products import operands, product, widened
from lightning_secure.privacy.gradients.rules.layer_rule import (
    GHOST,
    Gradients,
    Record,
    Unit,
    Way,
    norm_squared,
    trainable,
)


class LinearUnit(Unit):
    """``nn.Linear``, or one weight and bias that are used like it.

    Args:
        name: Its name in the model.
        module: The layer whose output is watched.
        weight: Shape ``(out, in)``; None if it is frozen.
        bias: Shape ``(out,)``; None if it is frozen or there is none.
    """

    has_ghost = True
    multiplies = True

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
    ) -> None:
        self.weight = weight
        self.bias = bias
        super().__init__(name, module, [p for p in (weight, bias) if p is not None])

    @classmethod
    def of(cls, name: str, module: nn.Linear) -> LinearUnit:
        """Return the unit of a layer, of which weight or bias may be frozen."""
        return cls(name, module, trainable(module.weight), trainable(module.bias))

    def ways(self, inputs: Tensor, grads: Tensor) -> list[Way]:
        """Return the ways that memory allows; without time the formula beats all others."""
        if self.weight is None:
            return [Way("product", kept=True)]
        return [GHOST] if inputs.ndim == 2 else super().ways(inputs, grads)

    def working_bytes(self, inputs: Tensor, grads: Tensor, way: Way) -> int:
        """Return how many bytes a row takes on the way."""
        if way.form or inputs.ndim == 2:
            return super().working_bytes(inputs, grads, way)
        return 3 * math.prod(inputs.shape[1:-1]) ** 2 * widened(grads.dtype).itemsize

    def multiplications(self, inputs: Tensor, grads: Tensor) -> float:
        """Return those of one product with the weight's shape."""
        return float(math.prod(inputs.shape[:-1]) * inputs.shape[-1] * grads.shape[-1])

    def ghost_share(self, inputs: Tensor, grads: Tensor) -> float:
        """Return the multiplications of Gram matrices over those of products."""
        size_in, size_out = inputs.shape[-1], grads.shape[-1]
        return math.prod(inputs.shape[1:-1]) * (size_in + size_out) / (size_in * size_out)

    def ghost_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the squared norms by Gram matrices."""
        return linear_ghost_squares(*_flat(inputs, grads), bias=self.bias is not None)

    def grams(self, inputs: Tensor, grads: Tensor, *, known: Tensor | None = None) -> Grams | None:
        """Return the Gram matrices over time; a bias is one more feature that is always one."""
        inputs, grads = _flat(inputs, grads)
        if inputs.ndim == 2:
            return None
        bias = self.bias is not None
        if known is None:
            known = gram(inputs, inputs)
            known = known.add_(1) if bias else known
        return Grams(
            known,
            gram(grads, grads),
            rounding(inputs.shape[2], inputs.dtype, more=int(bias)),
            rounding(grads.shape[2], grads.dtype),
            grads.dtype,
        )

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return the products of output gradients and inputs."""
        inputs, grads = _flat(inputs, grads)
        if self.weight is None:
            grads = grads.to(widened(grads.dtype))
            return self._named(None, grads if grads.ndim == 2 else grads.sum(1))
        return self._named(*linear_per_sample(inputs, grads, bias=self.bias is not None))

    def total(self, inputs: Tensor, grads: Tensor) -> Gradients:
        """Return the sums, as one product with a float32 result."""
        if self.weight is None:
            return super().total(inputs, grads)
        inputs, grads = (item.flatten(0, -2) for item in _flat(inputs, grads))
        weight = product(grads.T, inputs)
        return self._named(weight, grads.sum(0, dtype=weight.dtype))

    def weighted_sum(self, inputs: Tensor, grads: Tensor, weights: Tensor) -> Gradients:
        """Return the weighted sums, as one matrix product."""
        if self.weight is None:
            return super().weighted_sum(inputs, grads, weights)
        inputs, grads = _flat(inputs, grads)
        return self._named(*linear_weighted_sum(inputs, grads, weights, bias=self.bias is not None))

    def apart_squares(self, inputs: Tensor, grads: Tensor) -> Tensor | None:
        """Return the products of the norms over time, by Cauchy and Schwarz."""
        squares = norm_squared(inputs)
        if self.bias is not None:
            squares = squares + math.prod(inputs.shape[1:-1])
        return squares * norm_squared(grads)

    def joined(self, records: Sequence[Record]) -> tuple[Tensor, Tensor] | None:
        """Lay several uses one after another in time."""
        pairs = [self.timed(*record.evidence()) for record in records]
        return torch.cat([a for a, _ in pairs], 1), torch.cat([g for _, g in pairs], 1)

    @staticmethod
    def timed(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as operands of products, ``(batch, time, features)``."""
        inputs, grads = _flat(inputs, grads)
        return (inputs, grads) if inputs.ndim == 3 else (inputs.unsqueeze(1), grads.unsqueeze(1))

    def _named(self, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        named = ((self.weight, weight), (self.bias, bias))
        return {p: g for p, g in named if p is not None and g is not None}


def _flat(inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as operands of products, with at most one dimension for time."""
    inputs, grads = operands(inputs, grads)
    if inputs.ndim > 3:
        inputs, grads = inputs.flatten(1, -2), grads.flatten(1, -2)
    return inputs, grads
