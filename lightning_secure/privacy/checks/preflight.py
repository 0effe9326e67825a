"""Checks, before the first step, that per-sample gradients mean what clipping takes them for.

Clipping bounds what one row can do only if its gradient depends on that row alone. A contrastive
loss, batch statistics or a normaliser that counts the other rows breaks that silently. So the
model runs some times on five rows recombined from the first batch: all but one are changed, and
that one's gradient must not move; the recorded gradients must add up to what autograd computes;
the loss must be a mean, so that a row's gradient is the same in a batch of one, two or five; and
nothing that a checkpoint holds may change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_secure.errors import LightningSecureError, UnsupportedModelError
from lightning_secure.privacy.checks.batch_rows import first_rows, leaves, recombined, with_row
from lightning_secure.privacy.checks.checkpoint_state import held, require_unchanged
from lightning_secure.privacy.checks.clocks import Snapshot
from lightning_secure.privacy.checks.counted_trial import settle_counted_means
from lightning_secure.privacy.checks.loss_graph import ISOLATE, require_linear
from lightning_secure.privacy.checks.mixed_rows import require_unmoved
from lightning_secure.privacy.checks.snapshot import Kept, Stateful, copied, preserved, uncopied
from lightning_secure.privacy.checks.stranger_rows import require_strangers_apart
from lightning_secure.privacy.checks.trial_run import (
    NO_STEP,
    Run,
    Trial,
    differing,
    require_same_layers,
    row_differs,
    same_layers,
    without_dropout,
)
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.gradients.float32 import exact_arithmetic
from lightning_secure.privacy.gradients.products import widened

_ROWS: Final = 5
_SIZES: Final = (1, 2)
_ROUNDS: Final = 3
_TOLERANCE: Final = 1e-3
_COARSE: Final = 0.05  # of types with less than four bytes
_KINKS: Final = 4
_DRAWS: Final = 8
#: Norms of parameters at which a model that fits its rows is looked at. Small ones leave the flat
#: part of a loss, and large ones let the gradients of deep layers be seen.
_SHRUNK: Final = (1.0, 0.25, 0.0625)


def preflight(
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    *,
    size: int,
    backward: Callable[[Tensor], Any],
    checkpoint: Callable[[], Mapping[str, Any]] = dict,
    stateful: Iterable[Stateful] = (),
    first: Callable[[], None] = lambda: None,
    isolated: bool = False,
    seed: int | None = None,
) -> None:
    """Check one model and loss.

    Args:
        engine: Attached to ``model``.
        model: Its parameters, buffers, metrics, and those attributes that
            :func:`~lightning_secure.privacy.checks.snapshot.preserved` names, are as before when
            this returns, and so is the global random state.
        loss_of: Runs all that happens to a batch, the transfer hooks and the training step, and
            returns the scalar loss.
        batch: A batch as it was collated; rows for the trial runs are recombined from it.
        size: Rows of ``batch``.
        backward: Goes backward from a loss in the way that the step itself will.
        checkpoint: Returns what a checkpoint would hold if it were written now.
        stateful: Optimizers and schedulers; they too are as before when this returns.
        first: Runs other trials, which come before these.
        isolated: Whether each row will run by itself, so that none can meet another.
        seed: Makes the trial runs repeatable, for tests.

    Raises:
        UnsupportedModelError: if one row's gradient depends on another row or on their number, a
            gradient goes past its layer, or a state that checkpoints hold changes with the training
            step. The message names the layer, parameter or state at fault.
    """
    if not leaves(batch, size):
        raise UnsupportedModelError(
            f"a batch is a {type(batch).__name__}, in which no rows are found. Let the collate "
            f"function return tensors, or tuples, lists and dicts of them. {NO_STEP}"
        )
    trial, seeds = Trial(engine, model, loss_of, backward), Seeds(seed)
    with preserved(model, stateful) as kept, exact_arithmetic():
        hold = partial(held, model, checkpoint, outcome=NO_STEP)
        before = Snapshot.of(hold, lambda content: copied(content, kept.of))
        if isolated:  # each row's mean is over its own targets anyhow
            engine.means.by_row = engine.means.settled = True
        else:
            settle_counted_means(trial, batch, size)
        first()
        _require_autograd_agrees(trial, batch, size, rows=1 if isolated else _ROWS)
        if not isolated:
            _require_apart(trial, batch, size, seeds, kept)
        require_unchanged(before, lambda: Snapshot.of(hold, uncopied), outcome=NO_STEP)


def _require_apart(trial: Trial, batch: Any, size: int, seeds: Seeds, kept: Kept) -> None:
    if _seen_apart(trial, batch, size, seeds):
        return
    for norm in _SHRUNK:
        with _shrunk(trial.model, kept, norm):
            if _seen_apart(trial, batch, size, seeds):
                return
    raise UnsupportedModelError(
        "changing a row does not change its gradient, so nothing could be checked: the "
        f"loss may not depend on the batch, or be constant. {NO_STEP}"
    )


def _seen_apart(trial: Trial, batch: Any, size: int, seeds: Seeds) -> bool:
    """Check that rows are apart; return whether any gradient moved, without which none was seen."""
    # Jitter is for batches whose rows are all alike; it could leave what the model can take.
    if not any(_independent(trial, batch, size, jitter, seeds) for jitter in range(3)):
        return False
    require_strangers_apart(trial, batch, size, seeds=seeds)
    return True


@contextlib.contextmanager
def _shrunk(model: nn.Module, kept: Kept, most: float) -> Iterator[None]:
    """Bring the norm of each parameter down to ``most`` while the block runs.

    A trained model may fit all rows of a batch: a hinge is flat there, a softmax of large weights
    saturates, and no row has a gradient to look at. Smaller weights take the same path off it.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    with torch.no_grad():
        for parameter in parameters:
            norm = torch.linalg.vector_norm(parameter, dtype=widened(parameter.dtype))
            parameter.div_((norm / most).clamp(min=1))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(kept.of(parameter))


