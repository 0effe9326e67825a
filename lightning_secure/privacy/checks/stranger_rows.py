"""Trial rows beside which a row stands out: extreme, of a rare class, all of it left out, longer.

Rows of one batch resemble each other. What depends on the others only where they are unlike it, as
a divisor that counts what is left out or a factor that follows the largest loss, may not show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_secure.privacy.checks.batch_rows import mapped, recombined, with_row
from lightning_secure.privacy.checks.checkpoint_state import (
    held,
    require_unchanged,
    without_optimizer_states,
)
from lightning_secure.privacy.checks.clocks import Snapshot
from lightning_secure.privacy.checks.mixed_rows import require_unmoved_by_strangers
from lightning_secure.privacy.checks.snapshot import Stateful, copied, preserved, uncopied
from lightning_secure.privacy.checks.trial_run import Run, Trial, without_dropout
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.gradients.float32 import exact_arithmetic

_ROWS: Final = 5
_FACTORS: Final = (1e3, 1e-3)
_RARE: Final = 3  # classes


def require_strangers_apart(trial: Trial, batch: Any, size: int, *, seeds: Seeds) -> None:
    """Keep one row and make all others strangers to it; the kept one's gradient must not move.

    Args:
        trial: Its dropout is off meanwhile.
        batch: As it was collated; strangers are made of its rows.
        size: Its rows.
        seeds: By which a row is chosen, and passes that draw random numbers are seeded.

    Raises:
        UnsupportedModelError: if the kept row's gradient moves.

    A pass that fails, or has a loss or a gradient that is not finite, decides nothing: strangers
    may be what the model was never made for.
    """
    generator = torch.Generator().manual_seed(seeds.number())
    rows = recombined(batch, size, _ROWS, generator)
    # An index that is computed of a number out of range would end the process on other devices.
    within = any(p.device.type != "cpu" for p in trial.engine.parameters)
    with without_dropout(trial.model):
        run = _passed(trial, rows, seeds.number())
        for others in strangers(batch, size=size, generator=generator, within=within):
            if run is not None and run.drew:
                run = _passed(trial, rows, seeds.number())
            if run is None:
                return
            kept = seeds.below(_ROWS)
            changed = _passed(trial, with_row(others, rows, kept, rows=_ROWS), run.seed)
            if changed is not None:
                require_unmoved_by_strangers(run, changed, kept, outcome=trial.outcome)


def try_again(
    trial: Trial,
    batch: Any,
    size: int,
    *,
    stateful: Iterable[Stateful],
    seeds: Seeds,
    checkpoint: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Run trial rows in the middle of a fit, and leave everything as it was.

    Args:
        trial: Of the step that is to be taken.
        batch: One of its chunks, as it was collated.
        size: Its rows.
        stateful: Optimizers and schedulers. Of an optimizer only the settings are put back.
        seeds: For the passes.
        checkpoint: Returns what a checkpoint would hold if it were written now. Of an optimizer's
            states only places and versions are compared.

    Raises:
        UnsupportedModelError: if one row's gradient depends on another row, or a state that
            checkpoints hold changes with the training step.

    Where there is no memory for it, nothing is tried.
    """
    light = [_Settings(s) if isinstance(s, Optimizer) else s for s in stateful]
    with (
        contextlib.suppress(torch.OutOfMemoryError),
        preserved(trial.model, light) as kept,
        exact_arithmetic(),
    ):

        def hold() -> dict[str, Any]:
            return without_optimizer_states(held(trial.model, checkpoint, outcome=trial.outcome))

        before = None
        with contextlib.suppress(torch.OutOfMemoryError):
            before = Snapshot.of(hold, lambda content: copied(content, kept.of))
        require_strangers_apart(trial, batch, size, seeds=seeds)
        _require_coins_apart(trial, batch, size, seeds)
        if before is not None:
            require_unchanged(before, lambda: Snapshot.of(hold, uncopied), outcome=trial.outcome)


