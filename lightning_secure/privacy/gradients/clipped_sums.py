"""Norms and clipped sums of what was recorded of a chunk.

Where operands are bfloat16, a row's weighted gradient must be so too, or its product would leave
the fast unit of a GPU. Rounded, it is another gradient, maybe a longer one: so its own norm is
taken, of what will be added, and a row that came out too long is halved until it is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from lightning_secure.privacy.gradients.clipping.layers import LayerGroups
from lightning_secure.privacy.gradients.float32 import exact_products
from lightning_secure.privacy.gradients.formulas import Grams, clip_factor, grams_together
from lightning_secure.privacy.gradients.products import on_device
from lightning_secure.privacy.gradients.rules.layer_rule import (
    TOGETHER_BYTES,
    Gradients,
    Record,
    accumulate,
    norm_squared,
)
from lightning_secure.privacy.gradients.rules.tied import TiedPair, tied_pairs

#: Where weighted gradients are rounded, the share of the clipping norm that they are given.
_MARGIN: Final = 1 - 2.0**-8
#: Numbers of a layer's gradient, up to which it is small.
_SMALL: Final = 2**14

Factors = Mapping[nn.Parameter, Tensor]


class Formed(NamedTuple):
    """Gradients by sample, of one parameter or of small ones that lie together.

    Attributes:
        parameters: The parameters; at least one.
        grads: Their gradients, flat, one after another, shape ``(batch, numbers)``.
    """

    parameters: tuple[nn.Parameter, ...]
    grads: Tensor

    @property
    def rounds(self) -> bool:
        """Whether weighted gradients must be rounded: they need not."""
        return False

    def squares(self) -> Tensor:
        """Return each sample's squared norm, shape ``(batch,)``."""
        return norm_squared(self.grads)

    def rows(self, keep: Tensor) -> Formed:
        """Return the gradients of those samples for which ``keep`` is true."""
        return Formed(self.parameters, self.grads[keep])

    def weighted_sum(self, weights: Tensor) -> Gradients:
        """Return the sums of the samples' gradients times their weights."""
        total = weights.to(self.grads.dtype) @ self.grads
        pieces = torch.split(total, [parameter.numel() for parameter in self.parameters])
        return {p: piece.view(p.shape) for p, piece in zip(self.parameters, pieces, strict=True)}


#: The gradients of some parameters, which no other part has.
Part = Record | TiedPair | Formed


@exact_products()
def per_sample_norms(records: Sequence[Record]) -> Tensor:
    """Return each sample's gradient norm over all parameters, shape ``(batch,)``.

    A layer that was called several times, or a parameter that several layers share, has the
    gradient that is the sum of its uses, whose norm is not the sum of theirs: such uses are made
    one, or their inner product is taken, or their gradients are formed and added, before the norm.
    """
    return _norms([part.squares() for part in _parts(records)])


@exact_products()
def add_clipped_sums(
    sums: dict[nn.Parameter, Tensor],
    records: Sequence[Record],
    *,
    max_grad_norm: float,
    layers: LayerGroups | None = None,
) -> Tensor:
    """Clip each sample's gradient and add the sum over samples to ``sums``.

    Args:
        sums: Running sums by parameter, float32; missing ones are begun.
        records: Records of one chunk.
        max_grad_norm: Clipping bound.
        layers: Which layers are clipped together, to their shares of it; by default all.

    Returns:
        The norms before clipping, shape ``(batch,)``. They are not private.
    """
    parts = _parts(records)
    if layers is None:
        parts = _joined(parts)
    _take_norms(parts)
    squares = [part.squares() for part in parts]
    norms = _norms(squares)
    # Whichever way they go, so that the length of a padded row has no say in it.
    short = any(record.short for record in records)
    bound = max_grad_norm * _MARGIN if short else max_grad_norm
    factors = _factors(parts, squares, layers, max_grad_norm=bound)
    finite = torch.isfinite(norms)
    if not bool(finite.all()):
        # A factor of zero times infinity is NaN: the rows themselves must go.
        if not bool(finite.any()):
            return norms
        parts = [part.rows(finite) for part in parts]
        squares = [square[finite] for square in squares]
        factors = {parameter: weights[finite] for parameter, weights in factors.items()}
    if any(part.rounds for part in parts):
        parts, factors = _rounded(parts, squares, factors, layers, max_grad_norm=max_grad_norm)
    for part in parts:
        for parameter, total in part.weighted_sum(factors[part.parameters[0]]).items():
            accumulate(sums, parameter, total)
    return norms


def _factors(
    parts: Sequence[Part],
    squares: Sequence[Tensor],
    layers: LayerGroups | None,
    *,
    max_grad_norm: float,
) -> Factors:
    """Return what each row's gradient is multiplied with, by a part's first parameter."""
    first = [part.parameters[0] for part in parts]
    if layers is None:
        return dict.fromkeys(first, clip_factor(_norms(squares), max_grad_norm=max_grad_norm))
    pairs = list(zip(first, squares, strict=True))
    return layers.factors(pairs, max_grad_norm=max_grad_norm)


