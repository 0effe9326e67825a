"""Random access to the rows of an encrypted split."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, Final, TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_secure.anonymize import AnonymizationReport
from lightning_secure.crypto.entries import SplitEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, read_manifest
from lightning_secure.data.format.columns import ColumnData, Schema
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.reading.batch_buffers import Buffers, Ints, Rows
from lightning_secure.data.reading.column_groups import OpenGroups, schema_of
from lightning_secure.data.reading.decode_rows import Filler
from lightning_secure.data.reading.open_shards import ShardSet
from lightning_secure.data.reading.samples import Output, Samples
from lightning_secure.data.reading.threads import threads_to_use
from lightning_secure.data.shards.scratch import Scratch
from lightning_secure.data.storage import CiphertextCache, Storage, open_storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.errors import ConfigError
from lightning_secure.util import events
from lightning_secure.util.agreement import Statement
from lightning_secure.util.validate import whole_number

#: Handing work to another thread costs about as much as decrypting some segments.
_SEGMENTS_A_THREAD: Final = 8
#: Threads that read shorter segments spend more on taking the interpreter from each other.
_WORTH_A_THREAD_BYTES: Final = 16 * 1024


class ReadOptions(TypedDict):
    """The arguments of :class:`EncryptedShardDataset` that all splits of a dataset share."""

    output: Output
    columns: Sequence[str] | None
    threads: int | None
    min_generation: int | None
    manifest_digest: str | None


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
        threads: How many decrypt when many segments are touched; by default one a core, 8 at most.
        min_generation: The oldest generation of the dataset that is accepted.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        cache: For a URL, where downloaded shards are kept, encrypted as they are.

    Raises:
        ManifestMismatchError: if there is no manifest, it is not signed by a trusted key, or it is
            not what was pinned.
        WrongKeyError: if the split, or a wanted column, was sealed for another key. The message
            says which ``columns`` can be read.
        ConfigError: if there is no such split or column, or the URL is not accepted.
        StorageError: if a remote storage did not answer, or refused.

    A row is returned only after the segment it lies in was authenticated. A storage administrator
    can put an older, complete state of the dataset in place of the current one; only
    ``min_generation`` or ``manifest_digest``, kept elsewhere, shows that.

    It pickles without keys: a worker process asks the key provider for itself. Workers started by
    ``fork`` copy the whole memory of their parent, keys included; the default of no workers needs
    no such copy and is not slower, because decryption is not what takes the time.

    >>> from lightning_secure import seal
    >>> _ = seal({"age": [34, 51], "note": ["left", "right"]}, folder / "data", keys=keys)
    >>> dataset = EncryptedShardDataset(folder / "data", split="train", keys=keys, output="dict")
    >>> len(dataset), dataset[1]
    (2, {'age': tensor(51), 'note': 'right'})
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        split: str,
        keys: KeyProvider,
        output: Output = "tuple",
        columns: Sequence[str] | None = None,
        threads: int | None = None,
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
        self._columns = _distinct(columns)
        self._threads = threads_to_use(threads)
        self._pin = ManifestPin(min_generation, manifest_digest)
        self._open()

    def _open(self) -> None:
        manifest = read_manifest(self._storage, trusted=self._keys.trusted_signers)
        self._pin.check(manifest)
        if self._split not in manifest.splits:
            known = ", ".join(repr(name) for name in manifest.splits) or "none yet"
            raise ConfigError(
                f"{str(self._storage)!r} has no split {self._split!r}; its splits are: {known}. A "
                "split appears when its sealing ends without an error."
            )
        entry = manifest.splits[self._split]
        self._manifest = manifest
        self._schema = schema_of(entry)
        self._names = self._schema.names if self._columns is None else self._columns
        if unknown := set(self._names) - set(self._schema.names):
            raise ConfigError(
                f"split {self._split!r} has no column {sorted(unknown)}; its columns are "
                f"{list(self._schema.names)}."
            )
        groups = OpenGroups(manifest, self._split, self._keys, names=self._names)
        self._groups = groups
        self._shards = ShardSet(self._storage, groups)
        self._filler = Filler(groups.schemas, self._names)
        self._buffers = Buffers()
        self._scratch = Scratch()
        self._executor: tuple[int, ThreadPoolExecutor] | None = None
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
        """The verified manifest.

        >>> from lightning_secure import seal
        >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
        >>> dataset = EncryptedShardDataset(folder / "data", split="train", keys=keys)
        >>> dataset.manifest.digest == sealed.manifest_digest
        True
        """
        return self._manifest

    @property
    def entry(self) -> SplitEntry:
        """The split's part of the manifest."""
        return self._manifest.splits[self._split]

    @property
    def attributes(self) -> Mapping[str, str]:
        """The sealer's remarks on the rows, decrypted where the manifest holds them encrypted.

        For example ``classes.label``, the names of an image folder's classes as a JSON list.
        Encrypted remarks are absent if none of the columns under the split's own key is read.

        Raises:
            IntegrityError: if an attribute was altered, or its key was exchanged by a version of
                this package that did not know of it.

        >>> from lightning_secure import EncryptedShardWriter
        >>> remarks = {"source": "clinic"}
        >>> with EncryptedShardWriter(folder, split="train", keys=keys, remarks=remarks) as writer:
        ...     writer.write({"age": 34})
        >>> EncryptedShardDataset(folder, split="train", keys=keys).attributes["source"]
        'clinic'
        """
        return self._groups.attributes

    @property
    def anonymization_report(self) -> AnonymizationReport | None:
        """The anonymisation report of the split's sealing; None if there was no plan.

        Its digest stands in the clear in the signed manifest, as the attribute
        ``anonymization.report.sha256``, and the report itself encrypted, for readers of the split.

        Raises:
            IntegrityError: if an attribute was altered.

        >>> from lightning_secure import AnonymizationPlan, Suppress, seal
        >>> plan = AnonymizationPlan({"name": Suppress()})
        >>> _ = seal({"name": ["jo"], "age": [34]}, folder / "data", keys=keys, anonymize=plan)
        >>> dataset = EncryptedShardDataset(folder / "data", split="train", keys=keys)
        >>> {name: column.done for name, column in dataset.anonymization_report.columns.items()}
        {'name': 'suppress', 'age': 'nothing'}
        """
        return AnonymizationReport.of(self.attributes)

    @property
    def schema(self) -> Schema:
        """The split's columns.

        >>> from lightning_secure import seal
        >>> _ = seal({"age": [34, 51], "note": ["left", "right"]}, folder / "data", keys=keys)
        >>> EncryptedShardDataset(folder / "data", split="train", keys=keys).schema.names
        ('age', 'note')
        """
        return self._schema

    @property
    def shards(self) -> ShardSet:
        """The split's shards."""
        return self._shards

    @property
    def filler(self) -> Filler:
        """Copies the chosen columns out of segments."""
        return self._filler

    @property
    def output(self) -> Output:
        """Whether a sample is a tuple or a dict."""
        return self._output

    def rows_statement(self) -> Statement:
        """Return what the rows, their order and the form of a sample follow from."""
        manifest = self._manifest
        return {
            "the dataset's id": manifest.dataset_id.hex(),
            "the generation": str(manifest.generation),
            "the split": self._split,
            "the rows": self.entry.content_digest,
            "the manifest's digest": manifest.digest,
            "the columns": ", ".join(self._names),
            "output=": self._output,
        }

    def __len__(self) -> int:
        return self._shards.rows

    def __getitem__(self, index: int) -> Any:
        """Return one sample.

        Raises:
            ConfigError: if ``index`` is no whole number.
            IndexError: if there is no such row.
            ShardCorruptedError: if the row's shard or segment was altered.
        """
        shard, segment, row = (int(part[0]) for part in self._shards.locate(self._rows([index])))
        columns = self._segment(shard, segment)
        # Copies: a view would keep the whole segment in memory for one row.
        values: dict[str, Any] = {
            name: [value.clone() if isinstance(value, Tensor) else value]
            for name in self._names
            for value in (columns[name][row],)
        }
        return Samples(values, self._output)[0]

    def __getitems__(self, indices: Sequence[int]) -> Samples:
        """Return many samples, decrypting each segment that they touch once.

        Args:
            indices: Row numbers, in any order and with repetitions.

        Returns:
            The samples in the order of ``indices``.

        Raises:
            IndexError: if there is no such row.
            ShardCorruptedError: if a shard or segment was altered. No sample is returned.
        """
        numbers = self._rows(indices)
        result = Rows(self._filler.columns, len(numbers), self._buffers)
        targets = np.argsort(numbers, kind="stable")
        for low, high in self._shards.stretches(numbers[targets]):
            self._fill(result, targets[low:high], numbers[targets[low:high]])
        return Samples(result.values, self._output)

    def _fill(self, result: Rows, targets: Ints, numbers: Ints) -> None:
        """Put rows, whose numbers are in order, where they belong."""
        shards, segments, rows = self._shards.locate(numbers)
        new = (np.diff(shards, prepend=-1) != 0) | (np.diff(segments, prepend=-1) != 0)
        bounds = [*np.flatnonzero(new).tolist(), len(numbers)]
        others_begin = np.flatnonzero(np.diff(shards)) + 1

        def fill(first: int, last: int) -> None:
            start, stop = bounds[first], bounds[last]
            inner = others_begin[(others_begin > start) & (others_begin < stop)].tolist()
            for low, high in pairwise([start, *inner, stop]):
                self._filler.gather(
                    result,
                    self._shards.reader(int(shards[low])),
                    segments[low:high],
                    self._scratch,
                    targets[low:high],
                    rows[low:high],
                )

        parts = len(bounds) - 1
        threads = min(self._threads, parts // _SEGMENTS_A_THREAD)
        touched = [self._shards.entries[shard] for shard in set(shards.tolist())]
        if all(entry.size < entry.segments * _WORTH_A_THREAD_BYTES for entry in touched):
            threads = 1
        if threads < 2:
            if parts:
                fill(0, parts)
        else:
            cuts = [parts * number // threads for number in range(threads + 1)]
            # The calling thread takes a part as well.
            others = [self._pool().submit(fill, first, last) for first, last in pairwise(cuts[1:])]
            try:
                fill(0, cuts[1])
            finally:
                wait(others)
            for other in others:
                other.result()

    def _rows(self, indices: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        rows = np.asarray(indices)
        if rows.dtype.kind not in "iu":
            # Not by numpy, which would take 1.9 and True for row 1.
            found = [None if rows.dtype.kind == "b" else whole_number(index) for index in indices]
            if None in found:
                raise ConfigError("row indices must be whole numbers. Nothing was read.")
            rows = np.asarray(found, dtype=object)
        # Before it becomes int64, which would take 2**64 - 1 for the last row.
        if rows.size and not (rows.min() >= -len(self) and rows.max() < len(self)):
            raise IndexError(f"split {self._split!r} has rows 0 to {len(self) - 1}")
        rows = rows.astype(np.int64)
        return np.where(rows < 0, rows + len(self), rows)

    def _segment(self, shard: int, segment: int) -> dict[str, ColumnData]:
        # One segment is kept, so that reading row by row in order does not decrypt it each time.
        recent = self._recent
        if recent is None or recent[0] != (shard, segment):
            self._recent = None
            columns = self._shards.reader(shard).read_segment(segment)
            self._recent = recent = (shard, segment), columns
        return recent[1]

    def _pool(self) -> ThreadPoolExecutor:
        # A forked worker has the executor of its parent, and none of its threads.
        if self._executor is None or self._executor[0] != os.getpid():
            self._executor = (
                os.getpid(),
                ThreadPoolExecutor(self._threads, thread_name_prefix="lightning-secure"),
            )
        return self._executor[1]

    def close(self) -> None:
        """Release files and threads. They are opened again when a row is asked for."""
        self._recent = None
        self._shards.close()
        if self._executor is not None and self._executor[0] == os.getpid():
            self._executor[1].shutdown()
        self._executor = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_storage": self._storage,
            "_split": self._split,
            "_keys": self._keys,
            "_output": self._output,
            "_columns": self._columns,
            "_threads": self._threads,
            # The copy reads the bytes that this one verified, or none.
            "_pin": ManifestPin(self._pin.min_generation, self._manifest.digest),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _distinct(columns: Sequence[str] | None) -> tuple[str, ...] | None:
    if columns is None:
        return None
    if isinstance(columns, str) or not columns or len(set(columns)) != len(columns):
        raise ConfigError(
            f"columns={columns!r} is not a sequence of different names; leave it out to get all."
        )
    return tuple(columns)
