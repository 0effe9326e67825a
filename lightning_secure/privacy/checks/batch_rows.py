"""Batches taken apart by row and put together again, for the trial runs of the preflight."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def recombined(
    batch: Any, size: int, rows: int, generator: torch.Generator, *, jitter: int = 0
) -> Any:
    """Return a batch of ``rows`` rows made of values from ``batch``.

    Args:
        batch: Tensors of shape ``(size, ...)`` and lists of length ``size``, in dicts, lists,
            tuples and dataclasses. Anything else is passed on.
        size: Rows of ``batch``.
        rows: Rows to make.
        generator: Decides which.
        jitter: What is done to floating-point numbers besides: 0, nothing, unless there is only
            one row to choose from; 1, they are scaled by up to a tenth; 2, shifted as well.

    Each number is taken from a random row, at the same place, so that ranges, classes and token
    ids stay valid. Where a row has one number only, such as a class or a weight, each that
    occurs is as likely as any other: a rare one decides whether the rows' mean is weighed by it.
    """

    def tensor(value: Tensor) -> Tensor:
        flat = value.detach().reshape(size, -1)
        places = flat.shape[1]
        if size == 1 and not value.is_floating_point() and places > 1:
            # One row to choose from: exchange its places instead.
            columns = torch.randint(places, (rows, places), generator=generator)
            picked = flat[0][columns.to(flat.device)]
        else:
            flat = torch.unique(flat, dim=0) if places == 1 and not flat.is_complex() else flat
            choice = torch.randint(len(flat), (rows, places), generator=generator)
            picked = flat.gather(0, choice.to(flat.device))
        if value.is_floating_point() and (jitter or size == 1):
            noise = 0.2 * torch.rand(rows, places, generator=generator).to(picked) - 0.1
            picked = picked * (1 + noise) + (noise if jitter > 1 else 0)
        return picked.reshape(rows, *value.shape[1:])

    def sequence(value: Sequence[Any]) -> list[Any]:
        choice = torch.randint(size, (rows,), generator=generator).tolist()
        return [value[index] for index in choice]

    return mapped(batch, size, tensor, sequence)


def with_row(batch: Any, donor: Any, place: int, *, rows: int) -> Any:
    """Return ``batch``, of ``rows`` rows, with one row of ``donor`` in its place."""
    donors = iter(leaves(donor, rows))

    def tensor(value: Tensor) -> Tensor:
        return torch.cat([value[:place], next(donors)[place : place + 1], value[place + 1 :]])

    def sequence(value: Sequence[Any]) -> list[Any]:
        return [*value[:place], next(donors)[place], *value[place + 1 :]]

    return mapped(batch, rows, tensor, sequence)


def first_rows(batch: Any, size: int, rows: int) -> Any:
    """Return the first ``rows`` rows of a batch of ``size``."""
    return mapped(batch, size, lambda value: value[:rows], lambda value: list(value[:rows]))


def copied(batch: Any, size: int) -> Any:
    """Return a batch whose rows a module may change in place."""
    return mapped(batch, size, Tensor.clone, list)


def leaves(batch: Any, size: int) -> list[Any]:
    """Return everything in a batch that has one entry for each of its ``size`` rows."""
    found: list[Any] = []

    def keep(value: Any) -> Any:
        found.append(value)
        return value

    mapped(batch, size, keep, keep)
    return found


def mapped(
    value: Any,
    size: int,
    tensor: Callable[[Tensor], Any],
    sequence: Callable[[Sequence[Any]], Any],
) -> Any:
    """Apply a function to everything in a batch that has one entry a row."""
    if isinstance(value, Tensor):
        return tensor(value) if value.ndim and len(value) == size else value

    def again(item: Any) -> Any:
        return mapped(item, size, tensor, sequence)

    if isinstance(value, Mapping):
        items = {key: again(item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        again_in = copy.copy(value)  # as Lightning does, which moves it to a device
        for item in dataclasses.fields(value):
            if hasattr(value, item.name):
                setattr(again_in, item.name, again(getattr(value, item.name)))
        return again_in
    if isinstance(value, list | tuple):
        per_row = len(value) == size and not any(
            isinstance(item, Tensor) and item.ndim and len(item) == size for item in value
        )
        return sequence(value) if per_row else type(value)(map(again, value))
    return value
