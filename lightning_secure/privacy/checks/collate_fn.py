"""A check, before the first step, that rows are not mixed before the preflight sees them.

:mod:`~lightning_secure.privacy.checks.preflight` recombines rows of a batch that the collate
function has made. So real rows are collated with others, and one row's gradient must not depend on
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import Tensor, nn

from lightning_secure.errors import UnsupportedModelError
from lightning_secure.privacy.checks.batch_rows import leaves
from lightning_secure.privacy.checks.loss_graph import ISOLATE
from lightning_secure.privacy.checks.snapshot import preserved
from lightning_secure.privacy.checks.trial_run import (
    NO_STEP,
    Seed,
    Trial,
    random_states,
    require_same_layers,
    row_differs,
    seed_all,
    whole_difference,
    without_dropout,
)
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.float32 import exact_arithmetic

_ROWS: Final = 5
_TOLERANCE: Final = 1e-3
_GROSS: Final = 0.05
#: A prime, so that the rows come from all over the dataset: it may be sorted by length.
_APART: Final = 1_000_003


def require_rows_kept_apart(
    trial_batch: Callable[..., Any],
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    *,
    backward: Callable[[Tensor], Any],
    seed: int | None = None,
) -> None:
    """Check a collate function, and what comes after it where rows are padded by others' length.

    Args:
        trial_batch: From row numbers to the batch that the collate function makes; None if there
            is nothing to check. It is given what is to be called between fetching and collating.
        engine: Attached to ``model``.
        model: Is left as it was.
        loss_of: Runs all that happens to a batch, and returns the scalar loss.
        backward: Goes backward from a loss in the way that the step itself will.
        seed: Makes the trial runs repeatable, for tests.

    Raises:
        UnsupportedModelError: if one row's gradient depends on which rows it was collated with.

    Where rows are padded, each is also collated with copies of itself, and so to its own length.
    That is compared with dropout off, whose masks would be others; where dataset, collate function
    or step draw other random numbers, it is not.
    """
    if trial_batch(range(_ROWS)) is None:
        return
    trial, seeds = Trial(engine, model, loss_of, backward), Seeds(seed)
    collate = _Collated(trial_batch)
    differences: list[float] = []
    with preserved(model), exact_arithmetic():
        for kept in range(_ROWS):
            number = seeds.number()
            batch = collate(range(_ROWS), number)
            if not leaves(batch, _ROWS):
                return
            alone = collate([kept] * _ROWS, number)
            if _shapes(alone) != _shapes(batch) and not (collate.drew or collate.fetching_drew):
                differences += _when_padded(trial, batch, alone, kept)
            _require_kept_apart(trial, collate, kept, number)
        if collate.drew:
            for place, coin in enumerate(seeds.coins(_ROWS)):
                _require_kept_apart(trial, collate, place % _ROWS, coin)
    if differences:
        _require_alike(differences, engine.parameters)


class _Collated:
    """Collates trial rows, and sees whether random numbers were drawn.

    Args:
        trial_batch: As above.

    Attributes:
        drew: Whether the collate function has drawn any.
        fetching_drew: Whether what fetches rows has.
        after: The random states after the last call.
    """

    def __init__(self, trial_batch: Callable[..., Any]) -> None:
        self._trial_batch = trial_batch
        self.drew = self.fetching_drew = False
        self.after: Any = None

    def __call__(self, places: Sequence[int], seed: Seed) -> Any:
        states: Any = None

        def begin() -> None:
            nonlocal states
            if states is not None:
                self.fetching_drew = self.fetching_drew or random_states() != states
            seed_all(seed)  # of which the function may draw whether it mixes
            states = random_states()

        begin()
        batch = self._trial_batch([_APART * place for place in places], begin)
        self.after = random_states()
        self.drew = self.drew or self.after != states
        return batch


def _require_kept_apart(trial: Trial, collate: _Collated, kept: int, seed: Seed) -> None:
    others = [place if place == kept else place + _ROWS for place in range(_ROWS)]
    batch = collate(range(_ROWS), seed)
    after = collate.after
    other = collate(others, seed)
    # Where other rows take more random numbers, the kept one has others, and nothing is shown.
    if _shapes(other) != _shapes(batch) or collate.after != after:
        return
    run = trial.recorded(batch, rows=_ROWS, seed=seed)
    changed = trial.recorded(other, rows=_ROWS, seed=seed)
    require_same_layers(run, changed)
    if row_differs(run, changed, kept, tolerance=_TOLERANCE):
        raise UnsupportedModelError(
            "one row's gradient changes when it is collated with other rows, so clipping "
            "bounds nothing. Rows are mixed by the collate function (as MixUp and CutMix do), or "
            "by what runs after it, a transfer hook or the training step. Let each row depend on "
            f"itself only. {ISOLATE} {NO_STEP}"
        )


def _require_alike(differences: Sequence[float], parameters: Sequence[nn.Parameter]) -> None:
    """Refuse one difference that is large, or one in every comparison.

    Rounding may put an activation on the other side of a ReLU's kink, but not each time.
    """
    exact = all(parameter.dtype.itemsize >= 4 for parameter in parameters)
    small, large = (_TOLERANCE, _GROSS) if exact else (_GROSS, 5 * _GROSS)
    if max(differences) > large or min(differences) > small:
        raise UnsupportedModelError(
            "one row's gradient changes with its padding, which follows the longest row of the "
            "batch, so clipping bounds nothing. Mask the padding in attention, means and losses, "
            "or pad all rows to one public length. "
            f"{ISOLATE} {NO_STEP}"
        )


def _when_padded(trial: Trial, batch: Any, other: Any, kept: int) -> list[float]:
    """Return by how much a row's gradient changes with its padding, if that can be told."""
    with without_dropout(trial.model):
        run, changed = (trial.recorded(item, rows=_ROWS) for item in (batch, other))
    return [] if run.drew or changed.drew else [whole_difference(run, changed, kept)]


def _shapes(batch: Any) -> list[Any]:
    return [value.shape if isinstance(value, Tensor) else None for value in leaves(batch, _ROWS)]
