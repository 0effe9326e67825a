"""Random access to the rows of an encrypted split."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_secure import events
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, SplitEntry, read_manifest
from lightning_secure.data.format import ColumnData, Schema
from lightning_secure.data.groups import GroupedReader, OpenGroups, schema_of
from lightning_secure.data.samples import Output, Samples
from lightning_secure.data.shard import ShardReader
from lightning_secure.data.storage import CiphertextCache, Storage, open_storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.errors import ConfigError, ManifestMismatchError

__all__ = ["EncryptedShardDataset", "check_pins"]

_OPEN_SHARDS: Final = 64


class EncryptedShardDataset(Dataset[Any]):
    """A map-style dataset over one split; works with any sampler and any DataLoader.

    Args:
        root: The dataset's folder, an fsspec URL such as ``s3://bucket/dataset``, or a
            :class:`RemoteStorage`.
        split: Name of the split.
        keys: Releases the split's key, with one call when the dataset is made, and one for each
            further group of columns.
        output: ``tuple``: a sample is a tuple in the order of the columns, so ``x, y = batch``
            works. ``dict``: a dict by column name.
        columns: Which columns a sample has, in which order. All by default.
        min_generation: The oldest generation of the dataset that is accepted.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        cache: For a URL, where downloaded shards are kept, encrypted as they are.

    Raises:
        ManifestMismatchError: There is no manifest, it is not signed by a trusted key, or it is
            not what was pinned.
        WrongKeyError: The split, or a wanted column, was sealed for another key. The message says
            which ``columns`` can be read.
        ConfigError: There is no such split or column, or the URL is not accepted.
        StorageError: A remote storage did not answer, or refused.

    A row is returned only after the segment it lies in was authenticated. A storage administrator
    can put an older, complete state of the dataset in place of the current one; only
    ``min_generation`` or ``manifest_digest``, kept elsewhere, shows that.

    It pickles without keys: a worker process asks the key provider for itself. Workers started by
    ``fork`` copy the whole memory of their parent, keys included; the default of no workers needs
    no such copy and is not slower, because decryption is not what takes the time.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        split: str,
        keys: KeyProvider,
        output: Output = "tuple",
        columns: Sequence[str] | None = None,
        min_generation: int | None = None,
        manifest_digest: str | None = None,
        storage_options: Options | None = None,
        cache: CiphertextCache | None = None,
    ) -> None:
        if output not in ("tuple", "dict"):
            raise ConfigError(f"output={output!r} is neither 'tuple' nor 'dict'.")
        self._storage = open_storage(root, storage_options=storage_options, cache=cache)
        self._split = split
        self._keys = keys
        self._output: Output = output
        self._columns = tuple(columns) if columns is not None else None
        self._min_generation = min_generation
        self._manifest_digest = manifest_digest
        self._open()

    def _open(self) -> None:
        manifest = read_manifest(self._storage, trusted=self._keys.trusted_signers)
        check_pins(manifest, self._min_generation, self._manifest_digest)
        if self._split not in manifest.splits:
            known = ", ".join(repr(name) for name in manifest.splits) or "none yet"
            raise ConfigError(
                f"{str(self._storage)!r} has no split {self._split!r}; its splits are: {known}. A "
                "split appears when its sealing ends without an error."
            )
        entry = manifest.splits[self._split]
        self._manifest = manifest
        self._schema = schema_of(entry)
        self._names = self._columns or self._schema.names
        if unknown := set(self._names) - set(self._schema.names):
            raise ConfigError(
                f"split {self._split!r} has no column {sorted(unknown)}; its columns are "
                f"{list(self._schema.names)}."
            )
        self._groups = OpenGroups(manifest, self._split, self._keys, names=self._names)
        self._ends = np.cumsum([shard.records for shard in entry.shards])
        self._readers: OrderedDict[int, ShardReader | GroupedReader] = OrderedDict()
        self._recent: tuple[tuple[int, int], dict[str, ColumnData]] | None = None
        events.announce(
            "data.open",
            {
                "dataset": manifest.dataset_id.hex(),
                "split": self._split,
                "generation": manifest.generation,
                "records": len(self),
                "manifest": manifest.digest,
            },
        )

    @property
    def manifest(self) -> Manifest:
        """The verified manifest."""
        return self._manifest

    @property
    def entry(self) -> SplitEntry:
        """The split's part of the manifest."""
        return self._manifest.splits[self._split]

    @property
    def schema(self) -> Schema:
        """The split's columns."""
        return self._schema

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        """Return one sample.

        Raises:
            IndexError: There is no such row.
            ShardCorruptedError: The row's shard or segment was altered.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """Return many samples, decrypting each segment that they touch once.

        Args:
            indices: Row numbers, in any order and with repetitions.

        Returns:
            The samples in the order of ``indices``.

        Raises:
            IndexError: There is no such row.
            ShardCorruptedError: A shard or segment was altered. No sample is returned.
        """
        rows = self._checked(indices)
        result = self._allocate(len(rows))
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        position = 0
        while position < len(ordered):
            row = int(ordered[position])
            shard = int(np.searchsorted(self._ends, row, side="right"))
            first = int(self._ends[shard - 1]) if shard else 0
            header = self._reader(shard).header
            segment = (row - first) // header.records_per_segment
            start = first + segment * header.records_per_segment
            end = int(np.searchsorted(ordered, start + header.records_in(segment)))
            self._scatter(
                result,
                self._segment(shard, segment),
                targets=order[position:end],
                sources=ordered[position:end] - start,
            )
            position = end
        return Samples(result, self._output)

    def _checked(self, indices: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        rows = np.asarray(indices, dtype=np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"split {self._split!r} has rows 0 to {len(self) - 1}")
        return rows

    def _allocate(self, rows: int) -> dict[str, Any]:
        by_name = dict(zip(self._schema.names, self._schema.columns, strict=True))
        return {
            name: torch.empty((rows, *by_name[name].shape), dtype=by_name[name].torch_dtype)
            if by_name[name].kind == "tensor"
            else [None] * rows
            for name in self._names
        }

    def _scatter(
        self,
        result: dict[str, Any],
        segment: dict[str, ColumnData],
        targets: np.ndarray[Any, np.dtype[np.int64]],
        sources: np.ndarray[Any, np.dtype[np.int64]],
    ) -> None:
        for name, out in result.items():
            values = segment[name]
            if isinstance(values, Tensor):
                out[torch.from_numpy(targets)] = values[torch.from_numpy(sources)]
            else:
                for target, source in zip(targets.tolist(), sources.tolist(), strict=True):
                    value = values[source]
                    # A view would keep the whole segment in memory for one row.
                    out[target] = value.clone() if isinstance(value, Tensor) else value

    def _segment(self, shard: int, segment: int) -> dict[str, ColumnData]:
        # One segment is kept, so that reading row by row in order does not decrypt it each time.
        if self._recent is None or self._recent[0] != (shard, segment):
            self._recent = None
            self._recent = ((shard, segment), self._reader(shard).read_segment(segment))
        return self._recent[1]

    def _reader(self, shard: int) -> ShardReader | GroupedReader:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        reader = self._groups.reader(self._storage, shard)
        self._readers[shard] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)[1].close()
        return reader

    def close(self) -> None:
        """Release the files. They are opened again when a row is asked for."""
        self._recent = None
        while self._readers:
            self._readers.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_storage": self._storage,
            "_split": self._split,
            "_keys": self._keys,
            "_output": self._output,
            "_columns": self._columns,
            "_min_generation": self._min_generation,
            # The copy reads the bytes that this one verified, or none.
            "_manifest_digest": self._manifest.digest,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def check_pins(manifest: Manifest, min_generation: int | None, digest: str | None) -> None:
    """Compare a manifest with what was pinned outside of the storage.

    Raises:
        ManifestMismatchError: It is older than ``min_generation``, or not the one with ``digest``.
    """
    if min_generation is not None and manifest.generation < min_generation:
        raise ManifestMismatchError(
            f"the dataset is at generation {manifest.generation} and generation {min_generation} "
            "or later was pinned: it was rolled back to an older state. Nothing was read."
        )
    if digest is not None and manifest.digest != digest:
        raise ManifestMismatchError(
            f"the manifest has digest {manifest.digest} and {digest} was pinned: the dataset was "
            "changed or rolled back. Nothing was read."
        )
