"""Rows that travel together, as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from torch.utils.data import default_collate

from lightning_secure.data.format.columns import ColumnData

Output = Literal["tuple", "dict"]


class Samples(Sequence[Any]):
    """A sequence of samples that are stored column by column.

    Args:
        columns: Equally long columns, in the order of the samples' fields.
        output: Whether a sample is a tuple or a dict.

    To a DataLoader it is a list of samples; :func:`collate` takes its columns as they are, which
    spares splitting them and stacking them again.
    """

    def __init__(self, columns: Mapping[str, ColumnData], output: Output) -> None:
        self.columns = columns
        self.output: Output = output

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            rows = {name: values[index] for name, values in self.columns.items()}
            return Samples(rows, self.output)
        return self._assemble({name: values[index] for name, values in self.columns.items()})

    def __iter__(self) -> Iterator[Any]:
        # Sequence's own would end at the IndexError that tensors raise, which is slower.
        return (self[index] for index in range(len(self)))

    def batch(self) -> Any:
        """Return all samples as one batch: a tuple or dict of columns."""
        return self._assemble(self.columns)

    def _assemble(self, values: Mapping[str, Any]) -> Any:
        return assemble(values, self.output)


def assemble(values: Mapping[str, Any], output: Output) -> Any:
    """Return what belongs together as a tuple, or as a dict by column name."""
    return dict(values) if output == "dict" else tuple(values.values())


def collate(samples: Sequence[Any]) -> Any:
    """Make a batch of what a dataset returned.

    Args:
        samples: :class:`Samples`, or any list of samples.

    Returns:
        A tuple or dict with one entry a column: tensors of shape ``(batch, *shape)``; lists of
        tensors, strings or bytes where rows differ in length.
    """
    if isinstance(samples, Samples):
        return samples.batch()
    return default_collate(list(samples))
