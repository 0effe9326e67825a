"""A clipping bound that follows the rows' norms, by a count that each step releases with noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import (
    AdaptiveClipping,
    ClippingRule,
    PerLayerClipping,
)
from lightning_secure.privacy.released.step_metrics import ClippedFraction, ReleasedMetric

#: Under which the count is published: it is released anyway.
COUNT: Final = "privacy/clipped_fraction"
#: Under which the bound is published, which follows from the counts before it.
BOUND: Final = "privacy/clip_bound"


def with_count(
    rule: ClippingRule, released: Mapping[str, ReleasedMetric]
) -> dict[str, ReleasedMetric]:
    """Return the metrics that each step releases, and the count among them if the bound follows it.

    So the count is summed up, noised and charged like any of them, jointly with the gradient of the
    same draw.

    Raises:
        ConfigError: if a metric has the count's name, or the count cannot be had with this way of
            clipping.
    """
    if isinstance(rule, PerLayerClipping) and any(
        isinstance(metric, ClippedFraction) for metric in released.values()
    ):
        raise ConfigError(
            "ClippedFraction counts rows whose whole gradient is clipped, and per-layer clipping "
            "clips each layer by itself. Use GradientNorm, or flat clipping."
        )
    if not isinstance(rule, AdaptiveClipping):
        return dict(released)
    if taken := {COUNT, BOUND} & set(released):
        raise ConfigError(
            f"adaptive clipping releases {sorted(taken)} itself. Name your metric otherwise."
        )
    return {**released, COUNT: ClippedFraction(noise_multiplier=rule.noise_multiplier)}


def clip_bound(config: DPConfig, ledger: Ledger) -> float:
    """Return the bound to which the rows of the next step are clipped."""
    if isinstance(config.clipping_rule, AdaptiveClipping) and ledger.clip_bound is not None:
        return ledger.clip_bound
    return config.max_grad_norm


def follow(config: DPConfig, ledger: Ledger, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the bound for the next step by what this one has released.

    Args:
        config: Says how.
        ledger: Holds the bound from now on.
        metrics: Of the step, with noise.

    Returns:
        What may be told of it: the bound that this step had.
    """
    rule = config.clipping_rule
    if not isinstance(rule, AdaptiveClipping):
        return {}
    bound, clipped = clip_bound(config, ledger), metrics[COUNT]
    ledger.clip_bound = rule.next_bound(bound, float(clipped), first=config.max_grad_norm)
    return {BOUND: clipped.new_tensor(bound)}
