"""Metrics that a training step updates, and that something else may show."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_secure.privacy.checks.snapshot import remembered_attributes

#: Which members of a collection compute from one state, and whether that was found out.
_GROUPING: Final = ("_groups", "_groups_checked", "_state_is_copy")


@contextlib.contextmanager
def metrics_kept_apart(model: nn.Module) -> Iterator[None]:
    """Make every metric of a model forget what it is told in the block.

    Args:
        model: Its metrics are those among its modules.

    A metric that takes up training rows and is logged in validation would carry them out, without
    noise, under a name that is not withheld. Within the block it works as ever.

    Guarantees:
        Each metric's state is afterwards what it was, also if the block fails; and so are, of its
        other attributes, numbers, texts, tensors, arrays and collections of them, for not every
        metric has declared all that it keeps: ``MinMaxMetric`` has not.
    """
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    collections = [module for module in model.modules() if isinstance(module, MetricCollection)]
    if not metrics:
        yield
        return
    memo: dict[int, Any] = {}
    states = [{name: _copied(vars(m)[name], memo) for name in _names(m)} for m in metrics]
    groups = [{name: copy.deepcopy(vars(c)[name]) for name in _GROUPING} for c in collections]
    restores = [remembered_attributes([m], apart_from=_BARE.union(_names(m))) for m in metrics]
    try:
        yield
    finally:
        for restore in restores:
            restore()
        for module, state in zip([*metrics, *collections], [*states, *groups], strict=True):
            vars(module).update(state)


class _Bare(Metric):
    """Has only what every metric has."""

    def update(self) -> None:
        """Take nothing."""

    def compute(self) -> None:
        """Return nothing."""


_BARE: Final = frozenset(vars(_Bare()))


def _names(metric: Metric) -> list[str]:
    """Return the attributes in which a metric keeps what it has seen."""
    own = ("_update_count", "_computed", "_forward_cache", "_cache", "_is_synced", "_released")
    return [*metric._defaults, *(name for name in own if name in vars(metric))]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a state; one that metrics share is shared again."""
    if not isinstance(value, Tensor | list | dict):
        return value
    if id(value) not in memo:
        memo[id(value)] = value.detach().clone() if isinstance(value, Tensor) else value.copy()
    return memo[id(value)]
