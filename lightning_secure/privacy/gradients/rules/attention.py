"""``nn.MultiheadAttention``, whose projections are made without calling a layer.

Its forward is exchanged for one that does the same step by step, so that each projection's input
and output can be watched. Everything goes that way, trial runs and ordinary ones, so that dropout
draws alike in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_secure.errors import PrivacyError, UnsupportedModelError
from lightning_secure.privacy.gradients.rules.layer_rule import (
    Gradients,
    Record,
    Unit,
    Watch,
    require_default,
    trainable,
)
from lightning_secure.privacy.gradients.rules.linear import LinearUnit

_ADVICE: Final = "opacus.layers.DPMultiheadAttention has a layer for each of them."


class RowsUnit(LinearUnit):
    """A projection by some rows of a weight that other projections share.

    Args:
        name: Its name in the model.
        module: The attention layer.
        weight: The whole weight; None if it is frozen.
        bias: The whole bias; None if it is frozen or there is none.
        rows: Which rows of both are used. All of the weight's, if its bias alone is shared.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        rows: slice,
    ) -> None:
        super().__init__(name, module, weight, bias)
        self._rows = rows

    def joined(self, records: Sequence[Record]) -> None:
        """Return nothing: other records of the weight are of other rows."""

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return the gradients, zero outside of the rows."""
        formed = super().per_sample(inputs, grads, form=form)
        return {p: self._placed(p, g) for p, g in formed.items()}

    def weighted_sum(self, inputs: Tensor, grads: Tensor, weights: Tensor) -> Gradients:
        """Return the weighted sums, zero outside of the rows."""
        sums = super().weighted_sum(inputs, grads, weights)
        return {p: self._placed(p, g[None])[0] for p, g in sums.items()}

    def total(self, inputs: Tensor, grads: Tensor) -> Gradients:
        """Return the sums, zero outside of the rows."""
        sums = super().total(inputs, grads)
        return {p: self._placed(p, g[None])[0] for p, g in sums.items()}

    def _placed(self, parameter: nn.Parameter, grads: Tensor) -> Tensor:
        if grads.shape[1:] == parameter.shape:
            return grads
        whole = grads.new_zeros(len(grads), *parameter.shape)
        whole[:, self._rows] = grads
        return whole


class _Projections:
    """The units of one attention layer."""

    def __init__(self, name: str, module: nn.MultiheadAttention) -> None:
        size = module.embed_dim
        bias = trainable(module.in_proj_bias)
        self.rows = {part: slice(i * size, (i + 1) * size) for i, part in enumerate("qkv")}
        self.same = bool(module._qkv_same_embed_dim)
        label = f"{name}.in_proj"
        self.whole = LinearUnit(label, module, trainable(module.in_proj_weight), bias)
        self.parts = {
            part: RowsUnit(label, module, trainable(self.weight(module, part)), bias, rows)
            for part, rows in self.rows.items()
        }
        out = module.out_proj
        self.out = LinearUnit(
            f"{name}.out_proj", module, trainable(out.weight), trainable(out.bias)
        )

    def weight(self, module: nn.MultiheadAttention, part: str) -> Tensor | None:
        if self.same:
            return module.in_proj_weight
        weight: Tensor = getattr(module, f"{part}_proj_weight")
        return weight


class AttentionUnit(Unit):
    """An attention layer as a whole: it stands for its projections' units.

    Args:
        name: Its name in the model.
        module: The layer.

    Raises:
        UnsupportedModelError: if the layer has an option that the rules do not cover.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention) -> None:
        own = [p for p in module.parameters() if p.requires_grad]
        super().__init__(name, module, own)
        plain = module.bias_k is None and module.bias_v is None and not module.add_zero_attn
        require_default(self, "add_bias_kv or add_zero_attn", ok=plain, advice=_ADVICE)
        self._attention = module
        self._projections = _Projections(name, module)

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Refuse: the projections' records are used instead."""
        raise PrivacyError("attention leaves records of its projections. This step was not taken.")

    def attach(self, watch: Watch) -> Callable[[], None]:
        """Exchange the layer's forward; returns how to put it back."""
        module = self._attention
        vars(module)["forward"] = partial(self._forward, watch, module.forward)

        def detach() -> None:
            vars(module).pop("forward", None)

        return detach

    def _forward(
        self,
        watch: Watch,
        ordinary: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            untouched: tuple[Tensor, Tensor | None] = ordinary(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
            return untouched
        watch.before(self)
        try:
            return self._recorded(
                watch,
                query,
                key,
                value,
                mask=partial(_merged, key_padding_mask, attn_mask),
                need_weights=need_weights,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal and key_padding_mask is None,
            )
        finally:
            watch.after(self)

    def _recorded(
        self,
        watch: Watch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Callable[[Tensor], Tensor | None],
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Do what the ordinary forward does; ``mask`` takes the queries by head."""
        module = self._attention
        if query.ndim != 3:
            raise UnsupportedModelError(
                f"layer {self.name!r} (MultiheadAttention) is given an input of {query.ndim} "
                "dimensions, without a batch dimension, so samples cannot be told apart. Pass "
                "(batch, time, features). This step was not taken."
            )
        projected = self._project(watch, query, key, value)
        q, k, v = (self._heads(item) for item in projected)
        added = mask(q)
        dropout = module.dropout if module.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
            weights = torch.softmax(scores if added is None else scores + added, dim=3)
            weights = functional.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        elif is_causal:
            attended = functional.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True
            )
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, added, dropout)
        joined = attended.transpose(1, 2).flatten(2)
        out = module.out_proj
        result = functional.linear(joined, out.weight, out.bias)
        if self._projections.out.parameters:
            result = watch(self._projections.out, joined, result)
        return (result if module.batch_first else result.transpose(0, 1)), weights

    def _project(self, watch: Watch, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        module, projections = self._attention, self._projections
        alike = projections.same and query is key and key is value
        if not module.batch_first:
            query, key, value = (item.transpose(0, 1) for item in (query, key, value))
        if alike:
            output = functional.linear(query, module.in_proj_weight, module.in_proj_bias)
            if projections.whole.parameters:
                output = watch(projections.whole, query, output)
            return list(output.chunk(3, dim=-1))
        found = []
        for part, item in (("q", query), ("k", key), ("v", value)):
            rows = projections.rows[part]
            weight = projections.weight(module, part)
            assert weight is not None  # noqa: S101 # one or the other kind of weight is there
            weight = weight[rows] if projections.same else weight
            shared: Tensor | None = module.in_proj_bias
            bias = None if shared is None else shared[rows]
            output = functional.linear(item, weight, bias)
            unit = projections.parts[part]
            found.append(watch(unit, item, output) if unit.parameters else output)
        return found

    def _heads(self, item: Tensor) -> Tensor:
        heads = self._attention.num_heads
        return item.reshape(*item.shape[:2], heads, -1).transpose(1, 2)


def _merged(padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return both masks as one that is added to the scores, ``(batch or 1, heads or 1, L, S)``."""
    total: Tensor | None = None
    if mask is not None:
        total = _additive(mask, q.dtype)
        total = total[None, None] if total.ndim == 2 else total.view(*q.shape[:2], *total.shape[1:])
    if padding is not None:
        total = _additive(padding, q.dtype)[:, None, None] + (0 if total is None else total)
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
