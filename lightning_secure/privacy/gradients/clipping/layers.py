"""Groups of layers that are clipped together, and each row's clip factor there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.gradients.formulas import clip_factor
from lightning_secure.privacy.gradients.rules.layer_rule import Unit


@dataclass(frozen=True, eq=False)
class LayerGroups:
    """Layers that are clipped together.

    Attributes:
        names: Of the groups: of the first layer in it, or of the module that it was given as.
        shares: Of each group, its bound over that of the whole. Their squares add up to one.
        group_of: The group of each parameter.
    """

    names: tuple[str, ...]
    shares: tuple[float, ...]
    group_of: Mapping[nn.Parameter, int]

    def factors(
        self, squares: Sequence[tuple[nn.Parameter, Tensor]], *, max_grad_norm: float
    ) -> dict[nn.Parameter, Tensor]:
        """Return what each row's gradient is multiplied with, by parameter.

        Args:
            squares: Squared norms of the rows' gradients, shape ``(batch,)``, each with one of the
                parameters that they are about. Norms of several parameters of a layer are one.
            max_grad_norm: The bound of the whole.

        Guarantees:
            For every row with finite norms, the squares of what is left of its gradient add up to
            ``max_grad_norm**2`` at most, up to rounding.
        """
        found: dict[int, list[Tensor]] = {}
        for parameter, square in squares:
            found.setdefault(self.group_of[parameter], []).append(square)
        factors = {
            group: clip_factor(
                torch.stack(parts).sum(0).sqrt(), max_grad_norm=self.shares[group] * max_grad_norm
            )
            for group, parts in found.items()
        }
        return {p: factors[group] for p, group in self.group_of.items() if group in factors}


def layer_groups(units: Sequence[Unit], parts: Mapping[str, float] | None) -> LayerGroups:
    """Divide a model's layers into groups.

    Args:
        units: The trainable layers.
        parts: As in :class:`~lightning_secure.privacy.gradients.clipping.rules.PerLayerClipping`.

    Raises:
        UnsupportedModelError: if a layer has no part, a part no layer, or layers with different
            parts share a parameter.
    """
    names = [_name_of(unit, parts) for unit in units]
    if unused := sorted(set(parts or ()) - set(names)):
        raise UnsupportedModelError(
            f"PerLayerClipping has a part for {unused[0]!r}, and no trainable layer of the model "
            f"takes it. The layers are {', '.join(repr(unit.name) for unit in units)}. No step was "
            "taken."
        )
    group_of: dict[nn.Parameter, str] = {}
    same: dict[str, str] = {name: name for name in names}  # of each name, one it belongs with
    for unit, name in zip(units, names, strict=True):
        for parameter in unit.parameters:
            one, other = _root(same, group_of.setdefault(parameter, name)), _root(same, name)
            if one != other and parts is not None:
                raise UnsupportedModelError(
                    f"layers under {one!r} and {other!r} share a parameter, whose gradient is the "
                    "sum over both, so they cannot be clipped apart. Give a module that holds both "
                    "one part. No step was taken."
                )
            same[other] = one
    groups = list(dict.fromkeys(_root(same, name) for name in names))
    weights = [1.0 if parts is None else parts[name] for name in groups]
    whole = math.hypot(*weights)
    number = {name: index for index, name in enumerate(groups)}
    return LayerGroups(
        names=tuple(groups),
        shares=tuple(weight / whole for weight in weights),
        group_of={p: number[_root(same, name)] for p, name in group_of.items()},
    )


def _name_of(unit: Unit, parts: Mapping[str, float] | None) -> str:
    """Return the name under which a layer is clipped."""
    if parts is None:
        return unit.name
    fitting = [name for name in parts if name == unit.name or unit.name.startswith(f"{name}.")]
    if not fitting:
        raise UnsupportedModelError(
            f"PerLayerClipping has no part for layer {unit.name!r}, which is trainable: its "
            "gradients would have no bound. No step was taken."
        )
    return max(fitting, key=len)


def _root(same: Mapping[str, str], name: str) -> str:
    while same[name] != name:
        name = same[name]
    return name
