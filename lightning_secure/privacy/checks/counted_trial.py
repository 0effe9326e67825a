"""Trial runs that find out over which targets a row's own mean runs."""

from __future__ import annotations

from typing import Any, Final

import torch

from lightning_secure.privacy.checks.batch_rows import recombined
from lightning_secure.privacy.checks.trial_run import Trial, row_differs, same_layers

_ROWS: Final = 5
_TOLERANCE: Final = 1e-3


def settle_counted_means(trial: Trial, batch: Any, size: int) -> None:
    """Decide how the engine's means of counted targets are taken.

    Each row has the mean over its own counted targets if the targets of each call lie row by row:
    while those of other rows are ignored, one row's gradient must not move. It moves where they lie
    in another order, as after a transposition, or where a call is about one row alone. Then the
    sum is divided by all targets.

    Args:
        trial: Runs the model.
        batch: A batch as it was collated.
        size: Rows of ``batch``.
    """
    means = trial.engine.means
    means.by_row, means.calls, means.settled = True, 0, False
    rows = recombined(batch, size, _ROWS, torch.Generator().manual_seed(0))
    run = trial.recorded(rows, rows=_ROWS)
    for kept in range(_ROWS if means.calls else 0):
        with means.ignoring_all_but(kept):
            changed = trial.recorded(rows, rows=_ROWS)
        if not same_layers(run, changed) or row_differs(run, changed, kept, tolerance=_TOLERANCE):
            means.by_row = False
        if not means.by_row:
            break
    means.settled = True
