"""The rule for each layer of a model; the only user of Opacus but for its accountants.

Linear layers and their like go by formula, layers for which Opacus has a grad sampler by that, and
small modules of the user's own by functorch through Opacus. What is left cannot be trained
privately and is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.products import widened
from lightning_secure.privacy.gradients.rules.attention import AttentionUnit
from lightning_secure.privacy.gradients.rules.conv import ConvUnit
from lightning_secure.privacy.gradients.rules.embedding import EmbeddingUnit
from lightning_secure.privacy.gradients.rules.layer_rule import (
    Gradients,
    Unit,
    Way,
    kind_of,
)
from lightning_secure.privacy.gradients.rules.linear import LinearUnit
from lightning_secure.privacy.gradients.rules.norms import NormUnit

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
            UnsupportedModelError: if functorch cannot form them.
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
        UnsupportedModelError: if a layer mixes samples or keeps statistics of them, or no way is
            known to its per-sample gradients. The message names it and what to use instead.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise UnsupportedModelError(
                f"parameter {name!r} is complex ({parameter.dtype}), and norms, sums and noise are "
                "real: its imaginary part would get no noise. Train real and imaginary part as two "
                "real parameters, in layers of their own, or freeze it. No step was taken."
            )
    for name, module in model.named_modules():
        _refuse_mixing(name, module)
    return [*_walk("", model, model, set())]


def _walk(name: str, module: nn.Module, root: nn.Module, seen: set[int]) -> Iterator[Unit]:
    if id(module) in seen:
        return  # under two parents: one layer, watched wherever it is called
    seen.add(id(module))
    whole = kind_of(module) is nn.MultiheadAttention
    own = [p for p in module.parameters(recurse=whole) if p.requires_grad]
    if isinstance(module, RenameParamsMixin):
        # Opacus' recurrent layers show the parameters of their cells under other names as well.
        inner = {id(p) for child in module.children() for p in child.parameters()}
        own = [p for p in own if id(p) not in inner]
    sampler: Sampler | None = GradSampleModule.GRAD_SAMPLERS.get(kind_of(module))
    formula = _UNITS.get(kind_of(module))
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
    advice = _ADVICE.get(kind_of(module))
    if (
        advice
        or any(True for _ in module.buffers())
        or not all(p.requires_grad for p in parameters.values())
        or type(module) is not kind_of(module)
    ):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) holds parameter {first!r}, and no way to "
            f"its per-sample gradients is known. {advice or _NO_ADVICE} No step was taken."
        )
    prepare_layer(module, batch_first=True)
    return SampledUnit(name, module, list(parameters.values()), ft_compute_per_sample_gradient)


_NO_ADVICE = (
    "Layers of torch.nn with a grad sampler in Opacus work, and so do modules of your own that map "
    "one tensor to one tensor, without buffers or frozen parameters, and not given to fully_shard."
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
    if kind_of(module) in _ADVICE or kind_of(module) is nn.MultiheadAttention:
        return  # looked at where its parameters are
    validator = ModuleValidator.VALIDATORS.get(kind_of(module))
    errors: list[Any] = validator(module) if validator else []
    trainable = any(p.requires_grad for p in module.parameters())
    if trainable and isinstance(module, nn.EmbeddingBag):
        raise UnsupportedModelError(
            f"layer {name!r} (EmbeddingBag) takes the tokens of all rows in one tensor, so tokens "
            "cannot be assigned to rows. Use nn.Embedding on (batch, time) and "
            ".sum(1) or .mean(1), with a mask for padding. No step was taken."
        )
    if errors and (trainable or isinstance(module, nn.modules.instancenorm._InstanceNorm)):
        raise UnsupportedModelError(
            f"layer {name!r} ({type(module).__name__}) cannot be trained privately: {errors[0]} "
            "No step was taken."
        )
