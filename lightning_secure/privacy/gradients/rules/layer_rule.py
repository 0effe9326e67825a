"""The interface of a layer's rule: per-sample gradients, their norms and weighted sums.

A layer's gradient of one sample can be had from the layer's input ``a`` and the gradient ``g`` of
its output. There are several ways there, and which is the cheapest depends on shapes and on the
machine. On a processor a unit times its ways on rows like the first one and keeps the fastest. On a
GPU it predicts from the shape of a row how long each takes: timing would wait for the device.

Source:
    Bu et al. 2023, arXiv:2210.00038 (book-keeping).
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_secure.compat.torch import writes
from lightning_secure.errors import PrivacyError, UnsupportedModelError
from lightning_secure.privacy.gradients.formulas import Grams, cancelling
from lightning_secure.privacy.gradients.products import is_short, on_device, widened

Gradients = Mapping[nn.Parameter, Tensor]


class Watch(Protocol):
    """The recorder's action around each call of a layer."""

    def before(self, unit: Unit) -> None:
        """Freeze the unit's parameters."""

    def after(self, unit: Unit) -> None:
        """Thaw what :meth:`before` has frozen; also called where the layer fails."""

    def __call__(self, unit: Unit, inputs: Tensor, output: Tensor) -> Tensor:
        """Take an input and an output, batch first; return the output that goes on."""


#: Per-sample gradients of one layer may be kept until the norms are known up to this many bytes,
#: or up to a little more than the input and output gradient that they make superfluous.
KEPT_BYTES: Final = 2**20
KEPT_RATIO: Final = 1.25
#: One sample's may be formed for a moment up to this many.
FORMED_BYTES: Final = 512 * 2**20
#: What is formed for a moment is formed for so many rows at a time as fit into this many bytes.
PIECE_BYTES: Final = 8 * 2**20
PIECE_BYTES_ON_DEVICES: Final = 256 * 2**20
#: Gram matrices of several layers are looked at together up to so many bytes a row.
TOGETHER_BYTES: Final = 2**20
#: A way that takes so many times another's multiplications is not even tried.
HOPELESS: Final = 4
_TRIALS: Final = 3
#: Rows for which ways are chosen. They are timed with fewer where so many take more bytes.
_ROWS: Final = 32
_TIMED_BYTES: Final = 64 * 2**20
#: On GPUs: multiplications a second, in bfloat16 and in others, bytes a second, and seconds that a
#: launch takes. They are those of one H200; the proportions of others are alike.
_RATES: Final = {True: 4e14, False: 3e13}
_BYTES: Final = 4e12
_LAUNCH: Final = 5e-6


class Way(NamedTuple):
    """A method for a record's norms and sums.

    Attributes:
        form: How per-sample gradients are formed: a name that the unit knows; empty if they are
            not formed, because the norms come by formula (the ghost norm).
        kept: Whether they are kept for the weighted sum, which then needs neither input nor
            output gradient.
    """

    form: str
    kept: bool


GHOST: Final = Way("", kept=False)


