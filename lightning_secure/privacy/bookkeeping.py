"""Clipped gradient sums in one backward pass, recorded by hooks.

While a chunk goes forward and backward, the parameters of the handled layers are frozen: autograd
then computes no weight gradients, which are a third of the work and would be thrown away. Hooks
keep each layer's input and the gradient of its output; norms and clipped sums come from those.

Source:
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.layers import (
    clip_factor,
    linear_norm_squared,
    linear_per_sample,
    linear_weighted_sum,
    norm_squared,
)

__all__ = ["LinearUnit", "Record", "Recorder", "Unit", "add_clipped_sums", "per_sample_norms"]

Gradients = Mapping[nn.Parameter, Tensor]


class Unit(ABC):
    """A layer whose per-sample gradients can be had from its input and its output's gradient.

    Args:
        name: Its name in the model, for errors.
        module: The layer.
        parameters: The parameters whose gradients it accounts for.
    """

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.name = name
        self.module = module
        self.parameters = tuple(parameters)

    @abstractmethod
    def per_sample(self, record: Record) -> Gradients:
        """Return each sample's gradient, shape ``(batch, *parameter.shape)``, float32."""

    def norm_squared(self, record: Record) -> Tensor:
        """Return the squared norms over all of the unit's parameters, shape ``(batch,)``."""
        norms = [norm_squared(grads) for grads in self.per_sample(record).values()]
        return torch.stack(norms).sum(0)

    def weighted_sum(self, record: Record, weights: Tensor) -> Gradients:
        """Return ``sum_i weights[i] * gradient_i`` for each parameter."""
        return {
            parameter: torch.einsum("b,b...->...", weights, grads)
            for parameter, grads in self.per_sample(record).items()
        }


@dataclass(eq=False)
class Record:
    """What one call of one layer leaves behind.

    Attributes:
        unit: The layer.
        inputs: Its input, shape ``(batch, ...)``.
        grads: Gradient of each sample's own loss by the output, shape ``(batch, ...)``, float32.
        kept: Per-sample gradients, by units that had to form them.
    """

    unit: Unit
    inputs: Tensor
    grads: Tensor
    kept: Gradients | None = None

    def masked(self, keep: Tensor) -> Record:
        """Return a copy with zeros in the rows for which ``keep`` is false."""
        inputs = self.inputs
        if inputs.is_floating_point():
            inputs = _zero_rows(inputs, keep)
        return Record(self.unit, inputs, _zero_rows(self.grads, keep))


