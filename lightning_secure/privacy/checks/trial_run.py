"""Trial runs: one pass of a model, its records, and how two passes are compared."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.batch_rows import copied
from lightning_secure.privacy.checks.loss_graph import ISOLATE, loss_graph
from lightning_secure.privacy.gradients.clipped_sums import add_clipped_sums
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.rules.layer_rule import Gradients, Record, accumulate

NO_STEP: Final = "No step was taken."
_UNCLIPPED: Final = 1e30

#: Of torch, Python and NumPy: one for all, or one for each.
Seed = int | tuple[int, int, int]


@dataclass
class Run:
    """Records of one pass.

    Attributes:
        records: What each use of a layer has left.
        seed: Of the pass.
        drew: Whether it has drawn random numbers, so that another seed is another pass.
        fault: What is not linear between the means over the rows and the loss.
    """

    records: list[Record]
    seed: Seed = 0
    drew: bool = False
    fault: str | None = None

    def squares(self) -> Tensor:
        """Return the squared norm per record and row, shape ``(records, rows)``."""
        return torch.stack([record.squares() for record in self.records])


@dataclass(frozen=True)
class Trial:
    """The parts that a trial run needs.

    Attributes:
        engine: Attached to the model.
        model: Whose parameters get gradients.
        loss_of: From a batch to the scalar loss.
        backward: The way of the step itself, which the module may have made its own.
        outcome: What a refusal says of the step.
    """

    engine: GradientEngine
    model: nn.Module
    loss_of: Callable[[Any], Tensor]
    backward: Callable[[Tensor], Any]
    outcome: str = NO_STEP

    def recorded(self, batch: Any, *, rows: int, seed: Seed = 0) -> Run:
        """Run forward and backward and return the records.

        Args:
            batch: For the module.
            rows: Its rows.
            seed: The same one has dropout and augmentations do the same.

        Raises:
            UnsupportedModelError: if there is no gradient, or one that is not finite, or the model
                is compiled in a way that leaves no place to record.
        """
        seed_all(seed)
        states = random_states()
        with self.engine.recording(rows=rows, whole=True):
            loss = self._loss(batch, rows)
            if not loss.requires_grad:
                raise UnsupportedModelError(
                    f"the loss does not depend on any trainable layer. {NO_STEP}"
                )
            fault = loss_graph(loss, rows).fault if rows > 1 else None
            self.backward(self.engine.scaled(loss, rows))
        run = Run(self.engine.take(rows), seed, drew=random_states() != states, fault=fault)
        if not (torch.isfinite(loss) and torch.isfinite(run.squares()).all()):
            raise UnsupportedModelError(
                "the loss or its gradients are not finite on rows recombined from the first batch, "
                f"so nothing could be checked. Scale the inputs, by public constants. {NO_STEP}"
            )
        return run

    def summed(self, batch: Any, *, rows: int) -> dict[nn.Parameter, Tensor]:
        """Run forward and backward just as a step does; return the sums of unclipped gradients.

        Unlike :meth:`recorded`, norms are taken while the backward pass is still running.
        """
        seed_all(0)
        with self.engine.recording(rows=rows):
            self.backward(self.engine.scaled(self._loss(batch, rows), rows))
        sums: dict[nn.Parameter, Tensor] = {}
        add_clipped_sums(sums, self.engine.take(rows), max_grad_norm=_UNCLIPPED)
        return sums

    def _loss(self, batch: Any, rows: int) -> Tensor:
        try:
            return self.loss_of(copied(batch, rows))
        except Exception as error:
            if not type(error).__module__.startswith("torch._dynamo"):
                raise
            raise UnsupportedModelError(
                "torch.compile cannot compile the training step together with what records each "
                f"layer ({type(error).__name__}): fullgraph=True leaves no place for it, and "
                "self.log of some versions of Lightning cannot be compiled. Compile submodules, "
                f"without fullgraph. {NO_STEP}"
            ) from error

    def ordinary(self, batch: Any, *, rows: int) -> list[Tensor | None]:
        """Run forward and backward without records; return the gradient of each parameter."""
        seed_all(0)
        self.model.zero_grad(set_to_none=True)
        with _without_hooks(self.engine.parameters), self.engine.means.applied(rows):
            self.backward(self.engine.scaled(self.loss_of(copied(batch, rows)), rows))
        gradients = [
            None if p.grad is None else self.engine.unscaled(p.grad) for p in self.engine.parameters
        ]
        self.model.zero_grad(set_to_none=True)  # the model's own code must not find them
        return gradients


@contextlib.contextmanager
def _without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no hook on a parameter, as loggers put them there, see a gradient without noise.

    In the steps themselves parameters are frozen, and have none.
    """
    every = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in parameters]
    kept = [(hooks, dict(hooks)) for pair in every for hooks in pair if hooks]
    try:
        for hooks, _ in kept:
            hooks.clear()
        yield
    finally:
        for hooks, content in kept:
            hooks.update(content)


def seed_all(seed: Seed) -> None:
    """Seed what a pass, or a collate function, may draw from."""
    for_torch, for_python, for_numpy = (seed,) * 3 if isinstance(seed, int) else seed
    torch.manual_seed(for_torch)
    random.seed(for_python)
    np.random.seed(for_numpy)


