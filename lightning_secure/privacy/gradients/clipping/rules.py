"""Clipping rules, as ``DPConfig(clipping=)`` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from lightning_secure.errors import ConfigError
from lightning_secure.util.validate import open_unit_interval, positive

#: How far the bound may move from where it began, either way. Nothing depends on it but that a
#: bound stays a number: without gradients it would shrink for ever.
RANGE: Final = 1e6


@dataclass(frozen=True)
class FlatClipping:
    """Each row's gradient is clipped in one piece, over all parameters."""


@dataclass(frozen=True, kw_only=True)
class PerLayerClipping:
    """Each row's gradient is clipped layer by layer, each layer to a bound of its own.

    Attributes:
        parts: How large the bounds are in proportion to each other, by the name of a layer, or of
            a module whose layers are clipped together; the longest name that fits holds. Every
            trainable layer must have one. By default each layer has a bound of its own, all alike.

    Layers that share a parameter are clipped together.

    Guarantees:
        The bounds' squares add up to that of ``max_grad_norm``, so one row changes the whole sum
        by ``max_grad_norm`` at most, and noise and account are those of flat clipping.

    Source:
        McMahan et al. 2018, arXiv:1710.06963, section 3.

    >>> from lightning_secure import DPConfig
    >>> rule = PerLayerClipping(parts={"encoder": 2.0, "head": 1.0})
    >>> DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, clipping=rule).clipping_rule
    PerLayerClipping(parts={'encoder': 2.0, 'head': 1.0})
    """

    parts: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.parts is None:
            return
        if not self.parts:
            raise ConfigError("PerLayerClipping(parts=) needs a number for at least one layer.")
        for name, part in self.parts.items():
            positive(**{f"the part of layer {name!r}": part})


@dataclass(frozen=True, kw_only=True)
class AdaptiveClipping:
    """The bound follows a quantile of the rows' gradient norms, which is released with noise.

    Attributes:
        quantile: The part of the rows that is not to be clipped.
        learning_rate: How fast the bound follows: with everything clipped or nothing, it changes
            by a factor of at most ``exp(learning_rate)`` a step, noise aside.
        noise_multiplier: Standard deviation of the noise in the count of rows that were clipped,
            in units of what one row can change in it. That is twice the ``sigma_b`` of the paper,
            because rows are counted from the middle, as a half or minus a half.

    The first bound is ``max_grad_norm``. Each step's count is of the same draw as its gradient,
    and both are charged together: with 10 for the count and 1 for the gradient, a step has 0.995.
    In the mean the count's noise moves the bound by
    ``learning_rate * noise_multiplier / (2 * expected_batch_size)``.

    Source:
        Andrew et al. 2021, arXiv:1905.03871, algorithm 1 and theorem 1.

    >>> from lightning_secure import DPConfig
    >>> rule = AdaptiveClipping(quantile=0.7)
    >>> DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, clipping=rule).clipping_rule
    AdaptiveClipping(quantile=0.7, learning_rate=0.2, noise_multiplier=10.0)
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    noise_multiplier: float = 10.0

    def __post_init__(self) -> None:
        open_unit_interval(quantile=self.quantile)
        positive(learning_rate=self.learning_rate, noise_multiplier=self.noise_multiplier)

    def next_bound(self, bound: float, clipped: float, *, first: float) -> float:
        """Return the bound of the next step.

        Args:
            bound: Of this step.
            clipped: The part of this step's rows that was clipped, with noise.
            first: Of the first step.

        >>> round(AdaptiveClipping(learning_rate=1.0).next_bound(1.0, 0.75, first=1.0), 4)
        1.284
        >>> AdaptiveClipping().next_bound(2.0, 0.5, first=1.0)
        2.0
        """
        change = self.learning_rate * (self.quantile - (1 - clipped))
        if not math.isfinite(change):
            return bound
        moved = bound * math.exp(min(max(change, -math.log(RANGE)), math.log(RANGE)))
        return min(max(moved, first / RANGE), first * RANGE)


ClippingRule = FlatClipping | PerLayerClipping | AdaptiveClipping

_NAMED: Final[Mapping[str, type[ClippingRule]]] = {
    "flat": FlatClipping,
    "per_layer": PerLayerClipping,
    "adaptive": AdaptiveClipping,
}


def rule_of(clipping: object) -> ClippingRule:
    """Return what a name stands for, or the rule itself.

    Raises:
        ConfigError: if the argument is neither a known name nor a rule.

    >>> rule_of("adaptive").quantile
    0.5
    """
    if isinstance(clipping, FlatClipping | PerLayerClipping | AdaptiveClipping):
        return clipping
    if isinstance(clipping, str) and clipping in _NAMED:
        return _NAMED[clipping]()
    raise ConfigError(
        f"clipping must be one of {', '.join(map(repr, _NAMED))}, PerLayerClipping(...) or "
        f"AdaptiveClipping(...), not {clipping!r}."
    )