def _independent(trial: Trial, batch: Any, size: int, jitter: int, seeds: Seeds) -> bool:
    """Keep one row and change all others, for each row; the kept one's gradient must not move.

    Where a pass draws random numbers, each comparison has other ones: by them a step may decide
    whether it mixes, as CutMix does in half of its batches. Where it draws them for more than
    dropout, there are more comparisons.

    Returns:
        Whether the others' gradients did move, without which nothing was seen.

    Raises:
        UnsupportedModelError: if the kept row's gradient changed, or the loss is not a mean.
    """
    seen = False
    generator = torch.Generator().manual_seed(jitter)

    def drawn() -> Any:
        return recombined(batch, size, _ROWS, generator, jitter=jitter)

    def compared(run: Run, rows: Any, kept: int) -> bool:
        others = with_row(drawn(), rows, kept, rows=_ROWS)
        changed = trial.recorded(others, rows=_ROWS, seed=run.seed)
        require_unmoved(run, changed, kept)
        return _moved(run, changed)

    for _ in range(_ROUNDS):
        rows = drawn()
        run = trial.recorded(rows, rows=_ROWS, seed=seeds.number())
        for kept in range(_ROWS):
            if run.drew and kept:
                run = trial.recorded(rows, rows=_ROWS, seed=seeds.number())
            seen = compared(run, rows, kept) or seen
    if run.drew and not _drops_only(trial, rows):
        for place, seed in enumerate(seeds.coins(_ROUNDS * _ROWS)):
            run = trial.recorded(rows, rows=_ROWS, seed=seed)
            compared(run, rows, place % _ROWS)
    require_linear(run.fault, outcome=NO_STEP)
    _require_mean(trial, drawn)
    return seen


def _drops_only(trial: Trial, rows: Any) -> bool:
    """Return whether all random numbers that a pass draws are for dropout."""
    with without_dropout(trial.model):
        return not trial.recorded(rows, rows=_ROWS).drew


def _few(trial: Trial, batch: Any, rows: int, *, seed: int = 0) -> Run:
    """Run the first rows of a trial batch."""
    few = batch if rows == _ROWS else first_rows(batch, _ROWS, rows)
    try:
        return trial.recorded(few, rows=rows, seed=seed)
    except LightningSecureError:
        raise
    except Exception as error:
        if rows > 1:
            raise
        raise UnsupportedModelError(
            "the training step fails on a batch of one row, and Poisson sampling draws such "
            f"batches ({type(error).__name__}; a squeeze() without dim is a common cause). "
            f"{NO_STEP}"
        ) from error


def _require_autograd_agrees(trial: Trial, batch: Any, size: int, *, rows: int) -> None:
    """Compare the unclipped sum of the records with the gradients of an ordinary backward."""
    made = recombined(batch, size, _ROWS, torch.Generator().manual_seed(0))
    batch = first_rows(made, _ROWS, rows)
    run = _few(trial, made, rows)
    names = {parameter: name for name, parameter in trial.model.named_parameters()}
    left: dict[nn.Parameter, Tensor] = {}
    for parameter, gradient in zip(
        trial.engine.parameters, trial.ordinary(batch, rows=rows), strict=True
    ):
        left[parameter] = (
            torch.zeros_like(parameter, dtype=torch.float32)
            if gradient is None
            else gradient.float()
        )
    norms = {parameter: torch.linalg.vector_norm(whole) for parameter, whole in left.items()}
    _subtract(left, run, rows)
    _require_nothing_left(
        left,
        norms,
        lambda parameter: (
            f"parameter {names[parameter]!r} gets a gradient that its layer does not account "
            "for: it is used outside of the layer's own call (as in F.linear(x, "
            "layer.weight), or a penalty on the weights inside the loss), or the layer has an "
            "option that the per-sample rules do not know. Call the layer itself, and use the "
            f"optimizer's weight_decay for penalties. {NO_STEP}"
        ),
    )
    # What was compared was recorded whole; a step lets go of it on the way.
    del left
    sums = trial.summed(batch, rows=rows)
    for total in sums.values():
        total /= rows
    _subtract(sums, run, rows)
    _require_nothing_left(
        sums,
        norms,
        lambda parameter: (
            f"parameter {names[parameter]!r} gets another gradient in a step than in the trial "
            "runs before it: the layer or a hook on it behaves differently while gradients are "
            f"computed. {NO_STEP}"
        ),
    )


