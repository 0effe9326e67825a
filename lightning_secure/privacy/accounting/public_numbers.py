"""The numbers of a run that are public."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublicNumbers:
    """The numbers that are fixed at the first fit and never derived from the data again.

    Attributes:
        dataset_size: Number of rows.
        dataset_size_declared: Whether the user declared it public. Otherwise it was read off the
            dataset and is treated as public from then on.
        expected_batch_size: Rows a step draws on average; the divisor of the noised sum.
        steps_per_epoch: Draws an epoch.

    >>> public = PublicNumbers(
    ...     dataset_size=600, dataset_size_declared=True, expected_batch_size=6, steps_per_epoch=100
    ... )
    >>> public.sample_rate
    0.01
    """

    dataset_size: int
    dataset_size_declared: bool
    expected_batch_size: int
    steps_per_epoch: int

    @property
    def sample_rate(self) -> float:
        """Probability with which each row is drawn."""
        return self.expected_batch_size / self.dataset_size
