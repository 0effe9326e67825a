"""Metrics of the rows that a step has drawn, released together with its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from lightning_secure.errors import ConfigError, UnsupportedModelError
from lightning_secure.privacy.checks.batch_rows import first_rows, recombined, with_row
from lightning_secure.privacy.checks.loss_graph import ISOLATE
from lightning_secure.privacy.checks.snapshot import preserved
from lightning_secure.privacy.checks.trial_run import (
    NO_STEP,
    Seed,
    random_states,
    seed_all,
    without_dropout,
)
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.gradients.float32 import exact_arithmetic
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.released.sums import Bounds, centred, require_bounds
from lightning_secure.util.validate import positive

_ROWS: Final = 5
_SIZES: Final = (1, 2)


@dataclass(frozen=True, kw_only=True)
class ReleasedMetric(ABC):
    """A mean over the rows of each step that is published with noise.

    Attributes:
        noise_multiplier: Standard deviation of the noise that each step's sum gets, in units of
            what one row can change in it. It is charged together with the gradient's: with 10 for
            a metric and 1 for the gradient, a step has 0.995.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        positive(noise_multiplier=self.noise_multiplier)

    @property
    @abstractmethod
    def limits(self) -> Bounds:
        """Between which values lie."""

    @abstractmethod
    def values(self, output: Any, norms: Tensor, max_grad_norm: float) -> Tensor:
        """Return one number a row of a chunk.

        Args:
            output: What the training step returned.
            norms: Of the rows' gradients, before clipping.
            max_grad_norm: The clipping norm.
        """


@dataclass(frozen=True, kw_only=True)
class ClippedFraction(ReleasedMetric):
    """The part of the rows whose gradient was clipped.

    >>> metric = ClippedFraction(noise_multiplier=10.0)
    >>> metric.values(None, torch.tensor([0.5, 4.0]), max_grad_norm=1.0)
    tensor([0., 1.])
    """

    @property
    def limits(self) -> Bounds:
        """Zero and one."""
        return 0.0, 1.0

    def values(self, output: Any, norms: Tensor, max_grad_norm: float) -> Tensor:
        """Return 1 for each row that was clipped, also for one that overflowed, and 0 otherwise."""
        return (~(norms <= max_grad_norm)).float()


@dataclass(frozen=True, kw_only=True)
class GradientNorm(ReleasedMetric):
    """The mean norm of the rows' gradients before clipping.

    Attributes:
        largest: Norms beyond it count as this much.

    >>> metric = GradientNorm(noise_multiplier=10.0, largest=5.0)
    >>> metric.limits, metric.values(None, torch.tensor([0.5, 4.0]), max_grad_norm=1.0)
    ((0.0, 5.0), tensor([0.5000, 4.0000]))
    """

    largest: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(largest=self.largest)

    @property
    def limits(self) -> Bounds:
        """Zero and the largest."""
        return 0.0, self.largest

    def values(self, output: Any, norms: Tensor, max_grad_norm: float) -> Tensor:
        """Return the norms."""
        return norms


