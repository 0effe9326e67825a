"""Assignment of rows to splits: by a ratio and a seed, or by a column's value."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from lightning_secure.crypto.parsing import NAME_PATTERN
from lightning_secure.errors import ConfigError, DataError

_BLOCK: Final = 4096
_MOST_SPLITS: Final = 64


class SplitRule(ABC):
    """Says for each row of a source to which split it goes."""

    @abstractmethod
    def assign(self, columns: Mapping[str, Any], first_row: int) -> dict[str, npt.NDArray[np.intp]]:
        """Return positions in ``columns`` by name of split; each row is in one of them.

        The answer for a row does not depend on how rows are put into batches.
        """

    def remaining(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns to seal."""
        return columns


@dataclass(frozen=True, kw_only=True)
class SplitByRatio(SplitRule):
    """Rows go to splits at random, in these proportions on average.

    Attributes:
        ratios: Share of each split; they add up to 1.
        seed: The same seed gives the same splits of the same source.
        group: A column, for example a patient's number. Rows that agree in it go to one split, so
            that no patient is both trained and tested on.

    Raises:
        ConfigError: if the shares are not positive or do not add up to 1, or a name is no split's.

    >>> from lightning_secure import seal
    >>> rule = SplitByRatio(ratios={"train": 0.8, "val": 0.2}, seed=0, group="patient")
    >>> seal({"patient": range(100)}, folder / "data", keys=keys, split=rule).rows
    {'train': 81, 'val': 19}
    """

    ratios: Mapping[str, float]
    seed: int
    group: str | None = None

    def __post_init__(self) -> None:
        shares = list(self.ratios.values())
        numbers = all(type(share) in (int, float) and share > 0 for share in shares)
        if not shares or not numbers or not math.isclose(sum(shares), 1, abs_tol=1e-9):
            raise ConfigError(
                f"the ratios of the splits must be positive and add up to 1, not {shares}."
            )
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(
                f"the seed of a split must be a whole number, 0 or more, not {self.seed!r}."
            )
        for name in self.ratios:
            _require_name(name)

    def assign(self, columns: Mapping[str, Any], first_row: int) -> dict[str, npt.NDArray[np.intp]]:
        """Return positions by split."""
        if self.group is None:
            drawn = self._drawn(first_row, len(next(iter(columns.values()))))
        else:
            drawn = np.array([self._hashed(value) for value in _column(columns, self.group)])
        bounds = np.cumsum(list(self.ratios.values()))[:-1]
        chosen = np.searchsorted(bounds, drawn, side="right")
        return {name: np.flatnonzero(chosen == index) for index, name in enumerate(self.ratios)}

    def _drawn(self, first_row: int, count: int) -> npt.NDArray[np.float64]:
        # Numbers belong to blocks of rows, so that batches of another size get the same ones.
        blocks = range(first_row // _BLOCK, (first_row + count) // _BLOCK + 1)
        numbers = [np.random.default_rng([self.seed, block]).random(_BLOCK) for block in blocks]
        start = first_row - blocks.start * _BLOCK
        return np.concatenate(numbers)[start : start + count]

    def _hashed(self, value: Any) -> float:
        if not isinstance(value, str | bytes | int | np.integer):
            raise DataError(
                f"column {self.group!r} groups rows and holds a {type(value).__name__}; text, "
                "bytes and whole numbers can. Nothing was sealed."
            )
        raw = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        digest = hashlib.sha256(b"%d\0" % self.seed + raw).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


@dataclass(frozen=True, kw_only=True)
class SplitByColumn(SplitRule):
    """A column says the name of the split; it is not sealed itself.

    Attributes:
        column: A column of text.

    >>> from lightning_secure import seal
    >>> table = {"age": [34, 51, 29], "part": ["train", "val", "train"]}
    >>> seal(table, folder / "data", keys=keys, split=SplitByColumn(column="part")).rows
    {'train': 2, 'val': 1}
    """

    column: str

    def assign(self, columns: Mapping[str, Any], first_row: int) -> dict[str, npt.NDArray[np.intp]]:
        """Return positions by split.

        Raises:
            DataError: if the column is absent or a value is not the name of a split.

        >>> rule = SplitByColumn(column="part")
        >>> rows = rule.assign({"part": ["train", "val", "train"]}, 0)
        >>> rows["train"].tolist(), rows["val"].tolist()
        ([0, 2], [1])
        """
        values = np.asarray(_column(columns, self.column), dtype=object)
        result = {}
        for name in dict.fromkeys(values.tolist()):
            if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
                raise DataError(
                    f"column {self.column!r} has a value that is no name of a split (1 to 64 "
                    "letters, digits, '.', '_', '-'). Nothing of the splits was put into the "
                    "dataset."
                )
            result[name] = np.flatnonzero(values == name)
        if len(result) > _MOST_SPLITS:
            raise DataError(
                f"column {self.column!r} names more than {_MOST_SPLITS} splits; choose a column "
                "with fewer values. Nothing of the splits was put into the dataset."
            )
        return result

    def remaining(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns without the one that names the split."""
        return {name: values for name, values in columns.items() if name != self.column}


def _column(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise DataError(f"the source has no column {name!r} to split by. Nothing was sealed.")
    values = columns[name]
    return values.tolist() if hasattr(values, "tolist") else values


def _require_name(name: Any) -> None:
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"split={name!r} is not a name of 1 to 64 letters, digits, '.', '_' and '-'."
        )
