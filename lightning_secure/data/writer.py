"""Sealing: rows go in, encrypted shards and one signed manifest come out."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import NAME_PATTERN, Manifest, ShardEntry, SplitEntry
from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from lightning_secure.data.columns import (
    convert_column,
    count_rows,
    infer_column,
    joined,
    require_names,
)
from lightning_secure.data.format import ColumnData, Schema, segment_lengths
from lightning_secure.data.generations import commit_split, open_or_start, require_free
from lightning_secure.data.resume import SealingState
from lightning_secure.data.sealing import ShardPool, ShardQueue
from lightning_secure.data.shard import seal_shard
from lightning_secure.data.storage import Storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.data.storage.upload import open_spool
from lightning_secure.errors import ConfigError, DataError, LightningSecureError
from lightning_secure.redaction.anonymize import AnonymizationPlan

__all__ = ["EncryptedShardWriter"]


class EncryptedShardWriter:
    """Seals the rows of one split.

    Args:
        root: The dataset's folder, made if it does not exist, an fsspec URL such as
            ``s3://bucket/dataset``, or a :class:`RemoteStorage`. Splits of one dataset share it.
        split: Name of the split, for example ``train``.
        keys: Guards the key under which the split is sealed, and signs the manifest.
        segment_bytes: Plaintext length of a segment, in bytes. One segment is read to get any of
            its rows: small ones suit random access, large ones streaming.
        shard_bytes: Plaintext held in memory, and so the size of a shard, in bytes.
        schema: The columns. By default they are read off the first row.
        anonymize: What happens to identifying columns before a row is encrypted.
        allow_nonfinite: Whether NaN and infinities are sealed rather than refused.
        replace: Whether an existing split of this name may be replaced.
        storage_options: For a URL, see :class:`RemoteStorage`.
        spool: For a URL, the folder that the split is sealed in before it is sent, see
            :func:`upload_split`. It is kept; a temporary one, the default, is not.
        threads: How many shards are encrypted and written side by side, each a copy of
            ``shard_bytes`` in memory; or a pool that several writers share.
        source_id: Names the state of what the rows come from, for example a version or a digest.
            With it the sealing can be resumed after a crash, by a call with the same arguments.
            On the way to a URL that takes a ``spool`` which is kept.
        resume: Whether to go on from the last shard that such a sealing finished. ``records`` then
            says how many rows are sealed already: the caller goes on with the next. If there is
            nothing to go on from, the sealing begins.
        remarks: Goes into the signed manifest: where the rows come from, what was done to them.

    Raises:
        ConfigError: An argument is wrong, the split exists, the folder cannot be written, or what
            would be resumed was sealed from another source or with other arguments.
        KeyUnavailableError: The provider has no signing key, so it cannot seal.
        IntegrityError: The folder holds a manifest that is not this provider's, or what would be
            resumed is not what this provider's holder left.
        StorageError: A remote storage did not answer, or refused.

    Use it as a context manager. The rows can be read once the block has ended without an error;
    until then, and for good after an error or a crash, they are in no manifest and nobody reads
    them. No plaintext is written at any time.

        with EncryptedShardWriter("shards", split="train", keys=keys) as writer:
            for row in rows:
                writer.write({"x": row.features, "y": row.label})
    """

    #: Number of the first shard; those who seal parts of one split have ranges of their own.
    _first_number = 0

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        split: str,
        keys: KeyProvider,
        segment_bytes: int = 65536,
        shard_bytes: int = 64 * 1024 * 1024,
        schema: Schema | None = None,
        anonymize: AnonymizationPlan | None = None,
        allow_nonfinite: bool = False,
        replace: bool = False,
        storage_options: Options | None = None,
        spool: str | os.PathLike[str] | None = None,
        threads: int | ShardPool = 1,
        source_id: str | None = None,
        resume: bool = False,
        remarks: Mapping[str, str] | None = None,
    ) -> None:
        if not NAME_PATTERN.fullmatch(split):
            raise ConfigError(
                f"split={split!r} is not a name of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        if segment_bytes < 1 or shard_bytes < segment_bytes:
            raise ConfigError("segment_bytes must be positive and shard_bytes no smaller.")
        if resume and source_id is None:
            raise ConfigError(
                "resume=True needs source_id=, which names the state of the source: without it "
                "nobody can tell whether the remaining rows belong to those that are sealed."
            )
        self._root, self._spool = open_spool(
            root,
            split=split,
            keys=keys,
            replace=replace,
            storage_options=storage_options,
            folder=spool,
        )
        self._split = split
        self._keys = keys
        self._signer = keys.signer  # whoever may only read is refused before a row is taken
        self._segment_bytes = segment_bytes
        self._shard_bytes = shard_bytes
        self._schema = schema
        self._plan = anonymize
        self._anonymizer = anonymize.bind(keys) if anonymize else None
        self._allow_nonfinite = allow_nonfinite
        self._replace = replace
        self._remarks = {**(remarks or {}), **_described(anonymize)}

        self._folder = self._root / split
        self._pool = threads if isinstance(threads, ShardPool) else ShardPool(threads)
        self._own_pool = self._pool is not threads
        dataset = self._open_dataset()
        self._dataset_id = dataset.dataset_id
        if not resume:
            require_free(dataset, self._root, self._split, replace=self._replace)
        self._state = self._begin(dataset, source_id, resume=resume)
        self._schema = self._state.schema or schema
        self._queue = ShardQueue(self._pool, entries=self._state.shards, on_done=self._state.done)
        self._begun_rows = sum(entry.records for entry in self._state.shards)
        self._parts: list[Mapping[str, ColumnData]] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._closed = self._over = False

    @property
    def records(self) -> int:
        """Rows taken so far, with those of the sealing that is resumed."""
        return self._begun_rows + self._pending_rows

    @property
    def complete(self) -> bool:
        """Whether the split was found sealed to its end, from this source: nothing is to do."""
        return self._state.complete

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            row: A value for each column: a number, text, bytes, an array or a tensor.

        Raises:
            DataError: A column is missing or unknown, or a value does not fit. The row was not
                taken; those before it were.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"a row is a mapping of values by column, not a {type(row).__name__}.")
        self.write_batch({name: [value] for name, value in row.items()})

    def write_batch(self, columns: Mapping[str, Any]) -> None:
        """Take many rows at once, which is much faster.

        Args:
            columns: For each column its values: arrays or tensors of shape ``(rows, *shape)``, or
                sequences.

        Raises:
            DataError: As for :meth:`write`. None of the rows was taken.
        """
        self.take(columns, copy=True)

    def take(self, columns: Mapping[str, Any], *, copy: bool) -> None:
        """Take many rows, which the caller will not change if they need not be copied.

        Args:
            columns: As for :meth:`write_batch`.
            copy: Whether the memory may be used for something else after the call.

        Raises:
            DataError: As for :meth:`write_batch`.
        """
        if self._closed or self._state.complete:
            raise ConfigError("the writer is closed; its split is sealed and does not grow.")
        rows = count_rows(columns)
        if rows == 0:
            return
        if self._anonymizer is not None:
            columns = self._anonymizer.apply(columns)
        schema = self._schema or Schema(
            tuple(infer_column(name, values) for name, values in columns.items())
        )
        require_names(columns.keys(), schema.names)
        part = {
            column.name: convert_column(
                column,
                columns[column.name],
                allow_nonfinite=self._allow_nonfinite,
                first_row=self.records,
                copy=copy,
            )
            for column in schema.columns
        }
        length_of = segment_lengths(schema, part)
        if length_of(0, rows) > MAX_SEGMENT_BYTES:
            longest = max(length_of(row, row + 1) for row in range(rows))
            if longest > MAX_SEGMENT_BYTES:
                raise DataError(
                    f"a row takes {longest} bytes, and a segment can have {MAX_SEGMENT_BYTES}. "
                    "Nothing of this call was sealed. Split the row, or store a reference to it."
                )
        self._schema = schema
        self._parts.append(part)
        self._pending_rows += rows
        self._pending_bytes += length_of(0, rows)
        if self._pending_bytes >= self._shard_bytes:
            self._seal_pending(schema, last=False)

    def close(self) -> None:
        """Seal the remaining rows and put the split into the manifest.

        After an error the dataset is as it was. What a sealing with a ``source_id`` finished is
        kept to be resumed, unless the error lies in the rows or the keys.

        Raises:
            DataError: There is no row. The dataset is as it was.
            ConfigError: Another writer sealed the same split meanwhile. Its rows stand.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if not self._state.complete:
                self._finish()
        except BaseException as error:
            self._leave(type(error))
            raise
        # From here on the manifest names the shards: they are no longer this writer's to remove.
        self._over = True
        try:
            if self._spool:
                self._spool.send()
        finally:
            self._release(keep=False)

    def _finish(self) -> None:
        if self._schema is None or self.records == 0:
            raise DataError(
                f"split {self._split!r} got no rows, and an empty split is most often a "
                "mistake upstream. The dataset was left as it was."
            )
        if self._pending_rows:
            self._seal_pending(self._schema, last=True)
        self._commit(self._schema, self._queue.finish())

    def abort(self) -> None:
        """Give up: remove what was written. The dataset is as it was before this writer.

        What :meth:`close` put into the dataset stays there.
        """
        self._end(keep=False)

    def suspend(self) -> None:
        """Stop, and keep what was finished for a sealing with ``resume=True``.

        Without a ``source_id`` nothing can be resumed, and this is :meth:`abort`.
        """
        self._end(keep=self._state.resumable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self._leave(kind)

    def _leave(self, kind: type[BaseException]) -> None:
        # Rows or keys that were refused are refused again; an interruption is not.
        if issubclass(kind, LightningSecureError):
            self.abort()
        else:
            self.suspend()

    def _seal_pending(self, schema: Schema, *, last: bool) -> None:
        columns = {name: joined([part[name] for part in self._parts]) for name in schema.names}
        self._parts = []
        rows, start = self._pending_rows, 0
        # A segment has one row at least, so that many rows never need too many segments.
        per_shard = max(1, rows * self._shard_bytes // max(1, self._pending_bytes))
        per_shard = min(per_shard, MAX_SEGMENTS)
        while rows - start >= per_shard or (last and start < rows):
            stop = min(start + per_shard, rows)
            number = self._first_number + self._queue.begun
            self._queue.add(
                functools.partial(
                    seal_shard,
                    self._folder,
                    {name: values[start:stop] for name, values in columns.items()},
                    records=stop - start,
                    schema=schema,
                    dataset_id=self._dataset_id,
                    number=number,
                    segment_bytes=self._segment_bytes,
                    partition=self._state.partition,
                    uuid=self._state.start(number, schema),
                )
            )
            self._begun_rows += stop - start
            start = stop
        # Cloned, so that the rest of a large batch does not keep all of it in memory.
        rest = {
            name: values[start:].clone() if isinstance(values, Tensor) else values[start:]
            for name, values in columns.items()
        }
        self._parts = [rest] if start < rows else []
        self._pending_rows = rows - start
        self._pending_bytes = segment_lengths(schema, rest)(0, rows - start)

    def _open_dataset(self) -> Manifest:
        return open_or_start(self._root, self._split, self._keys)

    def _begin(self, dataset: Manifest, source_id: str | None, *, resume: bool) -> SealingState:
        if source_id is None:
            return SealingState.fresh(dataset, self._folder, self._keys)
        return SealingState.written_down(
            dataset,
            self._folder,
            self._keys,
            source_id=source_id,
            settings=self._settings(),
            resume=resume,
            replace=self._replace,
        )

    def _settings(self) -> dict[str, Any]:
        """Return all that decides what rows and shards come of a source, as JSON values."""
        return {
            "segment_bytes": self._segment_bytes,
            "shard_bytes": self._shard_bytes,
            "schema": self._schema.to_json() if self._schema else None,
            "anonymize": self._plan.describe() if self._plan else None,
            "allow_nonfinite": self._allow_nonfinite,
        }

    def _commit(self, schema: Schema, shards: tuple[ShardEntry, ...]) -> None:
        entry = SplitEntry(
            partition=self._split,
            schema=tuple(schema.to_json()),
            shards=shards,
            attributes={**self._remarks, **self._state.attributes},
        )
        commit_split(
            self._root,
            self._split,
            entry,
            partitions={self._split: self._state.wrapped},
            keys=self._keys,
            replace=self._replace,
        )

    def _end(self, *, keep: bool) -> None:
        self._closed = True
        if self._over:
            return
        self._over = True
        self._parts, self._pending_rows, self._pending_bytes = [], 0, 0
        stray = self._queue.stop()
        kept = keep or self._state.complete  # those of a complete split are in the manifest
        for entry in stray if kept else [*self._queue.entries, *stray]:
            with contextlib.suppress(OSError):  # unreadable without a manifest in any case
                (self._root / entry.file).unlink()
        self._release(keep=keep)

    def _release(self, *, keep: bool) -> None:
        self._state.end(keep=keep)
        if self._own_pool:
            self._pool.close()
        if self._spool:
            self._spool.close()


def _described(plan: AnonymizationPlan | None) -> dict[str, str]:
    return {f"anonymize.{name}": text for name, text in plan.describe().items()} if plan else {}
