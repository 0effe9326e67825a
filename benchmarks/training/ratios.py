"""The ratios of times, peaks and gradients."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["OPACUS", "Cell", "Gradients", "UnequalWorkError", "per_row", "ratios", "shorter_by"]

OPACUS = ("opacus_hooks", "opacus_functorch", "opacus_ghost")
_TOLERANCE = 1e-4
_MOST_SHORTER = 0.1


class UnequalWorkError(Exception):
    """A gradient is not what it should be, so times cannot be compared."""


class Gradients(NamedTuple):
    """Mean gradients of one batch without noise, flat.

    Attributes:
        sum: With a clipping norm that no row reaches.
        clipped: With the real one.
    """

    sum: npt.NDArray[np.float32]
    clipped: npt.NDArray[np.float32]


@dataclass
class Cell:
    """The measurements of one system, model and batch size.

    Attributes:
        first_step_seconds: From when all is set up until the first step is over.
        steps_in_a_round: That are counted.
        seconds_per_row: Of each round, the median over its steps.
        peak_mb: The most memory that any step took, the first one included.
        peak_mb_later: The most that a step after the first took.
        clips_harder_by: So much shorter is its clipped gradient than that of Opacus' hooks.
        failed: Why there is nothing, or not all of it.
    """

    first_step_seconds: float | None = None
    steps_in_a_round: int | None = None
    seconds_per_row: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    peak_mb_later: float | None = None
    clips_harder_by: float | None = None
    failed: str | None = None


def per_row(steps: Sequence[tuple[float, int]]) -> float:
    """Return the median over steps of seconds per row.

    Args:
        steps: Seconds and rows of each; one that drew no row is left out.
    """
    return statistics.median(seconds / rows for seconds, rows in steps if rows)


def shorter_by(one: Gradients, reference: Gradients) -> float:
    """Return by how much a clipped gradient is shorter than another, if the work is the same.

    Raises:
        UnequalWorkError: if the sum is not the reference's to 1e-4 of its norm; the clipped
            gradient is longer by more than that, or shorter by more than a tenth; or, brought to
            the same length, it differs by more than it is shorter.
    """
    if (off := _apart(one.sum, reference.sum)) > _TOLERANCE:
        raise UnequalWorkError(f"without clipping it is off by {off:.2g} of its norm")
    shorter = 1 - _norm(one.clipped) / _norm(reference.clipped)
    if not -_TOLERANCE <= shorter <= _MOST_SHORTER:
        raise UnequalWorkError(f"clipped, it is shorter by {shorter:.2g} of its norm")
    # Rows that are clipped harder by up to twice as much as on average turn it by no more than so.
    off = _apart(one.clipped / np.float32(1 - shorter), reference.clipped)
    if off > max(_TOLERANCE, shorter):
        raise UnequalWorkError(f"clipped, it points elsewhere by {off:.2g} of its norm")
    return shorter


def _apart(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    if one.shape != other.shape:
        return float("inf")
    found = _norm(one - other) / _norm(other)
    return found if np.isfinite(found) else float("inf")


def _norm(vector: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))


def ratios(cells: Mapping[str, Mapping[int, Mapping[str, Cell]]]) -> dict[str, float]:
    """Return ours over theirs, by name: below 1 we need less.

    Args:
        cells: By model, batch size and system.

    Each is taken within a round, and its median over the rounds returned. ``..._MODEL`` is that of
    the smallest batch, which is the hardest: what does not grow with the batch, such as the noise,
    weighs most there. ``..._MODEL_bN`` is that of batches of N. Those of systems that failed are
    left out, and ``opacus_best`` is the best that is left, in each round.
    """
    found: dict[str, float] = {}
    for model, batches in cells.items():
        for batch, systems in batches.items():
            for name, value in _of(systems).items():
                found[f"{name}_{model}_b{batch}"] = value
                if batch == min(batches):
                    found[f"{name}_{model}"] = value
    return dict(sorted(found.items()))


def _of(systems: Mapping[str, Cell]) -> dict[str, float]:
    found: dict[str, float] = {}
    whole = {name: cell for name, cell in systems.items() if cell.failed is None}
    ours = whole.pop("ours", None)
    if ours is None or not ours.seconds_per_row:
        return found
    if ours.clips_harder_by is not None:
        found["clips_harder_by"] = ours.clips_harder_by
    opacus = [cell for name, cell in whole.items() if name in OPACUS]
    for name, cell in whole.items():
        _add(found, name, ours, [cell])
        if name in OPACUS and "plain" in whole:
            # What they cost, for comparison with what we do.
            found[f"step_{name}_vs_plain"] = _median(
                cell.seconds_per_row, whole["plain"].seconds_per_row
            )
    if opacus:
        _add(found, "opacus_best", ours, opacus)
    return found


def _add(found: dict[str, float], name: str, ours: Cell, theirs: Sequence[Cell]) -> None:
    best = [min(several) for several in zip(*(c.seconds_per_row for c in theirs), strict=True)]
    found[f"step_vs_{name}"] = _median(ours.seconds_per_row, best)
    peaks: dict[str, Any] = {"memory": "peak_mb", "memory_later": "peak_mb_later"}
    for what, field_name in peaks.items():
        found[f"{what}_vs_{name}"] = getattr(ours, field_name) / min(
            getattr(cell, field_name) for cell in theirs
        )


def _median(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