def _subtract(left: dict[nn.Parameter, Tensor], run: Run, rows: int) -> None:
    """Subtract the mean of a run's gradients from others."""
    # One by one: a sum of them would take as much memory as the weights.
    for record in run.records:
        ones = torch.ones(rows, device=record.squares().device)  # by which nothing is rounded
        whole = record.weighted(ones) if record.rounds else record
        for parameter, total in whole.weighted_sum(ones).items():
            left[parameter] = left[parameter] - total / rows


def _require_nothing_left(
    left: Mapping[nn.Parameter, Tensor],
    norms: Mapping[nn.Parameter, Tensor],
    message: Callable[[nn.Parameter], str],
) -> None:
    """Make sure that two ways to the gradients agree, up to rounding."""
    # The gradient of a bias before a normalising layer is zero, and comes out as rounding.
    largest = max(float(norm) for norm in norms.values())
    for parameter, apart in left.items():
        tolerance = _TOLERANCE if parameter.dtype.itemsize >= 4 else _COARSE
        rounding = 1e-3 * tolerance * largest + 1e-7
        if torch.linalg.vector_norm(apart) > tolerance * 2 * norms[parameter] + rounding:
            raise UnsupportedModelError(message(parameter))


def _moved(run: Run, changed: Run) -> bool:
    return any(row_differs(run, changed, row, tolerance=_TOLERANCE) for row in range(_ROWS))


def _require_mean(trial: Trial, drawn: Callable[[], Any]) -> None:
    """A row's gradient must be the same in a batch of any size, which that of a mean's is.

    Rounding is not quite the same, and in a large model may put one activation on the other side of
    a ReLU's kink, which moves gradients by some hundredths. That happens in some draws of
    rows; what depends on their number is there in each.
    """
    exact = all(parameter.dtype.itemsize >= 4 for parameter in trial.engine.parameters)
    tolerance, floor = (_TOLERANCE, 1e-10) if exact else (_COARSE, 1e-4)
    with without_dropout(trial.model):
        for draw in range(_KINKS):
            batch = drawn()
            whole = _few(trial, batch, _ROWS)
            few = {rows: _few(trial, batch, rows) for rows in _SIZES}
            for run in few.values():
                require_same_layers(whole, run)
            again = _few(trial, batch, _ROWS, seed=1)
            if not same_layers(whole, again) or row_differs(
                whole, again, 0, tolerance=_TOLERANCE / 10
            ):
                _require_mean_on_average(trial, batch)
                return
            fault = _by_size(whole, few, tolerance=tolerance, floor=floor)
            if fault is None:
                return
            gross = _by_size(whole, few, tolerance=max(_COARSE, 5 * tolerance), floor=floor)
            if gross is not None or draw == _KINKS - 1:
                raise fault


def _by_size(
    whole: Run, few: Mapping[int, Run], *, tolerance: float, floor: float
) -> UnsupportedModelError | None:
    """Return what is to be said where a row's gradient is another one in a smaller batch."""
    for rows, run in few.items():
        for row in range(rows):
            layer = differing(run, whole, row, tolerance=tolerance, floor=floor)
            if layer is not None:
                sizes = [float(item.squares()[:, row].sum()) for item in (whole, run)]
                return _no_mean(larger=sizes[0] > sizes[1], where=f" at layer {layer!r}")
    return None


def _require_mean_on_average(trial: Trial, batch: Any) -> None:
    """Refuse a factor of rows that stands out although the step draws random numbers."""
    sizes = {
        rows: sum(
            float(_few(trial, batch, rows, seed=seed).squares()[:, 0].sum())
            for seed in range(_DRAWS)
        )
        for rows in (*_SIZES, _ROWS)
    }
    largest, smallest = max(sizes.values()), min(sizes.values())
    if largest > smallest * _ROWS**0.8:  # of squares
        raise _no_mean(larger=sizes[_ROWS] > sizes[1])


def _no_mean(*, larger: bool, where: str = "") -> UnsupportedModelError:
    what = (
        "the loss is a sum over the batch, or grows with its rows in another way, and not a mean"
        if larger
        else "the loss shrinks as the batch grows, and is not a mean over its rows"
    )
    return UnsupportedModelError(
        f"{what}: each row's gradient{where} would depend on how many rows were drawn, so that "
        "adding one changes those of all others. Return the mean, as with reduction='mean'. "
        f"{ISOLATE} {NO_STEP}"
    )
