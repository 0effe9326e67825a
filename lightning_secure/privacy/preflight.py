"""Checks, before the first step, that per-sample gradients mean what clipping takes them for.

Clipping bounds what one row can do only if its gradient depends on that row alone. A contrastive
loss, batch statistics or a normaliser that counts the other rows breaks that silently. So the
model runs some times on five rows recombined from the first batch: all but one are changed, and
that one's gradient must not move; the recorded gradients must add up to what autograd computes;
and the loss must be a mean.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_secure.errors import LightningSecureError, UnsupportedModelError
from lightning_secure.privacy.bookkeeping import per_sample_norms
from lightning_secure.privacy.engine import GradientEngine
from lightning_secure.privacy.rows import leaves, mapped, recombined, with_row
from lightning_secure.privacy.units.base import Record

__all__ = ["preflight", "require_rows_kept_apart"]

_ROWS: Final = 5
_ROUNDS: Final = 3
_TOLERANCE: Final = 1e-3
_NO_STEP: Final = "No step was taken."


@dataclass
class _Run:
    """Records of one pass."""

    records: list[Record]

    def norms(self) -> Tensor:
        """Squared norm per record and row, shape ``(records, rows)``."""
        return torch.stack([record.squares() for record in self.records])


def preflight(
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    *,
    size: int,
) -> None:
    """Check one model and loss.

    Args:
        engine: Attached to ``model``.
        model: Its parameters, buffers, attributes and metrics are as before when this returns, and
            so is the global random state.
        loss_of: Runs all that happens to a batch, the transfer hooks and the training step, and
            returns the scalar loss.
        batch: A batch as it was collated; rows for the trial runs are recombined from it.
        size: Rows of ``batch``.

    Raises:
        UnsupportedModelError: One row's gradient depends on another row, the loss is not a mean,
            a gradient goes past its layer, or something that checkpoints hold takes up un-noised
            data. The message names the layer, parameter or state at fault.
    """
    if not leaves(batch, size):
        raise UnsupportedModelError(
            f"a batch is a {type(batch).__name__}, in which no rows are found. Let the collate "
            f"function return tensors, or tuples, lists and dicts of them. {_NO_STEP}"
        )
    with _preserved(model):
        before = copy.deepcopy(_state(model))
        _require_autograd_agrees(engine, model, loss_of, batch, size)
        # Jitter is for batches whose rows are all alike; it could leave what the model can take.
        if not any(_independent(engine, loss_of, batch, size, jitter) for jitter in range(3)):
            raise UnsupportedModelError(
                "changing a row does not change its gradient, so nothing could be checked: the "
                f"loss may not depend on the batch, or be constant. {_NO_STEP}"
            )
        _require_unchanged(before, _state(model))


def require_rows_kept_apart(
    trial_batch: Callable[[Sequence[int]], Any],
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
) -> None:
    """Check a collate function: :func:`preflight` sees only what it has made.

    Args:
        trial_batch: From row numbers to the batch that the collate function makes; None if there
            is nothing to check.
        engine: As for :func:`preflight`.
        model: As for :func:`preflight`.
        loss_of: As for :func:`preflight`.

    Raises:
        UnsupportedModelError: One row's gradient depends on which rows it was collated with.

    Batches that are padded to different lengths are not compared: rows differ there although they
    were not mixed.
    """
    first = list(range(_ROWS))
    batch = trial_batch(first)
    if batch is None or not leaves(batch, _ROWS):
        return
    with _preserved(model):
        run = _recorded(engine, loss_of, batch, rows=_ROWS)
        for kept in first:
            rows = [row if row == kept else row + _ROWS for row in first]
            other = trial_batch(rows)
            if _shapes(other) != _shapes(batch):
                continue
            moved = _moved(
                per_sample_norms(run.records),
                per_sample_norms(_recorded(engine, loss_of, other, rows=_ROWS).records),
            )
            if moved[kept]:
                raise UnsupportedModelError(
                    "one row's gradient changes when it is collated with other rows, so clipping "
                    "bounds nothing: rows are mixed by the collate function (as MixUp and CutMix "
                    f"do), or by what comes after it. Collate each row by itself. {_NO_STEP}"
                )


def _shapes(batch: Any) -> list[Any]:
    return [value.shape if isinstance(value, Tensor) else None for value in leaves(batch, _ROWS)]


def _state(model: nn.Module) -> dict[str, Any]:
    """Return all that a checkpoint would hold, and buffers that none does."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def _require_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.shape == new.shape and torch.equal(old, new)
        else:
            same = name in before and name in after and bool(old == new)
        if not same:
            raise UnsupportedModelError(
                f"{name!r} changes in a training step: it takes up the rows without noise, and "
                f"would stand in every checkpoint. {_NO_STEP}"
            )