class Unit(ABC):
    """A layer whose per-sample gradients can be had from its input and its output's gradient.

    Args:
        name: Its name in the model, for errors.
        module: The layer.
        parameters: The parameters whose gradients it accounts for.
    """

    #: Names under which :meth:`per_sample` knows to form gradients.
    forms: tuple[str, ...] = ("product",)
    #: Those of them that serve on GPUs.
    forms_on_devices: tuple[str, ...] = ("product",)
    #: Whether :meth:`ghost_squares` is there.
    has_ghost: bool = False
    #: Whether the weighted sum is a product of matrices, of input and weighted output gradient.
    multiplies: bool = False

    def __init__(self, name: str, module: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.name = name
        self.module = module
        self.parameters = tuple(parameters)
        self._way: Way | None = None

    def attach(self, watch: Watch) -> Callable[[], None]:
        """Have every call of the layer watched; returns how to end that."""
        module = self.module
        handles = [
            module.register_forward_pre_hook(partial(_before_forward, self, watch)),
            # Also where the forward pass fails or, computed again by a checkpoint, ends early.
            module.register_forward_hook(partial(_thaw, self, watch), always_call=True),
            module.register_forward_hook(partial(_after_forward, self, watch)),
        ]

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    @abstractmethod
    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return each sample's gradient, shape ``(batch, *parameter.shape)``."""

    def ghost_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        """Return the squared norms without forming the gradients, shape ``(batch,)``."""
        raise PrivacyError(f"{type(self).__name__} has no ghost norm. This step was not taken.")

    def grams(self, inputs: Tensor, grads: Tensor, *, known: Tensor | None = None) -> Grams | None:
        """Return the Gram matrices that the ghost norm is made of, if it is made of those alone.

        Args:
            inputs: Of the layer, shape ``(batch, ...)``.
            grads: Of its output, shape ``(batch, ...)``.
            known: Of the inputs, if it was returned before.
        """
        return None

    def weighted_sum(self, inputs: Tensor, grads: Tensor, weights: Tensor) -> Gradients:
        """Return ``sum_i weights[i] * gradient_i`` for each parameter."""
        return combined(self.per_sample(inputs, grads, form=self.usable(grads)[0]), weights)

    def total(self, inputs: Tensor, grads: Tensor) -> Gradients:
        """Return ``sum_i gradient_i``; a unit that :attr:`multiplies` takes bfloat16 as it is."""
        ones = torch.ones(len(grads), dtype=widened(grads.dtype), device=grads.device)
        return self.weighted_sum(inputs, grads, ones)

    def usable(self, grads: Tensor) -> tuple[str, ...]:
        """Return the forms that serve where these gradients lie."""
        return self.forms_on_devices if on_device(grads) else self.forms

    def apart_squares(self, inputs: Tensor, grads: Tensor) -> Tensor | None:
        """Return the squares of what each sample's gradient would come to if nothing cancelled.

        At least that, shape ``(batch,)``; None if :meth:`weighted_sum` adds up gradients as
        :meth:`per_sample` forms them, so that what cancels does so within a sample.
        """
        return None

    def joined(self, records: Sequence[Record]) -> tuple[Tensor, Tensor] | None:
        """Return inputs and gradients of one use that amounts to several, if there is such a one.

        The gradient of a layer that is used twice is the sum of its uses; where the sum runs over
        time anyway, laying them one after another in time gives it.
        """
        return None

    def formed_bytes(self, inputs: Tensor, grads: Tensor) -> int:
        """Return how many bytes the per-sample gradients take."""
        numbers = sum(p.numel() for p in self.parameters)
        return len(grads) * numbers * widened(grads.dtype).itemsize

    def working_bytes(self, inputs: Tensor, grads: Tensor, way: Way) -> int:
        """Return about how many bytes a row takes for a moment, on the way to its norm."""
        return self.formed_bytes(inputs[:1], grads[:1]) if way.form else 0

    def ghost_share(self, inputs: Tensor, grads: Tensor) -> float:
        """Return about how many multiplications the ghost norm takes for one of the product."""
        return 1.0

    def ways(self, inputs: Tensor, grads: Tensor) -> list[Way]:
        """Return the ways that memory allows; at least one."""
        size = self.formed_bytes(inputs, grads)
        held = grads.nbytes + inputs.nbytes
        share = self.ghost_share(inputs, grads) if self.has_ghost else math.inf
        found: list[Way] = []
        forms = self.usable(grads)
        if (share > 1 / HOPELESS and size <= FORMED_BYTES * len(grads)) or not self.has_ghost:
            found += [Way(form, kept=False) for form in forms]
        if size <= max(KEPT_BYTES, KEPT_RATIO * held) or not self.has_ghost:
            found += [Way(form, kept=True) for form in forms]
        if self.has_ghost and not (found and share > HOPELESS):
            found = [GHOST, *found]
        return found

    def way(self, inputs: Tensor, grads: Tensor) -> Way:
        """Return the fastest way for rows of such a shape, which is chosen once.

        The number of rows has no say. By one way a norm comes with a bound of its rounding, by
        another weighted gradients are rounded: one more row could change what all others add.
        """
        if self._way is None:
            some = _few(inputs, grads, rows=_ROWS)
            ways = self.ways(*some)
            if len(ways) == 1:
                costs = [0.0]
            elif is_short(grads) or on_device(grads):
                costs = [self.predicted(way, *some) for way in ways]
            else:
                size = inputs[:1].nbytes + grads[:1].nbytes
                rows = max(1, min(_ROWS, _TIMED_BYTES // size))
                few = [item.contiguous() for item in _few(inputs, grads, rows=rows)]
                # In turns, so that a busy moment of the machine is not one way's alone.
                trials = [[self._cost(way, *few) for way in ways] for _ in range(_TRIALS)]
                costs = [min(trial) for trial in zip(*trials, strict=True)]
            self._way = ways[costs.index(min(costs))]
        return self._way

    def predicted(self, way: Way, inputs: Tensor, grads: Tensor) -> float:
        """Return about how many seconds a way takes on a GPU: products, bytes and launches.

        A sum of gradients that are not kept is one more product.
        """
        product = self.multiplications(inputs, grads) / _RATES[is_short(grads)]
        moved = self.operand_bytes(inputs, grads) / _BYTES
        written = self.formed_bytes(inputs, grads) / _BYTES
        if way.kept:
            return product + moved + 3 * written + 5 * _LAUNCH  # written, and read twice
        if way.form:
            return 2 * (product + moved) + 4 * written + 10 * _LAUNCH
        norms = self.ghost_share(inputs, grads) * product
        again = norms if is_short(grads) else 0.0  # of what was rounded
        return norms + again + product + 3 * moved + 8 * _LAUNCH

    def multiplications(self, inputs: Tensor, grads: Tensor) -> float:
        """Return how many multiplications all gradients by sample take."""
        return 0.0

    def operand_bytes(self, inputs: Tensor, grads: Tensor) -> float:
        """Return how many bytes the operands of the products have."""
        return inputs.nbytes + grads.nbytes

    def _cost(self, way: Way, inputs: Tensor, grads: Tensor) -> float:
        """Return the seconds that a way takes on a processor."""
        weights = torch.ones(len(grads), dtype=widened(grads.dtype))
        start = time.perf_counter()
        record = Record(self, inputs, grads, scale=1.0, way=way)
        record.squares()
        record.weighted_sum(weights)
        return time.perf_counter() - start


def _few(*tensors: Tensor, rows: int) -> list[Tensor]:
    """Return tensors of so many rows, each like the first."""
    return [item[:1].expand(rows, *item.shape[1:]) for item in tensors]


@dataclass(eq=False)
class Record:
    """The record of one use of one layer.

    Attributes:
        unit: The layer.
        inputs: Its input, shape ``(batch, ...)``; None once the per-sample gradients are kept.
        grads: Gradient by the output of what went backward, shape ``(batch, ...)``; None likewise.
        scale: Factor from the recorded gradient to that of the sample's own loss.
        way: How norms and sums are had; chosen by the unit if None.
        shapes: Shapes of the input and of the output's gradient.
        short: Whether its products are of bfloat16 numbers, whichever way they are formed.
    """

    unit: Unit
    inputs: Tensor | None
    grads: Tensor | None
    scale: float = 1.0
    way: Way | None = None
    _kept: list[tuple[slice, Gradients]] | None = None
    _squares: Tensor | None = None
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    short: bool = False
    _versions: list[int] | None = None
    _weighted: bool = False
    _gram: Tensor | None = None

    def __post_init__(self) -> None:
        inputs, grads = self.evidence()
        self.shapes = tuple(inputs.shape), tuple(grads.shape)
        self._versions = _versions(inputs, grads)
        self.short = self.unit.multiplies and is_short(grads)

    def squares(self) -> Tensor:
        """Return the squared norm of each sample's own gradient, shape ``(batch,)``."""
        if self._squares is None:
            if self.formed() is not None:
                squares = [_norms_squared(piece) for _, piece in self.formed() or ()]
            else:
                inputs, grads = self.evidence()
                pieces = _pieces(self.unit, inputs, grads, self.chosen())
                squares = [self._piece_squares(inputs[rows], grads[rows]) for rows in pieces]
            self._squares = squares[0] if len(squares) == 1 else torch.cat(squares)
        return self._squares if self.scale == 1 else self._squares * self.scale**2

    def _piece_squares(self, inputs: Tensor, grads: Tensor) -> Tensor:
        form = self.chosen().form
        if not form:
            return self.unit.ghost_squares(inputs, grads)
        square = _norms_squared(self.unit.per_sample(inputs, grads, form=form))
        apart = self.unit.apart_squares(inputs, grads)
        return square if apart is None else square + cancelling(square.dtype) * apart

    def chosen(self) -> Way:
        """Return the way of this record, which is chosen once."""
        if self.way is None:
            self.way = self.unit.way(*self.evidence())
        return self.way

    def formed(self) -> list[tuple[slice, Gradients]] | None:
        """Return the per-sample gradients, by pieces of the rows, if they are to be kept."""
        if self._kept is None and self.chosen().kept:
            inputs, grads = self.evidence()
            self._kept = [
                (rows, self.unit.per_sample(inputs[rows], grads[rows], form=self.chosen().form))
                for rows in _pieces(self.unit, inputs, grads, self.chosen())
            ]
        return self._kept

    def grams(self) -> Grams | None:
        """Return the Gram matrices that the norms are still to be made of, if they are on a GPU."""
        if self._squares is not None or self.inputs is None or not on_device(self.inputs):
            return None
        inputs, grads = self.evidence()
        way = self.chosen()
        # What takes more for a row goes through the rows in pieces. By the shape of one row: how
        # many there are has no say in the errors of layers that are looked at together.
        if way.form or self.unit.working_bytes(inputs, grads, way) > TOGETHER_BYTES:
            return None
        found = self.unit.grams(inputs, grads, known=self._gram)
        if found is not None and found.inputs[0].nbytes <= self.inputs[0].nbytes:
            self._gram = found.inputs  # for what is weighted, if it takes no more than they do
        return found

    def measured(self, squares: Tensor) -> None:
        """Take norms that were made of :meth:`grams`."""
        self._squares = squares

    def release_inputs(self) -> None:
        """Compute what lets go of memory now, and drop what is not needed for the sums.

        On a GPU norms wait, to be taken together with those of other layers.
        """
        later = on_device(self.evidence()[1])
        kept = self.formed() is not None
        if not later:
            self.squares()
        if kept:
            self.inputs = self.grads = None

    def per_sample(self) -> Gradients:
        """Return each sample's own gradient, shape ``(batch, *parameter.shape)``."""
        if self._kept is not None:
            pieces = [formed for _, formed in self._kept]
        else:
            inputs, grads = self.evidence()
            pieces = [self.unit.per_sample(inputs, grads, form=self.unit.usable(grads)[0])]
        if len(pieces) > 1:
            pieces = [{p: torch.cat([piece[p] for piece in pieces]) for p in pieces[0]}]
        if self.scale == 1:
            return pieces[0]
        return {parameter: grads * self.scale for parameter, grads in pieces[0].items()}

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The layer's parameters."""
        return self.unit.parameters

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return ``sum_i weights[i] * gradient_i`` over the samples' own gradients.

        Args:
            weights: Shape ``(batch,)``.

        Raises:
            PrivacyError: if weighted gradients must be rounded first, and were not.
        """
        if self._weighted:
            return self._shortened(weights)
        weights = weights if self.scale == 1 else weights * self.scale
        if self._kept is not None:
            return _combined(self._kept, weights)
        if self.rounds:
            raise PrivacyError("a rounded sum was not checked. This step was not taken.")
        inputs, grads = self.evidence()
        if self.short:  # formed in pieces, and weighed exactly
            formed = (
                (rows, self.unit.per_sample(inputs[rows], grads[rows], form=self.chosen().form))
                for rows in _pieces(self.unit, inputs, grads, self.chosen())
            )
            return _combined(formed, weights)
        return self.unit.weighted_sum(inputs, grads, weights)

    def rows(self, keep: Tensor) -> Record:
        """Return a record of those samples for which ``keep`` is true.

        The others are taken out, and not set to zero: a layer may well make NaN of an input of
        zeros, and a weight of zero would make NaN of an infinity.
        """
        if self._kept is None:
            inputs, grads = self.evidence()
            return Record(self.unit, inputs[keep], grads[keep], self.scale, self.way)
        chosen = copy.copy(self)
        formed = {p: torch.cat([piece[p] for _, piece in self._kept]) for p in self._kept[0][1]}
        chosen._kept = [(slice(None), {p: grads[keep] for p, grads in formed.items()})]
        return chosen

    @property
    def rounds(self) -> bool:
        """Whether a weighted sum must round weighted gradients to bfloat16, to be a fast product.

        Then it is that of a record that :meth:`weighted` returns, whose norms tell what is added.
        """
        return self.short and self._kept is None and not self.chosen().form

    def weighted(self, weights: Tensor) -> Record:
        """Return a record of weighted gradients, rounded to the type that they have here.

        Args:
            weights: Shape ``(batch,)``, at most 1.
        """
        inputs, grads = self.evidence()
        rounded = torch.empty_like(grads)
        torch.mul(grads, _by_row(weights, grads), out=rounded)
        return Record(
            self.unit, inputs, rounded, self.scale, self.way, _weighted=True, _gram=self._gram
        )

    def _shortened(self, halves: Tensor) -> Gradients:
        """Return the sum of gradients that are weighted already, times powers of two by row."""
        inputs, grads = self.evidence()
        if self.unit.multiplies:  # nothing else holds this tensor
            sums = self.unit.total(inputs, grads.mul_(_by_row(halves, grads)))
        else:
            sums = self.unit.weighted_sum(inputs, grads, halves)
        if self.scale == 1:
            return sums
        return {parameter: total.mul_(self.scale) for parameter, total in sums.items()}

    def evidence(self) -> tuple[Tensor, Tensor]:
        """Return the input and the output's gradient, which must still be there.

        Raises:
            UnsupportedModelError: if one of them was changed in place since, maybe after norms were
                taken.
        """
        assert self.inputs is not None  # noqa: S101 # dropped only when the gradients are kept
        assert self.grads is not None  # noqa: S101
        if self._versions not in (None, _versions(self.inputs, self.grads)):
            raise UnsupportedModelError(
                f"the input of layer {self.unit.name!r}, or the gradient of its output, was "
                "changed in place in the backward pass, as by a hook that calls grad.mul_(): what "
                "is added up would not be what was measured. Scale gradients by a "
                "torch.autograd.Function that returns a new tensor. This step was not taken."
            )
        return self.inputs, self.grads


def _combined(pieces: Iterable[tuple[slice, Gradients]], weights: Tensor) -> Gradients:
    totals: dict[nn.Parameter, Tensor] = {}
    for rows, piece in pieces:
        for parameter, total in combined(piece, weights[rows]).items():
            accumulate(totals, parameter, total)
    return totals


def _versions(*tensors: Tensor) -> list[int]:
    """Return how often each tensor was changed in place, of those of which it is counted."""
    return [writes(tensor) for tensor in tensors]


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, which ``fully_shard`` exchanges for one that derives from it."""
    kinds = type(module).__mro__
    return kinds[kinds.index(FSDPModule) + 1] if FSDPModule in kinds else kinds[0]


def _by_row(weights: Tensor, grads: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (grads.ndim - 1))


def norm_squared(per_sample: Tensor) -> Tensor:
    """Return the squared norms, shape ``(batch,)``, of gradients of shape ``(batch, ...)``."""
    dtype = widened(per_sample.dtype)
    norms: Tensor = torch.linalg.vector_norm(per_sample.flatten(1), dim=1, dtype=dtype)
    return norms.square()


def _norms_squared(per_sample: Gradients) -> Tensor:
    squares = [norm_squared(item) for item in per_sample.values()]
    return squares[0] if len(squares) == 1 else torch.stack(squares).sum(0)


def combined(per_sample: Gradients, weights: Tensor) -> Gradients:
    """Return the weighted sum over samples of each parameter's gradients."""
    return {
        parameter: (weights.to(item.dtype) @ item.flatten(1)).view(item.shape[1:])
        for parameter, item in per_sample.items()
    }


def accumulate(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, value: Tensor) -> None:
    """Add a value to a parameter's sum, in place, or begin the sum with the value itself."""
    if parameter in sums:
        sums[parameter].add_(value)
    else:
        sums[parameter] = value


def trainable(parameter: Tensor | None) -> nn.Parameter | None:
    """Return the parameter if it is one and requires grad."""
    if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
        return parameter
    return None


def require_default(unit: Unit, option: str, *, ok: bool, advice: str) -> None:
    """Refuse a layer with an option that its formula does not cover.

    Raises:
        UnsupportedModelError: if ``ok`` is false.
    """
    if not ok:
        raise UnsupportedModelError(
            f"layer {unit.name!r} ({type(unit.module).__name__}) has {option}, which the "
            f"per-sample rules do not cover. {advice} No step was taken."
        )


def _pieces(unit: Unit, inputs: Tensor, grads: Tensor, way: Way) -> list[slice]:
    """Return the rows that are looked at together."""
    room = PIECE_BYTES * torch.get_num_threads()
    if grads.device.type != "cpu":
        room = PIECE_BYTES_ON_DEVICES
    size = max(1, room // max(1, unit.working_bytes(inputs, grads, way)))
    return [slice(start, start + size) for start in range(0, len(grads), size)]


def _before_forward(unit: Unit, watch: Watch, *_: Any) -> None:
    watch.before(unit)


def _thaw(unit: Unit, watch: Watch, *_: Any) -> None:
    watch.after(unit)


def _after_forward(
    unit: Unit, watch: Watch, module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> Tensor:
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise UnsupportedModelError(
            f"layer {unit.name!r} ({type(module).__name__}) does not map one tensor to one "
            "tensor, so its per-sample gradients cannot be formed. This step was not taken."
        )
    if output.is_complex():
        raise UnsupportedModelError(
            f"layer {unit.name!r} ({type(module).__name__}) has trainable parameters and a complex "
            "output, whose gradient the per-sample rules would take the real part of. Let the "
            "layer return real numbers, and make complex ones of them outside. This step was not "
            "taken."
        )
    return watch(unit, inputs[0], output)
