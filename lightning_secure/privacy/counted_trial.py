"""Trial runs that find out over which targets a row's own mean runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_secure.privacy.engine import GradientEngine
from lightning_secure.privacy.exact import exact_arithmetic
from lightning_secure.privacy.leftovers import Stateful, preserved
from lightning_secure.privacy.rows import leaves, recombined
from lightning_secure.privacy.trial import Trial, row_differs, same_layers

__all__ = ["settle_counted_means"]

_ROWS: Final = 5
_TOLERANCE: Final = 1e-3


def settle_counted_means(
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    *,
    size: int,
    backward: Callable[[Tensor], Any],
    stateful: Iterable[Stateful] = (),
) -> None:
    """Decide how the engine's means of counted targets are taken, once.

    Each row has the mean over its own counted targets if the targets of each call lie row by row:
    while those of other rows are ignored, one row's gradient must not move. It moves where they lie
    in another order, as after a transposition, or where a call is about one row alone. Then the
    sum is divided by all targets.

    Args:
        engine: Attached to ``model``.
        model: Is left as it was.
        loss_of: Runs all that happens to a batch, and returns the scalar loss.
        batch: A batch as it was collated.
        size: Rows of ``batch``.
        backward: Goes backward from a loss in the way that the step itself will.
        stateful: Optimizers and schedulers, which are left as they were too.
    """
    means = engine.means
    if means.settled or not leaves(batch, size):
        return
    trial = Trial(engine, model, loss_of, backward)
    means.by_row, means.calls = True, 0
    with preserved(model, stateful), exact_arithmetic():
        rows = recombined(batch, size, _ROWS, torch.Generator().manual_seed(0))
        run = trial.recorded(rows, rows=_ROWS)
        for kept in range(_ROWS if means.calls else 0):
            with means.ignoring_all_but(kept):
                changed = trial.recorded(rows, rows=_ROWS)
            if not same_layers(run, changed) or row_differs(
                run, changed, kept, tolerance=_TOLERANCE
            ):
                means.by_row = False
            if not means.by_row:
                break
    means.settled = True
