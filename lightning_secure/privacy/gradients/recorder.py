"""Clipped gradient sums in one backward pass, recorded by hooks.

While a handled layer runs forward, its own parameters are frozen: autograd then computes no weight
gradients, which are a third of the work and would be thrown away. Everywhere else they require
grad, as the module's code expects. Hooks keep each layer's input and the gradient of its output;
norms and clipped sums come from those, by the rules of
:mod:`~lightning_secure.privacy.gradients.rules`.

Source:
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_secure.compat.torch import is_view, put_hook_first
from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.float32 import exact_products
from lightning_secure.privacy.gradients.products import is_short
from lightning_secure.privacy.gradients.rules.layer_rule import Record, Unit


class Recorder:
    """Keeps the records of one forward and backward pass.

    Args:
        units: The layers to watch, each of another module.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = tuple(units)
        self._handles: list[Callable[[], None]] = []
        self._pending: list[Record] = []
        self._calls: Counter[Unit] = Counter()
        uses = Counter(id(p) for unit in units for p in unit.parameters)
        self._alone = {unit for unit in units if all(uses[id(p)] == 1 for p in unit.parameters)}
        self._active = False
        self._whole = False
        self._rows: int | None = None
        self._frozen: list[list[nn.Parameter]] = []
        # With all parameters frozen no layer's output may require grad; this leaf makes it.
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def called(self) -> tuple[Unit, ...]:
        """The layers that the last block went through, in the order of their first calls."""
        return tuple(self._calls)

    def attach(self) -> None:
        """Put the hooks on the layers, and on their parameters."""
        for unit in self._units:
            self._handles.append(unit.attach(self))
        for parameter in dict.fromkeys(p for unit in self._units for p in unit.parameters):
            handle = cast("Any", parameter).register_hook(self._past_layer)
            # First, so that no hook of the user's is shown a gradient without noise.
            put_hook_first(parameter, handle)
            self._handles.append(handle.remove)

    def detach(self) -> None:
        """Take the hooks off again."""
        while self._handles:
            self._handles.pop()()

    @contextlib.contextmanager
    def recording(self, *, rows: int | None = None, whole: bool = False) -> Iterator[None]:
        """Record what runs in the block.

        Args:
            rows: Rows of the batch. If it is given, a layer that is called once for all of them, as
                position embeddings are, with a first dimension of one, has its output repeated
                for each: what was broadcast is the same, and each row's part can be told.
            whole: Whether inputs and gradients are kept in any case. Otherwise a layer that is
                used once is reduced to its norms while the backward pass is still running, which
                frees what it does not need any more.
        """
        self._pending = []
        self._calls.clear()
        self._whole, self._rows = whole, rows
        self._active = True
        try:
            yield
        finally:
            self._active = False
            while self._frozen:
                self.after()

    def take(self, batch: int, *, factor: float = 1.0) -> list[Record]:
        """Return the records of the last block and forget them.

        Args:
            batch: Rows of the chunk. The loss is taken to be their mean, so the gradient of one
                sample's own loss is so many times what reached the layer.
            factor: The factor of the loss before the backward pass.

        Raises:
            UnsupportedModelError: if a layer's first dimension is not the batch, so its gradients
                cannot be told apart by sample.
        """
        records, self._pending = self._pending, []
        for record in records:
            inputs, outputs = record.shapes
            if {inputs[:1], outputs[:1]} != {(batch,)}:
                raise UnsupportedModelError(
                    f"layer {record.unit.name!r} works on an input of shape {inputs} and an output "
                    f"of shape {outputs} for a batch of {batch}: its first dimension is not the "
                    "batch, so one sample's gradient cannot be told from another's. Keep the batch "
                    "as the first dimension through every layer with parameters (expand what is "
                    "shared, do not fold other dimensions into it). This step was not taken."
                )
            record.scale = batch / factor
        return records

    def __getstate__(self) -> dict[str, Any]:
        # The hooks make a recorder part of the model's pickle, and records are not private.
        nothing = {"_pending": [], "_handles": [], "_frozen": [], "_active": False}
        return {**self.__dict__, **nothing, "_calls": Counter()}

    # Compiled, they would be traced once and run into what must happen each time.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, unit: Unit) -> None:
        """Freeze a unit's parameters while its layer runs forward."""
        if self._active:
            # Those that the user has frozen stay so afterwards.
            frozen = [p for p in unit.parameters if p.requires_grad]
            self._frozen.append([])
            for parameter in frozen:
                _freeze(unit, parameter)
            self._frozen[-1] = frozen

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, unit: Unit | None = None) -> None:
        """Thaw what the last :meth:`before` has frozen."""
        if self._frozen:
            for parameter in self._frozen.pop():
                parameter.requires_grad_(True)

    def _past_layer(self, grad: Tensor) -> Tensor | None:
        """Drop a gradient that reaches a parameter past its layer's call and so past the clipping.

        The preflight refuses where it is not zero.
        """
        return torch.zeros_like(grad) if self._active else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, unit: Unit, inputs: Tensor, output: Tensor) -> Tensor:
        """Return ``output``, of which the gradient will be recorded together with ``inputs``."""
        if not self._active or not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = _anchored(output, self._anchor)
        rows = self._rows or 1
        if rows > 1 and output.ndim > 1 and inputs.shape[:1] == output.shape[:1] == (1,):
            inputs, output = (x.expand(rows, *x.shape[1:]) for x in (inputs, output))
        self._calls[unit] += 1
        if unit.multiplies and is_short(output):
            inputs = inputs.to(output.dtype)  # which the layer multiplied, and half the memory
        # The graph holds its hooks until all of it is done: the input is handed over, not shared.
        hook = partial(self._after_backward, unit, [inputs.detach()], output.shape)
        cast("Any", _not_a_view(output)).register_hook(hook)
        return output

    def _after_backward(
        self, unit: Unit, handed: list[Tensor], shape: torch.Size, grads: Tensor
    ) -> None:
        if not self._active:
            return
        if not handed:
            raise UnsupportedModelError(
                f"layer {unit.name!r} got a gradient a second time for one call, as from "
                "backward(retain_graph=True) run twice. Add the losses up and run backward once. "
                "This step was not taken."
            )
        inputs, grads = handed.pop(), grads.detach()
        if self._whole:  # to be compared with autograd's gradient, whatever hooks do to them
            inputs, grads = inputs.clone(), grads.clone()
        record = Record(unit, inputs, grads.reshape(shape))
        self._pending.append(record)
        batched = bool(shape and inputs.ndim) and shape[0] == len(inputs)
        if batched and not self._whole and unit in self._alone and self._calls[unit] == 1:
            with exact_products():
                record.release_inputs()


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


def _freeze(unit: Unit, parameter: nn.Parameter) -> None:
    try:
        parameter.requires_grad_(False)
    except RuntimeError:  # what torch.func says of any change of requires_grad inside it
        raise UnsupportedModelError(
            f"layer {unit.name!r} is called inside a transform of torch.func (grad, vmap, jvp), "
            "where its gradients cannot be recorded. Call it outside, or use torch.autograd.grad "
            "with respect to the inputs. This step was not taken."
        ) from None


def _anchored(tensor: Tensor, anchor: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Anchored.apply
    if is_view(tensor):  # of a compiled layer, which made it without grad: cannot be changed
        tensor = tensor.clone()
    return apply(tensor, anchor)


def _not_a_view(output: Tensor) -> Tensor:
    """Return the tensor whose gradient is the output's, also if the output is changed in place.

    ``nn.Linear`` over time returns a view. What ``+=`` or ``nn.ReLU(inplace=True)`` then does to it
    is the history of the tensor that it is a view of, and goes past the view's own hooks.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    if base is not None and whole and base.is_contiguous() and output.is_contiguous():
        return base
    return output
