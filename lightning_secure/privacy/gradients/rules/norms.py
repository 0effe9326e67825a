"""``nn.LayerNorm``, ``nn.GroupNorm`` and ``nn.RMSNorm`` by formula."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lightning_secure.privacy.gradients.products import widened
from lightning_secure.privacy.gradients.rules.layer_rule import (
    Gradients,
    Unit,
    Way,
    trainable,
)

_Norm = nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


class NormUnit(Unit):
    """A layer that normalises within a sample, then scales and shifts.

    Its per-sample gradients are as small as its weights: the normalised input times the output's
    gradient, and that gradient, added over whatever the weights are shared across.
    """

    forms = ("product",)

    def __init__(self, name: str, module: _Norm) -> None:
        self._norm = module
        self.weight = trainable(module.weight)
        self.bias = trainable(getattr(module, "bias", None))
        super().__init__(name, module, [p for p in (self.weight, self.bias) if p is not None])

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return the gradients."""
        grads = grads.to(widened(grads.dtype))
        found: dict[nn.Parameter, Tensor] = {}
        if self.weight is not None:
            found[self.weight] = self._shared(grads * self._normalised(inputs.to(grads.dtype)))
        if self.bias is not None:
            found[self.bias] = self._shared(grads)
        return found

    def ways(self, inputs: Tensor, grads: Tensor) -> list[Way]:
        """Return the one way: the gradients are small, so they are formed and kept."""
        return [Way("product", kept=True)]

    def _normalised(self, inputs: Tensor) -> Tensor:
        norm = self._norm
        if isinstance(norm, nn.GroupNorm):
            return functional.group_norm(inputs, norm.num_groups, eps=norm.eps)
        if isinstance(norm, nn.RMSNorm):
            return functional.rms_norm(inputs, norm.normalized_shape, eps=norm.eps)
        return functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)

    def _shared(self, values: Tensor) -> Tensor:
        """Add over the places that share one weight."""
        if isinstance(self._norm, nn.GroupNorm):
            return values if values.ndim == 2 else values.flatten(2).sum(2)
        extra = values.ndim - 1 - len(self._norm.normalized_shape)
        return values if extra == 0 else values.flatten(1, extra).sum(1)