def _independent(
    engine: GradientEngine, loss_of: Callable[[Any], Tensor], batch: Any, size: int, jitter: int
) -> bool:
    """Keep one row and change all others, for each row; the kept one's gradient must not move.

    Returns:
        Whether the others' gradients did move, without which nothing was seen.

    Raises:
        UnsupportedModelError: The kept one's did.
    """
    seen = False
    generator = torch.Generator().manual_seed(jitter)
    for _ in range(_ROUNDS):
        rows = recombined(batch, size, _ROWS, generator, jitter=jitter)
        run = _recorded(engine, loss_of, rows, rows=_ROWS)
        for kept in range(_ROWS):
            others = recombined(batch, size, _ROWS, generator, jitter=jitter)
            changed = _recorded(
                engine, loss_of, with_row(others, rows, kept, rows=_ROWS), rows=_ROWS
            )
            seen = _require_unmoved(run, changed, kept) or seen
        alone = mapped(rows, _ROWS, lambda value: value[:1], lambda value: list(value[:1]))
        _require_mean(run, _alone(engine, loss_of, alone))
    return seen


def _recorded(
    engine: GradientEngine, loss_of: Callable[[Any], Tensor], batch: Any, *, rows: int
) -> _Run:
    # The same seeds each time, so that dropout and augmentations do the same.
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with engine.recording(whole=True):
        loss = loss_of(batch)
        if not loss.requires_grad:
            raise UnsupportedModelError(
                f"the loss does not depend on any trainable layer. {_NO_STEP}"
            )
        torch.autograd.backward(loss)
    run = _Run(engine.take(rows))
    if not (torch.isfinite(loss) and torch.isfinite(run.norms()).all()):
        raise UnsupportedModelError(
            "the loss or its gradients are not finite on rows recombined from the first batch, "
            f"so nothing could be checked. Scale the inputs, by public constants. {_NO_STEP}"
        )
    return run


def _alone(engine: GradientEngine, loss_of: Callable[[Any], Tensor], batch: Any) -> _Run:
    try:
        return _recorded(engine, loss_of, batch, rows=1)
    except LightningSecureError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            "the training step fails on a batch of one row, and Poisson sampling draws such "
            f"batches ({type(error).__name__}; a squeeze() without dim is a common cause). "
            f"{_NO_STEP}"
        ) from error