def random_states() -> tuple[Any, ...]:
    """Return the states of the generators that :func:`seed_all` seeds, to be compared."""
    cuda: Any = torch.cuda
    devices = cuda.get_rng_state_all() if cuda.is_initialized() else []
    numpys: Any = np.random.get_state()
    kind, words, *rest = numpys
    torchs = [bytes(state.numpy()) for state in (torch.get_rng_state(), *devices)]
    return (*torchs, random.getstate(), kind, bytes(words), *rest)


def same_layers(one: Run, other: Run) -> bool:
    """Return whether both passes used the same layers in the same order."""
    return [record.unit for record in one.records] == [record.unit for record in other.records]


def require_same_layers(one: Run, other: Run) -> None:
    """Make sure that two passes of other rows can be compared layer by layer.

    Raises:
        UnsupportedModelError: if the two passes cannot be compared.
    """
    if not same_layers(one, other):
        raise UnsupportedModelError(
            "the model runs through other layers when other rows are in the batch, so its rows "
            f"cannot be trained together privately. {ISOLATE} {NO_STEP}"
        )


def row_differs(one: Run, other: Run, row: int, *, tolerance: float, floor: float = 1e-12) -> bool:
    """Return whether a row's gradient is another one in another pass; see :func:`differing`."""
    return differing(one, other, row, tolerance=tolerance, floor=floor) is not None


def differing(
    one: Run, other: Run, row: int, *, tolerance: float, floor: float = 1e-12
) -> str | None:
    """Return the layer, the last one in the model, in which a row's gradient is another one.

    Args:
        one: A pass.
        other: Another pass through the same layers.
        row: Compared are its gradients themselves: mixing may keep their norms.
        tolerance: Of the difference's norm, relative to that of the gradient, in any record.
        floor: Squared norm of a difference that is rounding, relative to the largest record's.
    """
    largest = max(float(run.squares()[:, row].max()) for run in (one, other))
    for before, after in zip(one.records, other.records, strict=True):
        if _same_evidence(before, after, row):
            continue
        a, b = _gradient(before, row), _gradient(after, row)
        scale = max(_square(a.values()), _square(b.values()))
        if _square(a[p] - b[p] for p in a) > tolerance**2 * scale + floor * largest:
            return before.unit.name
    return None


def whole_difference(one: Run, other: Run, row: int) -> float:
    """Return by how much a row's gradient is another one, relative to it, in any parameter.

    Passes may have run through other layers, as recurrent ones do in longer rows. What is small
    beside the whole gradient may be rounding, and counts as less.
    """
    wholes: list[dict[nn.Parameter, Tensor]] = [{}, {}]
    for run, whole in zip((one, other), wholes, strict=True):
        for record in run.records:
            for parameter, gradient in _gradient(record, row).items():
                accumulate(whole, parameter, gradient)
    sizes = [{p: _square([item]) ** 0.5 for p, item in whole.items()} for whole in wholes]
    floor = 1e-12 + 1e-3 * max(math.hypot(*size.values()) for size in sizes)
    largest = 0.0
    for parameter in {**wholes[0], **wholes[1]}:
        there = [whole[parameter] for whole in wholes if parameter in whole]
        apart = there[0] - there[1] if len(there) > 1 else there[0]
        scale = max(floor, *(size.get(parameter, 0.0) for size in sizes))
        largest = max(largest, _square([apart]) ** 0.5 / scale)
    return largest


def _same_evidence(before: Record, after: Record, row: int) -> bool:
    """Return whether input and output gradient are alike to the bit, so that nothing is formed."""
    pairs = zip(before.evidence(), after.evidence(), strict=True)
    return before.scale == after.scale and all(torch.equal(a[row], b[row]) for a, b in pairs)


def _gradient(record: Record, row: int) -> Gradients:
    """Form one row's gradient only: those of all rows may not fit into memory."""
    inputs, grads = record.evidence()
    place = slice(row, row + 1)
    return Record(record.unit, inputs[place], grads[place], scale=record.scale).per_sample()


def _square(gradients: Any) -> float:
    return sum(float(torch.linalg.vector_norm(item)) ** 2 for item in gradients)


_DROPOUTS: Final = frozenset(
    {
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
        torch.alpha_dropout,
        torch.feature_dropout,
        torch.feature_alpha_dropout,
        torch.native_dropout,
    }
)


def _backward(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Do what ``Tensor.backward`` does; given a tensor, it would call the mode for ever."""
    slope = torch.ones_like(self) if gradient is None else gradient
    edge = torch.autograd.graph.get_gradient_edge(self)
    torch.autograd.backward((edge,), (slope,), retain_graph, create_graph, inputs=inputs)


class _Without(TorchFunctionMode):
    """Has dropout drop nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            value: Tensor = args[0] if args else kwargs["input"]
            return (
                (value.clone(), torch.ones_like(value))
                if func is torch.native_dropout
                else (value.clone())
            )
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        elif func is functional.multi_head_attention_forward:
            kwargs["training"] = False  # which decides over its dropout only
        elif func is Tensor.backward:  # in which checkpointed layers run again
            with self:
                return _backward(*args, **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Have dropout drop nothing, as a layer or as a function.

    Masks differ between batches of other sizes, also from one seed. Everything else goes on
    training.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        # What is compiled would be compiled again for this, and the mode does not reach into it.
        with torch.compiler.set_stance("force_eager"), _Without():
            yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training = training
