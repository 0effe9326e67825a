"""Sources of rows to seal, a file for each kind, and the choice of the kind for an argument."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_secure.data.sources.memory import ArraySource, DatasetSource, RowSource
from lightning_secure.data.sources.source import Source
from lightning_secure.errors import ConfigError
from lightning_secure.util.files import as_path

__all__ = ["Source", "open_source"]


def open_source(source: Any, **options: Any) -> Source:
    """Return what was given as a :class:`Source`.

    Args:
        source: A mapping of arrays, tensors or sequences by column; one array or tensor (column
            ``x``); rows as an iterable of mappings; a torch Dataset; a pandas DataFrame; an Arrow
            table, record batch or reader; or the path of a CSV or Parquet file, of a folder of
            Parquet files, or of a folder with one folder of pictures for each class.
        options: Of that kind of source: ``columns``, ``types``, ``stack`` and ``nulls`` for tables
            (see :class:`~lightning_secure.data.sources.tables.TableSource`), ``decode`` and
            ``size`` for pictures, ``names`` for a torch Dataset.

    Raises:
        ConfigError: if the source is of none of these types, or has no such option.
        MissingExtraError: if a package that it needs is not installed.
        DataError: if the source cannot be read.

    >>> source = open_source({"age": [34, 51]})
    >>> source.rows, list(source.batches())
    (2, [{'age': [34, 51]}])
    """
    opener = _opener(source)
    allowed = set(getattr(opener, "options", ()))
    if unknown := sorted(options.keys() - allowed):
        raise ConfigError(
            f"a source of this kind ({type(source).__name__}) has no option "
            f"{', '.join(map(repr, unknown))}; it has {', '.join(sorted(allowed)) or 'none'}."
        )
    return opener(source, **options)


class _Opener:
    def __init__(self, call: Callable[..., Source], *options: str) -> None:
        self._call = call
        self.options = options

    def __call__(self, source: Any, **options: Any) -> Source:
        return self._call(source, **options)


_TABLE = ("columns", "types", "stack", "nulls")


def _opener(source: Any) -> _Opener:
    if isinstance(source, Source):
        return _Opener(lambda value: value)
    if isinstance(source, str | os.PathLike):
        return _file(as_path(source, what="the source"))
    if isinstance(source, np.ndarray | Tensor):
        return _Opener(lambda value: ArraySource({"x": value}))
    if isinstance(source, Mapping):
        return _Opener(ArraySource)
    # Only a caller who imported them can have made one.
    if (pandas := sys.modules.get("pandas")) and isinstance(source, pandas.DataFrame):
        from lightning_secure.data.sources.tables import pandas_source

        return _Opener(pandas_source, *_TABLE)
    if (arrow := sys.modules.get("pyarrow")) and isinstance(
        source, arrow.Table | arrow.RecordBatch | arrow.RecordBatchReader
    ):
        from lightning_secure.data.sources.tables import table_source

        return _Opener(table_source, *_TABLE)
    if isinstance(source, Dataset):
        return _Opener(DatasetSource, "names")
    if isinstance(source, Iterable):
        return _Opener(RowSource)
    raise ConfigError(
        f"a {type(source).__name__} cannot be sealed: give columns, rows, a table, a torch Dataset "
        "or a path. Nothing was sealed."
    )


def _file(path: Path) -> _Opener:
    name = path.name.lower()
    if path.is_file() and name.endswith((".csv", ".csv.gz")):
        from lightning_secure.data.sources.tables import csv_source

        return _Opener(lambda _, **options: csv_source(path, **options), *_TABLE)
    if name.endswith(".parquet") if path.is_file() else any(path.glob("*.parquet")):
        from lightning_secure.data.sources.tables import parquet_source

        return _Opener(lambda _, **options: parquet_source(path, **options), *_TABLE)
    if path.is_dir():
        from lightning_secure.data.sources.images import ImageFolderSource

        return _Opener(lambda _, **options: ImageFolderSource(path, **options), "decode", "size")
    raise ConfigError(
        f"{str(path)!r} cannot be sealed: it is no .csv or .parquet file, and no folder. Nothing "
        "was sealed."
    )
