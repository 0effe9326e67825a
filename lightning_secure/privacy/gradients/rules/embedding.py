"""``nn.Embedding`` by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_secure.privacy.gradients.formulas import cancelling
from lightning_secure.privacy.gradients.products import widened
from lightning_secure.privacy.gradients.rules.layer_rule import (
    GHOST,
    Gradients,
    Record,
    Unit,
    Way,
    norm_squared,
    require_default,
)


class EmbeddingUnit(Unit):
    """A table of vectors, of which a sample's gradient touches the rows that it looked up."""

    has_ghost = True

    def __init__(self, name: str, module: nn.Embedding) -> None:
        self.weight = cast("nn.Parameter", module.weight)
        super().__init__(name, module, [self.weight])
        require_default(
            self,
            "scale_grad_by_freq",
            ok=not module.scale_grad_by_freq,
            advice="It divides by how often a token stands in the whole batch, which mixes rows.",
        )
        self.padding = module.padding_idx

    def ways(self, inputs: Tensor, grads: Tensor) -> list[Way]:
        """Return the one way: a table for each sample would be mostly zeros."""
        return [GHOST]

    def ghost_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the squared norms: each token's gradients are added before they are squared."""
        tokens, flat = self.timed(inputs, grads)
        rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        keys = (rows * self.weight.shape[0] + tokens).flatten()
        uniques, places = torch.unique(keys, return_inverse=True)
        totals = flat.new_zeros(len(uniques), flat.shape[-1])
        totals.index_add_(0, places, flat.flatten(0, 1))
        # By Cauchy and Schwarz, over time, what they would come to if none cancelled.
        apart = norm_squared(flat) * (flat.shape[1] * cancelling(flat.dtype))
        return apart.index_add_(0, uniques // self.weight.shape[0], totals.square().sum(1))

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return a table for each sample."""
        tokens, flat = self.timed(inputs, grads)
        table = flat.new_zeros(len(tokens), *self.weight.shape)
        index = tokens.unsqueeze(-1).expand_as(flat)
        return {self.weight: table.scatter_add_(1, index, flat)}

    def weighted_sum(self, inputs: Tensor, grads: Tensor, weights: Tensor) -> Gradients:
        """Return the weighted sums of the rows that were looked up."""
        tokens, flat = self.timed(inputs, grads)
        scaled = flat * weights.to(flat.dtype).view(-1, 1, 1)
        table = flat.new_zeros(self.weight.shape)
        return {self.weight: table.index_add_(0, tokens.flatten(), scaled.flatten(0, 1))}

    def joined(self, records: Sequence[Record]) -> tuple[Tensor, Tensor] | None:
        """Lay several uses one after another in time, if they have one padding."""
        if {cast("EmbeddingUnit", record.unit).padding for record in records} != {self.padding}:
            return None
        pairs = [self.timed(*record.evidence()) for record in records]
        return torch.cat([a for a, _ in pairs], 1), torch.cat([g for _, g in pairs], 1)

    def timed(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens ``(batch, time)`` and their gradients ``(batch, time, features)``."""
        tokens = inputs.reshape(len(inputs), -1)
        flat = grads.to(widened(grads.dtype)).reshape(*tokens.shape, -1)
        if self.padding is not None:
            flat = flat.masked_fill((tokens == self.padding).unsqueeze(-1), 0)
        return tokens, flat