@dataclass(frozen=True, kw_only=True)
class RowMean(ReleasedMetric):
    """The mean of what the training step says of each row, such as its loss.

    Attributes:
        entry: Of the dict that ``training_step`` returns: a tensor of one number a row, shape
            ``(rows,)``, each of which depends on that row only.
        bounds: Between which values are moved. Wider ones need more noise.

    >>> metric = RowMean(noise_multiplier=10.0, entry="losses", bounds=(0.0, 2.0))
    >>> output = {"loss": torch.tensor(0.5), "losses": torch.tensor([0.25, 0.75])}
    >>> metric.values(output, torch.tensor([0.5, 4.0]), max_grad_norm=1.0)
    tensor([0.2500, 0.7500])
    """

    entry: str
    bounds: tuple[float, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bounds", require_bounds(self.bounds))

    @property
    def limits(self) -> Bounds:
        """The declared bounds."""
        return self.bounds

    def values(self, output: Any, norms: Tensor, max_grad_norm: float) -> Tensor:
        """Return the entry.

        Raises:
            UnsupportedModelError: if the entry is missing, or not one number a row.
        """
        return entry_of(output, self.entry, len(norms))


def entry_of(output: Any, entry: str, rows: int) -> Tensor:
    """Return an entry of a training step's dict, shape ``(rows,)``.

    Raises:
        UnsupportedModelError: if the entry is missing, or not one number a row.
    """
    found = output.get(entry) if isinstance(output, Mapping) else None
    if not isinstance(found, Tensor) or found.shape != (rows,):
        raise UnsupportedModelError(
            f"the released metric of {entry!r} needs training_step to return a dict with that "
            "entry beside 'loss', a tensor of shape (rows,) with one number a row, as a loss with "
            "reduction='none'. This step was not taken."
        )
    return found.detach()


class StepMetrics:
    """Sums up the released metrics of a step, chunk by chunk.

    Args:
        metrics: By name.
        max_grad_norm: The clipping norm.

    Raises:
        ConfigError: if an item is not a metric of this kind.
    """

    def __init__(self, metrics: Mapping[str, ReleasedMetric], *, max_grad_norm: float) -> None:
        for name, metric in metrics.items():
            if not isinstance(metric, ReleasedMetric):
                raise ConfigError(
                    f"released metric {name!r} must be a RowMean, GradientNorm or ClippedFraction, "
                    f"not a {type(metric).__name__}."
                )
        self.metrics = dict(metrics)
        self._max_grad_norm = max_grad_norm
        self._sums: Tensor | None = None

    @property
    def noise_multipliers(self) -> tuple[float, ...]:
        """The noise multiplier of each metric."""
        return tuple(metric.noise_multiplier for metric in self.metrics.values())

    @property
    def entries(self) -> list[str]:
        """Entries of the training step's dict that are released."""
        return [m.entry for m in self.metrics.values() if isinstance(m, RowMean)]

    def begin_step(self, max_grad_norm: float | None = None) -> None:
        """Forget the sums of the last step.

        Args:
            max_grad_norm: The clipping norm of this step; by default that of the last one.
        """
        self._sums = None
        self._max_grad_norm = max_grad_norm or self._max_grad_norm

    def add_chunk(self, output: Any, norms: Tensor) -> None:
        """Add the rows of a chunk.

        Args:
            output: What the training step returned.
            norms: Of the rows' gradients before clipping, shape ``(rows,)``.

        Raises:
            UnsupportedModelError: if an entry is not there, or not one number a row.
        """
        if not self.metrics:
            return
        sums = torch.stack(
            [
                centred(m.values(output, norms, self._max_grad_norm), m.limits).sum().float()
                for m in self.metrics.values()
            ]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> Tensor:
        """Return the sums, in units of what one row can change, and forget them.

        On several ranks they must be added up before they are released, once.
        """
        sums, self._sums = self._sums, None
        return torch.zeros(len(self.metrics), device=device) if sums is None else sums

    def release(
        self, sums: Tensor, noise: GaussianNoise, *, expected_batch_size: int, on: bool = True
    ) -> dict[str, Tensor]:
        """Return the metrics of one step, by name, with noise.

        Args:
            sums: Of all rows of the step, shape ``(metrics,)``.
            noise: Source of the noise. The step's entry in the account was made before.
            expected_batch_size: The public divisor.
            on: False adds no noise, as ``insecure_noise_off``.

        A draw may be larger or smaller than expected, so a step's value may lie outside of the
        bounds; on average over steps it is the mean over all rows.
        """
        sums = sums.clone()
        if on:
            # Each by itself: scaled and added before it is rounded.
            for place, width in enumerate(self.noise_multipliers):
                noise.add_(sums[place : place + 1], std=width)
        found = {}
        for (name, metric), value in zip(self.metrics.items(), sums, strict=True):
            low, high = metric.limits
            found[name] = (low + high) / 2 + (high - low) / 2 * value / expected_batch_size
        return found


def require_rows_apart(
    entries: Sequence[str],
    model: nn.Module,
    output_of: Callable[[Any], Any],
    batch: Any,
    *,
    size: int,
    seed: int | None = None,
) -> None:
    """Check, on rows recombined from a batch, that what is released of a row is of that row only.

    Args:
        entries: Of the training step's dict.
        model: Is left as it was.
        output_of: Runs all that happens to a batch, and returns what the training step returns.
        batch: A batch as it was collated.
        size: Its rows.
        seed: Makes the trial runs repeatable, for tests.

    Raises:
        UnsupportedModelError: if a row's number changes when the others do, or with how many they
            are, or is not there.
    """
    if not entries:
        return
    generator, seeds = torch.Generator().manual_seed(0), Seeds(seed)
    drew = False

    def found(rows: Any, number: int = _ROWS, seed: Seed = 0) -> dict[str, Tensor]:
        nonlocal drew
        seed_all(seed)  # so that dropout does the same
        states = random_states()
        output = output_of(first_rows(rows, _ROWS, number))
        drew = random_states() != states
        return {entry: entry_of(output, entry, number).float() for entry in entries}

    with preserved(model), exact_arithmetic():
        rows = recombined(batch, size, _ROWS, generator, jitter=1)

        def compare(kept: int, number: Seed) -> None:
            others = recombined(batch, size, _ROWS, generator, jitter=1)
            before = found(rows, seed=number)
            after = found(with_row(others, rows, kept, rows=_ROWS), seed=number)
            for entry in entries:
                if not _close(before[entry][kept], after[entry][kept]):
                    raise UnsupportedModelError(
                        f"what training_step returns under {entry!r} for one row changes when "
                        "another row does, so noise for one row's part does not cover it. Let each "
                        f"number depend on its own row. {ISOLATE} {NO_STEP}"
                    )

        for kept in range(_ROWS):  # Another seed for each: by it a step may mix or not.
            compare(kept, seeds.number())
        with without_dropout(model):
            found(rows)
        if drew:  # and not for dropout only
            for place, coin in enumerate(seeds.coins(_ROWS)):
                compare(place % _ROWS, coin)
        with without_dropout(model):
            before, again = found(rows), found(rows, seed=1)
            for entry in entries:
                if not _close(before[entry], again[entry]):
                    continue  # drawn at random, and differently in batches of other sizes
                for number in _SIZES:
                    if not _close(before[entry][:number], found(rows, number)[entry]):
                        raise UnsupportedModelError(
                            f"what training_step returns under {entry!r} for one row depends on "
                            "how many rows there are, so noise for one row's part does not cover "
                            f"it. Let each number depend on its own row. {ISOLATE} {NO_STEP}"
                        )


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, 1e-3, 1e-5)