def _require_autograd_agrees(
    engine: GradientEngine,
    model: nn.Module,
    loss_of: Callable[[Any], Tensor],
    batch: Any,
    size: int,
) -> None:
    """Compare the unclipped sum of the records with the gradients of an ordinary backward."""
    batch, rows = recombined(batch, size, _ROWS, torch.Generator().manual_seed(0)), _ROWS
    run = _recorded(engine, loss_of, batch, rows=rows)
    recorded: dict[nn.Parameter, Tensor] = {}
    for record in run.records:
        weights = torch.full((rows,), 1 / rows, device=record.squares().device)
        for parameter, total in record.weighted_sum(weights).items():
            recorded[parameter] = recorded[parameter] + total if parameter in recorded else total
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(loss_of(batch))
    names = {parameter: name for name, parameter in model.named_parameters()}
    gradients = [parameter.grad for parameter in engine.parameters]
    model.zero_grad(set_to_none=True)  # the model's own code must not find them
    for parameter, gradient in zip(engine.parameters, gradients, strict=True):
        zero = torch.zeros_like(parameter, dtype=torch.float32)
        ours = recorded.get(parameter, zero)
        theirs = zero if gradient is None else gradient.float()
        scale = torch.linalg.vector_norm(theirs) + torch.linalg.vector_norm(ours)
        difference = torch.linalg.vector_norm(ours - theirs)
        tolerance = _TOLERANCE if parameter.dtype.itemsize >= 4 else 0.05
        if difference > tolerance * scale + 1e-7:
            raise UnsupportedModelError(
                f"parameter {names[parameter]!r} gets a gradient that its layer does not account "
                "for: it is used outside of the layer's own call (as in F.linear(x, "
                "layer.weight), or a penalty on the weights inside the loss), or the layer has an "
                "option that the per-sample rules do not know. Call the layer itself, and use the "
                f"optimizer's weight_decay for penalties. {_NO_STEP}"
            )


def _require_unmoved(run: _Run, changed: _Run, kept: int) -> bool:
    """Compare the kept row's gradient; return whether any other row's moved."""
    if len(run.records) != len(changed.records):
        raise UnsupportedModelError(
            "the model runs through other layers when other rows are in the batch, so its rows "
            f"cannot be trained together privately. {_NO_STEP}"
        )
    moved = _moved(run.norms(), changed.norms())
    if not moved[:, kept].any():
        return bool(moved.any())
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
        else "rows are mixed in the loss (a contrastive term, or a divisor that counts the other "
        "rows' tokens or classes)"
    )
    raise UnsupportedModelError(
        f"one row's gradient changes when another row does, so clipping bounds nothing: {where}. "
        f"Let each row's loss depend on that row alone, and return the mean. {_NO_STEP}"
    )


def _alike(before: Record, after: Record, row: int) -> bool:
    one, other = before.evidence()[0][row].float(), after.evidence()[0][row].float()
    return torch.allclose(one, other, 1e-4, 1e-6)


def _require_mean(run: _Run, alone: _Run) -> None:
    """A mean divides by the rows; a sum does not. Dropout may differ, a factor of rows may not."""
    together = run.norms()[:, 0].sum().sqrt()
    single = alone.norms()[:, 0].sum().sqrt()
    if together > single * _ROWS**0.5:
        raise UnsupportedModelError(
            "the loss is a sum over the batch and not a mean: each row's gradient would be taken "
            "for as many times larger as there are rows, and clipped to nothing. Return the mean, "
            f"as with reduction='mean'. {_NO_STEP}"
        )


def _moved(before: Tensor, after: Tensor) -> Tensor:
    scale = torch.maximum(before, after)
    return (before - after).abs() > _TOLERANCE * scale + 1e-12 * (1 + scale.max())


@contextlib.contextmanager
def _preserved(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, plain attributes, metrics, gradients and the random state."""
    tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    attributes = [(module, name, value, _copied(value)) for module, name, value in _plain(model)]
    # By id: a metric's hash is that of its state.
    known = {(id(module), name) for module, name, *_ in attributes}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            with torch.no_grad():
                for tensor, saved in tensors:
                    tensor.copy_(saved)
            for module, name, _ in list(_plain(model)):
                if (id(module), name) not in known:
                    del vars(module)[name]
            for module, name, value, saved in attributes:
                vars(module)[name] = _restored(value, saved)
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _plain(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield what a training step may count or collect in; torchmetrics' states among them."""
    kinds = (int, float, str, list, dict, set, tuple, Tensor, type(None))
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, kinds) and name not in _INTERNALS:
                yield module, name, value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


def _restored(value: Any, saved: Any) -> Any:
    """Give a collection its old content in place: others may hold it too."""
    if isinstance(value, list):
        value[:] = saved
    elif isinstance(value, dict | set):
        value.clear()
        value.update(saved)
    else:
        return saved
    return value


_INTERNALS: Final = frozenset(vars(nn.Module()))