def _require_coins_apart(trial: Trial, batch: Any, size: int, seeds: Seeds) -> None:
    """Compare some passes of other random numbers, dropout's included."""
    generator = torch.Generator().manual_seed(seeds.number())
    rows, others = (recombined(batch, size, _ROWS, generator) for _ in range(2))
    for kept, seed in enumerate([seeds.number(), seeds.extreme(high=False), seeds.number()]):
        run = _passed(trial, rows, seed)
        if run is None or not run.drew:
            return
        changed = _passed(trial, with_row(others, rows, kept, rows=_ROWS), seed)
        if changed is not None:
            require_unmoved_by_strangers(run, changed, kept, outcome=trial.outcome)


class _Settings:
    """An optimizer's settings, without its states, which a training step does not touch."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._groups = optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return {"groups": [{k: v for k, v in g.items() if k != "params"} for g in self._groups]}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        for group, settings in zip(self._groups, state_dict["groups"], strict=True):
            group.update(settings)


def _passed(trial: Trial, rows: Any, seed: Any) -> Run | None:
    try:
        return trial.recorded(rows, rows=_ROWS, seed=seed)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 # the module's own, of any kind, on rows that never were
        return None


def strangers(batch: Any, *, size: int, generator: torch.Generator, within: bool) -> Iterator[Any]:
    """Yield batches of trial rows that are unlike those of a batch.

    Args:
        batch: Real rows, ``size`` of them.
        size: Of ``batch``.
        generator: Chooses rows.
        within: Whether no number may leave the range that it has in the batch.

    Every number is the smallest, then the largest that the batch has at its place: texts are
    short or long, masks leave out as much as ever or nothing, and so do targets. Then all rows
    have one class, of the rarest. Then real numbers are a thousand times as large, or as small.

    What is the same in all rows stays, since it may be a mask that counts the same for each. In
    the last two, so do numbers between 0 and 1, which may be masks, targets or probabilities.
    """
    if size < 2:
        return

    def made(tensor: Callable[[Tensor], Tensor], text: Callable[[Any], Any]) -> Any:
        def sequence(value: Sequence[Any]) -> list[Any]:
            return [text(value)] * _ROWS

        return mapped(batch, size, tensor, sequence)

    def some(value: Any) -> Any:
        return value[_below(size, generator)]

    yield made(partial(_ends, end=torch.amin), partial(_by_length, choose=min))
    yield made(partial(_ends, end=torch.amax), partial(_by_length, choose=max))
    for rank in range(_RARE):
        yield made(partial(_rarest, rank=rank, generator=generator), some)
    for factor in _FACTORS:
        if not within or factor < 1:
            yield made(partial(_scaled, factor=factor, generator=generator, within=within), some)


def _below(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))


def _some_rows(value: Tensor, generator: torch.Generator) -> Tensor:
    return value[torch.randint(len(value), (_ROWS,), generator=generator).to(value.device)]


def _ends(value: Tensor, *, end: Callable[..., Tensor]) -> Tensor:
    if value.is_complex():
        return value[:1].expand(_ROWS, *value.shape[1:])
    return end(value, 0, keepdim=True).repeat(_ROWS, *[1] * (value.ndim - 1))


def _by_length(value: Sequence[Any], *, choose: Callable[..., Any]) -> Any:
    return choose(value, key=len) if all(hasattr(item, "__len__") for item in value) else value[0]


def _rarest(value: Tensor, *, rank: int, generator: torch.Generator) -> Tensor:
    """Give all rows one class, where each has one whole number."""
    if value.numel() != len(value) or value.is_floating_point() or value.is_complex():
        return _some_rows(value, generator)
    classes, counts = torch.unique(value, return_counts=True)
    chosen: Tensor = classes[counts.argsort(stable=True)[min(rank, len(classes) - 1)]]
    return chosen.expand(_ROWS, *value.shape[1:]).clone()


def _scaled(value: Tensor, *, factor: float, generator: torch.Generator, within: bool) -> Tensor:
    rows = _some_rows(value, generator)
    if not value.is_floating_point() or bool((value == value[:1]).all()):
        return rows
    low, high = value.aminmax()
    if low >= 0 and high <= 1:
        return rows
    return (rows * factor).clamp(low, high) if within else rows * factor
