"""Two passes in which one row is the same: that row's gradient must be the same too."""

from __future__ import annotations

from typing import Final

import torch

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.loss_graph import ISOLATE
from lightning_secure.privacy.checks.trial_run import (
    NO_STEP,
    Run,
    differing,
    require_same_layers,
    same_layers,
    whole_difference,
)
from lightning_secure.privacy.gradients.rules.layer_rule import Record

_TOLERANCE: Final = 1e-3
_PADDED: Final = 0.05  # of a gradient whose row has another length


def require_unmoved(run: Run, changed: Run, kept: int, *, outcome: str = NO_STEP) -> None:
    """Make sure that a row's gradient does not follow the others.

    Args:
        run: A pass.
        changed: Another one, of which all rows but one are others.
        kept: That one.
        outcome: What a refusal says of the step.

    Raises:
        UnsupportedModelError: if the row's gradient follows the others, or the passes go through
            other layers.
    """
    require_same_layers(run, changed)
    layer = differing(run, changed, kept, tolerance=_TOLERANCE)
    if layer is None:
        return
    # Backward order: the last record whose input moved is the first such layer going forward.
    mixed = [
        before.unit.name
        for before, after in zip(run.records, changed.records, strict=True)
        if not _alike(before, after, kept)
    ]
    where = (
        f"rows are mixed in the forward pass, before layer {mixed[-1]!r} (batch statistics, or "
        "attention or pooling across the batch)"
        if mixed
        else f"rows are mixed in the loss, after layer {layer!r} ({_cause(run, changed)}), or in a "
        "backward() of the module's own"
    )
    raise _mixed(where, outcome)


def require_unmoved_by_strangers(run: Run, changed: Run, kept: int, *, outcome: str) -> None:
    """Make sure of the same where the other rows may have another length, so that layers differ.

    Raises:
        UnsupportedModelError: if the kept row's gradient does follow the others.
    """
    if same_layers(run, changed):
        if not (run.drew and _shapes(run) != _shapes(changed)):
            require_unmoved(run, changed, kept, outcome=outcome)
    elif not run.drew and whole_difference(run, changed, kept) > _PADDED:
        raise _mixed(
            "the model runs through other layers when other rows are in the batch", outcome
        )


def _mixed(where: str, outcome: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"one row's gradient changes when another row does, so clipping bounds nothing: {where}. "
        f"Let each row's loss depend on that row alone, and return the mean. {ISOLATE} {outcome}"
    )


def _cause(run: Run, changed: Run) -> str:
    fault = run.fault or changed.fault
    if fault is not None:
        return f"{fault} comes after the mean over the rows"
    return "a contrastive term, or a divisor or factor that the other rows decide"


def _shapes(run: Run) -> list[object]:
    return [record.shapes for record in run.records]


def _alike(before: Record, after: Record, row: int) -> bool:
    one, other = before.evidence()[0][row].float(), after.evidence()[0][row].float()
    return one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-6)
