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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_secure.errors import LightningSecureError, UnsupportedModelError
from lightning_secure.privacy.bookkeeping import Record
from lightning_secure.privacy.engine import GradientEngine

__all__ = ["preflight", "recombined"]

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
        return torch.stack([record.unit.norm_squared(record) for record in self.records])


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
        model: Its buffers, attributes and metrics are as before when this returns, and so is the
            global random state.
        loss_of: Runs the training step on a batch and returns the scalar loss.
        batch: A batch on the model's device; rows for the trial runs are recombined from it.
        size: Rows of ``batch``.

    Raises:
        UnsupportedModelError: One row's gradient depends on another row, the loss is not a mean,
            a gradient goes past its layer, or a buffer takes up un-noised data. The message names
            the layer, parameter or buffer at fault.
    """
    if not _leaves(batch, size):
        raise UnsupportedModelError(
            f"a batch is a {type(batch).__name__}, in which no rows are found. Let the collate "
            f"function return tensors, or tuples, lists and dicts of them. {_NO_STEP}"
        )
    with _preserved(model):
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        _require_autograd_agrees(engine, model, loss_of, batch, size)
        # Jitter is for batches whose rows are all alike; it could leave what the model can take.
        if not any(_independent(engine, loss_of, batch, size, jitter) for jitter in range(3)):
            raise UnsupportedModelError(
                "changing a row does not change its gradient, so nothing could be checked: the "
                f"loss may not depend on the batch, or be constant. {_NO_STEP}"
            )
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                raise UnsupportedModelError(
                    f"buffer {name!r} changes in a training step: it takes up statistics of the "
                    f"rows without noise, and would stand in every checkpoint. {_NO_STEP}"
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
            changed = _recorded(engine, loss_of, _with_row(others, rows, kept), rows=_ROWS)
            seen = _require_unmoved(run, changed, kept) or seen
        alone = _mapped(rows, _ROWS, lambda value: value[:1], lambda value: list(value[:1]))
        _require_mean(run, _alone(engine, loss_of, alone))
    return seen


def _recorded(
    engine: GradientEngine, loss_of: Callable[[Any], Tensor], batch: Any, *, rows: int
) -> _Run:
    # The same seed each time, so that dropout takes the same places away.
    torch.manual_seed(0)
    with engine.recording():
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
        weights = torch.full((rows,), 1 / rows, device=record.grads.device)
        for parameter, total in record.unit.weighted_sum(record, weights).items():
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
        if not torch.allclose(before.inputs[kept].float(), after.inputs[kept].float(), 1e-4, 1e-6)
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
    """Restore buffers, plain attributes, metrics, gradients and the random state."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes = [(module, name, value, _copied(value)) for module, name, value in _plain(model)]
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
                for buffer, saved in buffers:
                    buffer.copy_(saved)
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


def recombined(
    batch: Any, size: int, rows: int, generator: torch.Generator, *, jitter: int = 0
) -> Any:
    """Return a batch of ``rows`` rows made of values from ``batch``.

    Args:
        batch: Tensors of shape ``(size, ...)`` and lists of length ``size``, in dicts, lists
            and tuples. Anything else is passed on.
        size: Rows of ``batch``.
        rows: Rows to make.
        generator: Decides which.
        jitter: What is done to floating-point numbers besides: 0, nothing, unless there is only
            one row to choose from; 1, they are scaled by up to a tenth; 2, shifted as well.

    Each number is taken from a random row, at the same place, so that ranges, classes and token
    ids stay valid.
    """

    def tensor(value: Tensor) -> Tensor:
        flat = value.detach().reshape(size, -1)
        places = flat.shape[1]
        if size == 1 and not value.is_floating_point() and places > 1:
            # One row to choose from: exchange its places instead.
            columns = torch.randint(places, (rows, places), generator=generator)
            picked = flat[0][columns.to(flat.device)]
        else:
            choice = torch.randint(size, (rows, places), generator=generator).to(flat.device)
            picked = flat.gather(0, choice)
        if value.is_floating_point() and (jitter or size == 1):
            noise = 0.2 * torch.rand(rows, places, generator=generator).to(picked) - 0.1
            picked = picked * (1 + noise) + (noise if jitter > 1 else 0)
        return picked.reshape(rows, *value.shape[1:])

    def sequence(value: Sequence[Any]) -> list[Any]:
        choice = torch.randint(size, (rows,), generator=generator).tolist()
        return [value[index] for index in choice]

    return _mapped(batch, size, tensor, sequence)


def _with_row(batch: Any, donor: Any, place: int) -> Any:
    """Return ``batch`` with one row of ``donor`` in its place."""
    donors = iter(_leaves(donor, _ROWS))

    def tensor(value: Tensor) -> Tensor:
        return torch.cat([value[:place], next(donors)[place : place + 1], value[place + 1 :]])

    def sequence(value: Sequence[Any]) -> list[Any]:
        return [*value[:place], next(donors)[place], *value[place + 1 :]]

    return _mapped(batch, _ROWS, tensor, sequence)


def _leaves(batch: Any, size: int) -> list[Any]:
    found: list[Any] = []

    def keep(value: Any) -> Any:
        found.append(value)
        return value

    _mapped(batch, size, keep, keep)
    return found


def _mapped(
    value: Any,
    size: int,
    tensor: Callable[[Tensor], Any],
    sequence: Callable[[Sequence[Any]], Any],
) -> Any:
    """Apply a function to everything in a batch that has one entry a row."""
    if isinstance(value, Tensor):
        return tensor(value) if value.ndim and len(value) == size else value

    def again(item: Any) -> Any:
        return _mapped(item, size, tensor, sequence)

    if isinstance(value, Mapping):
        items = {key: again(item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if isinstance(value, list | tuple):
        per_row = len(value) == size and not any(
            isinstance(item, Tensor) and item.ndim and len(item) == size for item in value
        )
        return sequence(value) if per_row else type(value)(map(again, value))
    return value
