"""The stand-in that hooks and callbacks get for the rows that a step has drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from lightning_secure.errors import PrivacyError


class _RowsWithheldError(PrivacyError, AttributeError):
    """The rows of a step are withheld; ``hasattr`` takes this error for a no."""


class ExpectedBatch:
    """A batch of the public expected size, the same object in every step.

    Args:
        rows: Rows that this process expects to draw in a step; at least 1.
        field: Whether this stands for one entry of the batch, such as ``batch["x"]``.

    ``len(batch)``, ``batch.size(0)``, ``batch.shape[0]`` and the same of an entry, as in
    ``batch[0].size(0)`` or ``batch["x"].shape[0]``, are the expected number of rows. Everything
    else depends on rows that were drawn: it raises a :class:`PrivacyError` that says so.
    """

    __slots__ = ("_field", "_rows")

    def __init__(self, rows: int, *, field: bool = False) -> None:
        self._rows = rows
        self._field = field

    def __len__(self) -> int:
        return self._rows

    def size(self, dim: int | None = None) -> Any:
        """Return the expected number of rows for ``dim=0``, and ``shape`` without ``dim``.

        Raises:
            PrivacyError: if another dimension is asked for.
        """
        return self.shape if dim is None else self.shape[dim]

    @property
    def shape(self) -> _Shape:
        """The shape, of which only entry 0 is known."""
        return _Shape(self._rows)

    def __getitem__(self, key: Any) -> ExpectedBatch:
        # A number in an entry, as batch[0][0], may be that of a row: its length is not public.
        if isinstance(key, str) or (type(key) is int and not self._field):
            return ExpectedBatch(self._rows, field=True)
        _withhold(self._rows, "rows or nested entries")

    def __iter__(self) -> Iterator[Any]:
        _withhold(self._rows, "its entries one after another")

    def __contains__(self, item: object) -> bool:
        _withhold(self._rows, "what it contains")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # of Python's own protocols, as copying, also of a half-made copy
            raise AttributeError(name)
        _withhold(self._rows, f"attribute {name!r}")

    def __repr__(self) -> str:
        return f"<ExpectedBatch: {self._rows} rows expected; the rows of the step are private>"


class _Shape:
    """The shape of a batch of which only the number of rows is public."""

    __slots__ = ("_rows",)

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __getitem__(self, dim: Any) -> int:
        if type(dim) is int and dim == 0:
            return self._rows
        _withhold(self._rows, "a dimension other than 0")

    def __len__(self) -> int:
        _withhold(self._rows, "the number of dimensions")

    def __iter__(self) -> Iterator[int]:
        _withhold(self._rows, "all dimensions")

    def __repr__(self) -> str:
        return f"<shape of an ExpectedBatch: ({self._rows}, ...)>"


def _withhold(rows: int, asked: str) -> NoReturn:
    raise _RowsWithheldError(
        f"hooks and callbacks get an ExpectedBatch of {rows} rows, the public expected size, and "
        f"{asked} cannot be had from it. It answers len(batch), batch.size(0), batch[0].size(0) "
        "and batch['name'].shape[0]. Rows go to training_step and the batch-transfer hooks only."
    )
