"""From a model to noised gradients; the only user of Opacus.

Linear layers go by formula (:mod:`~lightning_secure.privacy.bookkeeping`), layers for which Opacus
has a grad sampler by that, and small modules of the user's own by functorch through Opacus. What
is left cannot be trained privately and is refused by name.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.bookkeeping import Recorder, add_clipped_sums
from lightning_secure.privacy.noise import GaussianNoise
from lightning_secure.privacy.units.attention import AttentionUnit
from lightning_secure.privacy.units.base import Gradients, Record, Unit, Way, widened
from lightning_secure.privacy.units.conv import ConvUnit
from lightning_secure.privacy.units.embedding import EmbeddingUnit
from lightning_secure.privacy.units.linear import LinearUnit
from lightning_secure.privacy.units.norms import NormUnit

_handlers = logging.root.handlers[:]
from opacus.grad_sample.functorch import (  # noqa: E402
    ft_compute_per_sample_gradient,
    prepare_layer,
)
from opacus.grad_sample.grad_sample_module import GradSampleModule  # noqa: E402
from opacus.layers.dp_rnn import RNNLinear  # noqa: E402
from opacus.layers.param_rename import RenameParamsMixin  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

# Opacus calls logging.basicConfig on import; whether the root logger prints is the user's choice.
logging.root.handlers[:] = _handlers

__all__ = ["GradientEngine", "find_units"]

Sampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


class SampledUnit(Unit):
    """A layer whose per-sample gradients Opacus computes.

    Args:
        name: Its name in the model.
        module: The layer.
        parameters: Its trainable parameters.
        sampler: Opacus' function from activations and output gradients to per-sample gradients.
    """

    def __init__(
        self, name: str, module: nn.Module, parameters: list[nn.Parameter], sampler: Sampler
    ) -> None:
        super().__init__(name, module, parameters)
        self._sampler = sampler

    def ways(self, inputs: Tensor, grads: Tensor) -> list[Way]:
        """Return the one way: the gradients are formed once, and kept."""
        return [Way("product", kept=True)]

    def per_sample(self, inputs: Tensor, grads: Tensor, *, form: str) -> Gradients:
        """Return the gradients.

        Raises:
            UnsupportedModelError: functorch cannot form them.
        """
        dtype = widened(grads.dtype)
        if inputs.is_floating_point():
            inputs = inputs.to(dtype)
        try:
            with torch.no_grad():
                gradients = self._sampler(self.module, [inputs], grads.to(dtype))
        except RuntimeError as error:
            functorch = self._sampler is ft_compute_per_sample_gradient
            if not functorch or isinstance(error, torch.OutOfMemoryError):
                raise
            raise UnsupportedModelError(
                f"layer {self.name!r} ({type(self.module).__name__}) has parameters of its own, so "
                "all of it goes through functorch, which fails. It cannot drop out, draw random "
                "numbers, or decide by values: move the parameters into a small nn.Module with "
                "nothing else in it. This step was not taken."
            ) from error
        _require_known(self, gradients)
        return {p: gradients[p].to(dtype) for p in self.parameters}


_UNITS: dict[type[nn.Module], Callable[[str, Any], Unit]] = {
    nn.Linear: LinearUnit.of,
    RNNLinear: LinearUnit.of,
    nn.Conv1d: ConvUnit,
    nn.Conv2d: ConvUnit,
    nn.Conv3d: ConvUnit,
    nn.Embedding: EmbeddingUnit,
    nn.LayerNorm: NormUnit,
    nn.GroupNorm: NormUnit,
    nn.RMSNorm: NormUnit,
    nn.MultiheadAttention: AttentionUnit,
}


def find_units(model: nn.Module) -> list[Unit]:
    """Return a unit for every layer with trainable parameters.

    Raises:
        UnsupportedModelError: A layer mixes samples or keeps statistics of them, or no way is
            known to its per-sample gradients. The message names it and what to use instead.
    """
    for name, module in model.named_modules():
        _refuse_mixing(name, module)
    return [*_walk("", model, model, set())]


def _walk(name: str, module: nn.Module, root: nn.Module, seen: set[int]) -> Iterator[Unit]:
    if id(module) in seen:
        return  # under two parents: one layer, watched wherever it is called
    seen.add(id(module))
    whole = type(module) is nn.MultiheadAttention
    own = [p for p in module.parameters(recurse=whole) if p.requires_grad]
    if isinstance(module, RenameParamsMixin):
        # Opacus' recurrent layers show the parameters of their cells under other names as well.
        inner = {id(p) for child in module.children() for p in child.parameters()}
        own = [p for p in own if id(p) not in inner]
    sampler: Sampler | None = GradSampleModule.GRAD_SAMPLERS.get(type(module))
    formula = _UNITS.get(type(module))
    if own and formula is not None:
        yield _covering(formula(name, module), own)
        if whole:
            return
    elif own and sampler is not None:
        yield SampledUnit(name, module, own, sampler)
    elif own:
        yield _functorch_unit(name, module, root)
        return  # its children are part of it
    for child_name, child in module.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child, root, seen)


def _covering(unit: Unit, own: list[nn.Parameter]) -> Unit:
    _require_known(unit, unit.parameters, own)
    return unit


def _require_known(
    unit: Unit, known: Collection[nn.Parameter], wanted: Iterable[nn.Parameter] | None = None
) -> None:
    ids = set(map(id, known))
    if missing := [p for p in wanted or unit.parameters if id(p) not in ids]:
        names = {id(p): name for name, p in unit.module.named_parameters()}
        raise UnsupportedModelError(
            f"layer {unit.name!r} ({type(unit.module).__name__}) has parameters that its "
            f"per-sample rule does not know, {', '.join(repr(names[id(p)]) for p in missing)}, as "
            "after weight_norm. No step was taken."
        )


def _functorch_unit(name: str, module: nn.Module, root: nn.Module) -> Unit:
    parameters = dict(module.named_parameters())
    first = next(f"{name}.{n}".lstrip(".") for n, p in parameters.items() if p.requires_grad)
    if module is root:
        raise UnsupportedModelError(
            f"parameter {first!r} belongs to the LightningModule itself, and there is no layer "
            "whose output would tell each sample's part in its gradient. Put it into a small "
            "nn.Module with a forward(x) of its own. No step was taken."
        )
    advice = _ADVICE.get(type(module))
    if (
        advice
        or any(True for _ in module.buffers())
        or not all(p.requires_grad for p in parameters.values())
    ):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) holds parameter {first!r}, and no way to "
            f"its per-sample gradients is known. {advice or _NO_ADVICE} No step was taken."
        )
    prepare_layer(module, batch_first=True)
    return SampledUnit(name, module, list(parameters.values()), ft_compute_per_sample_gradient)


_NO_ADVICE = (
    "Layers of torch.nn with a grad sampler in Opacus work, and so do modules of your own that map "
    "one tensor to one tensor and have neither buffers nor frozen parameters."
)
_ADVICE: dict[type[nn.Module], str] = {
    nn.LSTM: "Use opacus.layers.DPLSTM.",
    nn.GRU: "Use opacus.layers.DPGRU.",
    nn.RNN: "Use opacus.layers.DPRNN.",
}


def _refuse_mixing(name: str, module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) has no weights yet, so its per-sample "
            "gradients have no shape. Give the layer its sizes, or call the model once on a batch "
            "of the right shape, such as zeros, before Trainer.fit. No step was taken."
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training or module.track_running_stats is False:
            raise UnsupportedModelError(
                f"layer {name!r} ({type(module).__name__}) normalises each sample by the others "
                "in its batch and keeps statistics of them without noise. Use nn.GroupNorm or "
                "nn.LayerNorm; opacus.validators.ModuleValidator.fix(model) exchanges them. No "
                "step was taken."
            )
        return
    if getattr(module, "max_norm", None) is not None:
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) has max_norm: it writes into the weights of "
            "the tokens that it meets, without noise, so the weights tell which tokens the rows "
            "have. Leave max_norm out; clipping and weight_decay bound weights too. No step was "
            "taken."
        )
    if type(module) in _ADVICE or type(module) is nn.MultiheadAttention:
        return  # looked at where its parameters are
    validator = ModuleValidator.VALIDATORS.get(type(module))
    errors: list[Any] = validator(module) if validator else []
    trainable = any(p.requires_grad for p in module.parameters())
    if trainable and isinstance(module, nn.EmbeddingBag):
        raise UnsupportedModelError(
            f"layer {name!r} (EmbeddingBag) takes the tokens of all rows in one tensor, of which "
            "it is not known what belongs to which row. Use nn.Embedding on (batch, time) and "
            ".sum(1) or .mean(1), with a mask for padding. No step was taken."
        )
    if errors and (trainable or isinstance(module, nn.modules.instancenorm._InstanceNorm)):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) cannot be trained privately: {errors[0]} "
            "No step was taken."
        )


class GradientEngine:
    """Per-sample clipping and noise for one model.

    Args:
        model: Its trainable parameters are those that require grad now.
        max_grad_norm: Clipping bound.
        loss_scale: Power of two by which :meth:`scaled` multiplies, for gradients in float16.

    Raises:
        UnsupportedModelError: See :func:`find_units`, and if nothing is trainable.
    """

    def __init__(self, model: nn.Module, *, max_grad_norm: float, loss_scale: float = 1.0) -> None:
        self.units = find_units(model)
        self.parameters = list(dict.fromkeys(p for unit in self.units for p in unit.parameters))
        if not self.parameters:
            raise UnsupportedModelError("the model has no trainable parameter. No step was taken.")
        self._covered = frozenset(map(id, self.parameters))
        norms = nn.modules.batchnorm._BatchNorm
        self._statistics = [(n, m) for n, m in model.named_modules() if isinstance(m, norms)]
        self.require_covered(model.named_parameters())
        self._max_grad_norm = max_grad_norm
        self._loss_scale = loss_scale
        self._factor = 1.0
        self._recorder = Recorder(self.units)
        self._sums: dict[nn.Parameter, Tensor] = {}

    def require_covered(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Make sure that no parameter can be trained past the clipping and the noise.

        Args:
            parameters: By name; for example those of an optimizer.

        Raises:
            UnsupportedModelError: One is trainable and none of the engine's layers accounts for
                it: it was added or unfrozen later, or belongs to no layer of the model.
        """
        for name, parameter in parameters:
            if parameter.requires_grad and id(parameter) not in self._covered:
                raise UnsupportedModelError(
                    f"parameter {name!r} is trainable, and no layer that is clipped and noised "
                    "accounts for it: it was added or unfrozen after the run began, is not part of "
                    "the model, or is one that its layer's rule does not know (as after "
                    "weight_norm). Its gradient was not released."
                )

    def attach(self) -> None:
        """Put the hooks on the model."""
        self._recorder.attach()

    def detach(self) -> None:
        """Take the hooks off the model and forget everything un-noised."""
        self._recorder.detach()
        self._sums = {}
        for unit in self.units:
            if hasattr(unit.module, "ft_compute_sample_grad"):
                del unit.module.ft_compute_sample_grad

    @contextlib.contextmanager
    def recording(self, *, rows: int | None = None, whole: bool = False) -> Iterator[None]:
        """Record a forward and a backward pass; parameters are frozen in the block.

        Args:
            rows: Rows of the batch; see :meth:`Recorder.recording`.
            whole: Whether the records keep inputs and gradients whatever the norms need.
        """
        self._factor = 1.0
        with self._recorder.recording(rows=rows, whole=whole):
            yield

    def scaled(self, loss: Tensor, rows: int) -> Tensor:
        """Return what goes backward in place of a mean loss; records are scaled back.

        It is the sum of the rows' losses, times the fixed scale. Backward from a mean, each row's
        gradient is divided by the number of rows, and rounded in the precision of the layer: one
        more row would change the rounding of all others together, and in float16 decide which of
        them overflow. So the others' number stays out of it.

        Args:
            loss: The mean over ``rows`` rows, a scalar.
            rows: How many.

        Raises:
            UnsupportedModelError: The loss is a float16 or a bfloat16.
        """
        if loss.dtype in (torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"the loss is a {str(loss.dtype)[6:]}. float16 ends at 65504, bfloat16 counts to "
                "256: one more row would change all others' gradients together. Compute it in "
                "float32, or from model(x).float(). This step was not taken."
            )
        self._factor = rows * self._loss_scale
        return loss.to(widened(loss.dtype)) * self._factor

    def unscaled(self, gradient: Tensor) -> Tensor:
        """Return an ordinary gradient as it would be without :meth:`scaled`."""
        return gradient.to(widened(gradient.dtype)) / self._factor

    def take(self, batch: int) -> list[Record]:
        """Return and forget the records of the last block.

        Raises:
            UnsupportedModelError: There are none, or a layer's first dimension is not the batch.
        """
        records = self._recorder.take(batch, factor=self._factor)
        if not records:
            raise UnsupportedModelError(
                "the loss does not depend on any trainable layer: nothing could be clipped. This "
                "step was not taken."
            )
        return records

    def begin_step(self) -> None:
        """Forget the sums of the last step; refuse statistics that are frozen no longer."""
        self._sums = {}
        for name, module in self._statistics:
            if module.training or module.track_running_stats is False:
                raise UnsupportedModelError(
                    f"layer {name!r} was frozen by eval() when the run began, and is not any more: "
                    "it would mix rows. Keep it in eval(). This step was not taken."
                )

    def add_chunk(self, batch: int) -> Tensor:
        """Clip the recorded chunk of ``batch`` rows and add it to the step's sums.

        Returns:
            The rows' gradient norms before clipping, shape ``(batch,)``. They are not private.
        """
        return add_clipped_sums(self._sums, self.take(batch), max_grad_norm=self._max_grad_norm)

    def release(
        self,
        noise: GaussianNoise,
        *,
        noise_multiplier: float,
        expected_batch_size: int,
        combine: Callable[[dict[nn.Parameter, Tensor], bool], None] | None = None,
    ) -> None:
        """Put the noised mean gradient into ``.grad`` of every trainable parameter.

        Args:
            noise: Source of the noise.
            noise_multiplier: Its standard deviation over the clipping norm.
            expected_batch_size: The public divisor.
            combine: Makes sums over several processes of those of each, in place; it is told
                whether noise was added to them here.

        The sums are gone afterwards, also if this fails.
        """
        sums, self._sums = self._sums, {}
        std = noise_multiplier * self._max_grad_norm
        for parameter in self.parameters:
            if parameter not in sums:  # no row was drawn, or none came this way
                sums[parameter] = torch.zeros_like(parameter, dtype=widened(parameter.dtype))
            noise.add_(sums[parameter], std=std)
        if combine is not None:
            combine(sums, std > 0)
        for parameter in self.parameters:
            total = sums.pop(parameter)
            if parameter.requires_grad:  # and was not frozen by the user since
                parameter.grad = total.div_(expected_batch_size).to(parameter.dtype)