def _rounded(
    parts: Sequence[Part],
    squares: Sequence[Tensor],
    factors: Factors,
    layers: LayerGroups | None,
    *,
    max_grad_norm: float,
) -> tuple[list[Part], Factors]:
    """Weigh and round the gradients that must be; shorten the rows that came out too long.

    Rows are halved, once or more often: a half of a rounded gradient is exact.

    Returns:
        The parts, and by what each row's gradients in them are still to be multiplied.
    """
    weights = [factors[part.parameters[0]] for part in parts]
    done = [
        part if isinstance(part, Formed) or not part.rounds else part.weighted(weight)
        for part, weight in zip(parts, weights, strict=True)
    ]
    _take_norms(done)
    left = [
        new.squares() if new is not old else square * weight.square()
        for new, old, square, weight in zip(done, parts, squares, weights, strict=True)
    ]
    shorten = _factors(parts, left, layers, max_grad_norm=max_grad_norm)
    different = {id(factor): factor for factor in shorten.values()}  # one, if clipped in one piece
    halves = {key: _power_of_two(factor) for key, factor in different.items()}
    both: dict[tuple[int, int], Tensor] = {}
    remaining = {}
    for new, old, weight in zip(done, parts, weights, strict=True):
        first = old.parameters[0]
        half = halves[id(shorten[first])]
        if new is old and (id(half), id(weight)) not in both:
            both[id(half), id(weight)] = half * weight
        remaining[first] = both[id(half), id(weight)] if new is old else half
    return done, remaining


def _power_of_two(factors: Tensor) -> Tensor:
    """Return the largest power of two that is no larger; 0 for 0."""
    _, exponents = torch.frexp(factors)  # of a mantissa from 0.5 to 1
    return torch.where(factors > 0, torch.ldexp(torch.ones_like(factors), exponents - 1), 0.0)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Lay small gradients that are kept on a GPU together, so that few launches see to all."""
    small = [part for part in parts if isinstance(part, Record) and _is_small(part)]
    if len(small) < 2:
        return list(parts)
    others = [part for part in parts if part not in small]
    found: dict[nn.Parameter, Tensor] = {}
    for record in small:
        found |= record.per_sample()
    flat = torch.cat([grads.flatten(1) for grads in found.values()], 1)
    return [*others, Formed(tuple(found), flat)]


def _is_small(record: Record) -> bool:
    parameters = record.parameters
    if not on_device(parameters[0]) or sum(p.numel() for p in parameters) > _SMALL:
        return False
    return record.formed() is not None


def _take_norms(parts: Sequence[Part]) -> None:
    """Take the norms on a GPU that come by Gram matrices of one shape together."""
    waiting: dict[object, list[tuple[Record, Grams]]] = {}
    records = (
        record
        for part in parts
        for record in (part if isinstance(part, TiedPair) else (part,))
        if isinstance(record, Record)
    )
    for record in records:
        grams = record.grams()
        if grams is None:
            continue
        group = waiting.setdefault((grams.inputs.shape, grams.dtype, len(grams.grads)), [])
        group.append((record, grams))
        if len(group) * grams.inputs[:1].nbytes > TOGETHER_BYTES:
            _finish(group)
            group.clear()
    for group in waiting.values():
        _finish(group)


def _finish(group: Sequence[tuple[Record, Grams]]) -> None:
    if group:
        found = grams_together([grams for _, grams in group])
        for (record, _), squares in zip(group, found, strict=True):
            record.measured(squares)


def _norms(squares: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(squares)).sum(0).sqrt()


def _parts(records: Sequence[Record]) -> list[Part]:
    simple, shared = separated(records)
    pairs, shared = tied_pairs(shared)
    added = _added(shared)
    return [*simple, *pairs, *(Formed((p,), grads.flatten(1)) for p, grads in added.items())]


def separated(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Separate records that are the only use of their parameters from the others.

    Several uses of the same parameters by layers of one kind become one use where the unit can lay
    them one after another.
    """
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        kind = (type(record.unit), *map(id, record.unit.parameters))
        groups.setdefault(kind, []).append(record)
    merged: list[Record] = []
    for group in groups.values():
        first = group[0]
        # Computed again by a checkpoint, an earlier use seemed the only one, and was reduced.
        alike = len(group) > 1 and all(record.inputs is not None for record in group)
        pair = first.unit.joined(group) if alike else None
        merged += group if pair is None else [Record(first.unit, *pair, scale=first.scale)]
    uses = Counter(id(p) for record in merged for p in record.unit.parameters)
    simple: list[Record] = []
    shared: list[Record] = []
    for record in merged:
        alone = all(uses[id(p)] == 1 for p in record.unit.parameters)
        (simple if alone else shared).append(record)
    return simple, shared


def _added(records: Sequence[Record]) -> dict[nn.Parameter, Tensor]:
    totals: dict[nn.Parameter, Tensor] = {}
    for record in records:
        for parameter, grads in record.per_sample().items():  # which may be the record's own
            totals[parameter] = totals[parameter] + grads if parameter in totals else grads
    return totals