class LinearUnit(Unit):
    """``nn.Linear``, by formula."""

    def __init__(self, name: str, module: nn.Linear) -> None:
        # The user may have frozen the weight and not the bias, or the other way round.
        self._weight = _trainable(module.weight)
        self._bias = _trainable(module.bias)
        super().__init__(name, module, [p for p in (self._weight, self._bias) if p is not None])

    def norm_squared(self, record: Record) -> Tensor:
        """Return the squared norms, by whichever way is the smaller one."""
        if self._weight is None:
            return super().norm_squared(record)
        return linear_norm_squared(*_flat(record), bias=self._bias is not None)

    def weighted_sum(self, record: Record, weights: Tensor) -> Gradients:
        """Return the weighted sums, as one matrix product."""
        if self._weight is None:
            return super().weighted_sum(record, weights)
        sums = linear_weighted_sum(*_flat(record), weights, bias=self._bias is not None)
        return self._named(*sums)

    def per_sample(self, record: Record) -> Gradients:
        """Return the instantiated gradients."""
        if self._weight is None:
            grads = record.grads
            return self._named(None, grads if grads.ndim == 2 else grads.flatten(1, -2).sum(1))
        return self._named(*linear_per_sample(*_flat(record), bias=self._bias is not None))

    def _named(self, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        named = ((self._weight, weight), (self._bias, bias))
        return {p: g for p, g in named if p is not None and g is not None}


class Recorder:
    """Keeps the records of one forward and backward pass.

    Args:
        units: The layers to watch, each of another module.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = tuple(units)
        self._handles: list[RemovableHandle] = []
        self._pending: list[tuple[Unit, Tensor, Tensor]] = []
        self._active = False
        # With all parameters frozen no layer's output may require grad; this leaf makes it.
        self._anchor = torch.zeros((), requires_grad=True)

    def attach(self) -> None:
        """Put the hooks on the layers."""
        for unit in self._units:
            hook = partial(self._after_forward, unit)
            self._handles.append(unit.module.register_forward_hook(hook))

    def detach(self) -> None:
        """Take the hooks off again."""
        while self._handles:
            self._handles.pop().remove()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in the block, with the units' parameters frozen."""
        self._pending = []
        # Not those that the user has frozen since: they must be found frozen afterwards.
        parameters = [p for unit in self._units for p in unit.parameters if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            for parameter in parameters:
                parameter.requires_grad_(True)

    def take(self, batch: int) -> list[Record]:
        """Return the records of the last block and forget them.

        Args:
            batch: Rows of the chunk. The loss is taken to be their mean, so the gradient of one
                sample's own loss is so many times what reached the layer.

        Raises:
            UnsupportedModelError: A layer's first dimension is not the batch, so its gradients
                cannot be told apart by sample.
        """
        pending, self._pending = self._pending, []
        records = []
        for unit, inputs, grads in pending:
            if not inputs.ndim or not grads.ndim or {len(inputs), len(grads)} != {batch}:
                raise UnsupportedModelError(
                    f"layer {unit.name!r} works on an input of shape {tuple(inputs.shape)} and an "
                    f"output of shape {tuple(grads.shape)} for a batch of {batch}: its first "
                    "dimension is not the batch, so one sample's gradient cannot be told from "
                    "another's. Keep the batch as the first dimension through every layer with "
                    "parameters (expand what is shared, do not fold other dimensions into it). No "
                    "step was taken."
                )
            records.append(Record(unit, inputs, grads.float() * batch))
        return records

    def __getstate__(self) -> dict[str, Any]:
        # The hooks make a recorder part of the model's pickle, and records are not private.
        return {**self.__dict__, "_pending": [], "_active": False}

    def _after_forward(
        self, unit: Unit, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> Any:
        if not self._active or not torch.is_grad_enabled():
            return None
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"layer {unit.name!r} ({type(module).__name__}) does not map one tensor to one "
                "tensor, so its per-sample gradients cannot be formed. No step was taken."
            )
        if not output.requires_grad:
            output = _anchored(output, self._anchor)
        kept = inputs[0].detach()
        output.register_hook(partial(self._after_backward, unit, kept))
        return output

    def _after_backward(self, unit: Unit, inputs: Tensor, grads: Tensor) -> None:
        if self._active:
            self._pending.append((unit, inputs, grads.detach()))


class _Anchored(torch.autograd.Function):
    """Makes a tensor without history require grad, without copying it.

    ``requires_grad_`` would make it a leaf, and a leaf cannot be changed in place by the layer
    after it, such as ``nn.ReLU(inplace=True)``.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def _anchored(tensor: Tensor, anchor: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Anchored.apply
    return apply(tensor, anchor)


def per_sample_norms(records: Sequence[Record]) -> Tensor:
    """Return each sample's gradient norm over all parameters, shape ``(batch,)``, float32.

    A layer that was called several times, or a parameter that several layers share, has the
    gradient that is the sum of its uses; those are formed and added before the norm is taken.
    """
    simple, shared = _partition(records)
    squares = [record.unit.norm_squared(record) for record in simple]
    squares += [norm_squared(grads) for grads in _added(shared).values()]
    return torch.stack(squares).sum(0).sqrt()


def add_clipped_sums(
    sums: dict[nn.Parameter, Tensor], records: Sequence[Record], *, max_grad_norm: float
) -> Tensor:
    """Clip each sample's gradient and add the sum over samples to ``sums``.

    Args:
        sums: Running sums by parameter, float32; missing ones are begun.
        records: Those of one chunk. None of them changes.
        max_grad_norm: Clipping bound.

    Returns:
        The norms before clipping, shape ``(batch,)``. They are not private.
    """
    norms = per_sample_norms(records)
    factors = clip_factor(norms, max_grad_norm=max_grad_norm)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        # A factor of zero times infinity is NaN: the rows themselves must go.
        records = [record.masked(finite) for record in records]
    simple, shared = _partition(records)
    for record in simple:
        for parameter, total in record.unit.weighted_sum(record, factors).items():
            _accumulate(sums, parameter, total)
    for parameter, grads in _added(shared).items():
        _accumulate(sums, parameter, torch.einsum("b,b...->...", factors, grads))
    return norms


def _partition(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Separate records that are the only use of their parameters from the others."""
    uses = Counter(id(p) for record in records for p in record.unit.parameters)
    simple: list[Record] = []
    shared: list[Record] = []
    for record in records:
        alone = all(uses[id(p)] == 1 for p in record.unit.parameters)
        (simple if alone else shared).append(record)
    return simple, shared


def _added(records: Sequence[Record]) -> Gradients:
    totals: dict[nn.Parameter, Tensor] = {}
    for record in records:
        for parameter, grads in record.unit.per_sample(record).items():
            _accumulate(totals, parameter, grads)
    return totals


def _accumulate(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, value: Tensor) -> None:
    sums[parameter] = sums[parameter] + value if parameter in sums else value


def _trainable(parameter: Tensor | None) -> nn.Parameter | None:
    trainable = isinstance(parameter, nn.Parameter) and parameter.requires_grad
    return cast("nn.Parameter", parameter) if trainable else None


def _zero_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    mask = keep.view(-1, *[1] * (tensor.ndim - 1))
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def _flat(record: Record) -> tuple[Tensor, Tensor]:
    """Return a linear layer's inputs and gradients with at most one dimension for time."""
    inputs, grads = record.inputs.float(), record.grads
    if inputs.ndim > 3:
        inputs, grads = inputs.flatten(1, -2), grads.flatten(1, -2)
    return inputs, grads
