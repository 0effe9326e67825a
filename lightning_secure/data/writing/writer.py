"""Sealing: rows go in, encrypted shards and one signed manifest come out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from lightning_secure.anonymize import AnonymizationPlan, AnonymizationReport
from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.crypto.parsing import NAME_PATTERN
from lightning_secure.data.format.columns import ColumnData, Schema
from lightning_secure.data.manifests.commit import commit_splits, open_or_start
from lightning_secure.data.manifests.garbage import remove_unnamed
from lightning_secure.data.manifests.new_split import NewSplit, require_free
from lightning_secure.data.manifests.rollback_pins import ManifestPin, Pins
from lightning_secure.data.storage import Storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.data.writing.close_writers import close_together
from lightning_secure.data.writing.resume import SealingState
from lightning_secure.data.writing.row_buffer import PendingRows
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.shard_queue import ShardPool, ShardQueue
from lightning_secure.data.writing.split_layout import SplitLayout
from lightning_secure.data.writing.spool import open_spool
from lightning_secure.errors import (
    ConfigError,
    DataError,
    KeyUnavailableError,
    LightningSecureError,
)


class SplitWriter:
    """Seals the rows of one split; :class:`EncryptedShardWriter` is its public face.

    Args:
        root: The dataset's folder, URL or storage.
        split: Name of the split.
        keys: Guards the key under which the split is sealed, and signs the manifest.
        options: Everything else, which the splits of one sealing share.
        threads: How many shards are encrypted and written side by side, or a pool.
    """

    #: Number of the first shard; those who seal parts of one split have ranges of their own.
    _first_number = 0

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        split: str,
        keys: KeyProvider,
        options: SealOptions,
        *,
        threads: int | ShardPool = 1,
    ) -> None:
        if not NAME_PATTERN.fullmatch(split):
            raise ConfigError(
                f"split={split!r} is not a name of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        self._layout = SplitLayout(split, options.column_keys or {}, options.subject_column)
        self._pending = PendingRows(self._layout, keys, options)
        pins = Pins(options.pin)
        self._owner = os.getpid()
        self._root, self._spool = open_spool(
            root, split=split, keys=keys, options=options, pins=pins
        )
        self._pins = pins if self._spool is None else Pins()  # a spool has generations of its own
        self._split = split
        self._keys = keys
        self._options = options
        self._remarks = dict(options.remarks or {})
        self._folder = self._root / split
        self._pool = threads if isinstance(threads, ShardPool) else ShardPool(threads)
        self._own_pool = self._pool is not threads
        try:
            self._state = self._start()
        except BaseException:
            if self._spool:
                self._spool.close()
            raise
        self._pending.schema = self._state.schema or options.schema
        self._queue = ShardQueue(self._pool, entries=self._state.shards, on_done=self._state.done)
        self._begun_rows = sum(entry.records for entry in self._state.shards)
        self._pending.unseen = self._begun_rows if options.anonymize and not self.complete else 0
        self._closed = self._over = False

    def _start(self) -> SealingState:
        dataset = self._open_dataset()
        if not self._options.resume:
            self._require_free(dataset)
        state = self._begin(dataset)
        own = (state.partition, state.wrapped)
        self._layout.create_keys(dataset.dataset_id, self._keys, own=own)
        return state

    @property
    def records(self) -> int:
        """Rows taken so far, with those of the sealing that is resumed."""
        return self._begun_rows + self._pending.rows

    @property
    def complete(self) -> bool:
        """Whether the split was found sealed to its end, from this source: nothing is to do."""
        return self._state.complete

    @property
    def report(self) -> AnonymizationReport | None:
        """The report of ``anonymize``; None without it, or if the split was found complete."""
        return None if self.complete else self._pending.report

    @property
    def unseen(self) -> int:
        """The number of rows sealed before that are missing in :attr:`report`."""
        return self._pending.unseen

    def recount(self, columns: Mapping[str, Any]) -> None:
        """Look again at the next :attr:`unseen` rows that are sealed already, for the report.

        Raises:
            DataError: if the rows do not fit the plan, or are more than were sealed.
        """
        self._pending.recount(columns)

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            row: A value for each column: a number, text, bytes, an array or a tensor.

        Raises:
            DataError: if a column is missing or unknown, or a value does not fit. The row was not
                taken; those before it were.

        >>> with EncryptedShardWriter(folder / "data", split="train", keys=keys) as writer:
        ...     for age in (34, 51):
        ...         writer.write({"age": age})
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
            DataError: if a column is missing or unknown, or a value does not fit. None of the rows
                was taken.

        >>> with EncryptedShardWriter(folder / "data", split="train", keys=keys) as writer:
        ...     writer.write_batch({"age": [34, 51], "x": [[0.5, 1.0], [0.0, 2.5]]})
        """
        self.take(columns, copy=True)

    def take(self, columns: Mapping[str, Any], *, copy: bool) -> None:
        """Take many rows, which the caller will not change if they need not be copied.

        Args:
            columns: As for :meth:`write_batch`.
            copy: Whether the memory may be used for something else after the call.

        Raises:
            DataError: if a column is missing or unknown, or a value does not fit. None of the rows
                was taken.
        """
        self._require_owner()
        if self._closed or self.complete:
            raise ConfigError("the writer is closed; its split is sealed and does not grow.")
        self._pending.take(columns, copy=copy, first_row=self.records)
        if self._pending.full:
            self._seal_pending(last=False)

    def close(self) -> None:
        """Seal the remaining rows and put the split into the manifest.

        After an error the dataset is as it was. What a sealing with a ``source_id`` finished is
        kept to be resumed, unless the error lies in the rows.

        Raises:
            DataError: if there is no row. The dataset is as it was.
            KeyUnavailableError: if the key was destroyed meanwhile, or cannot be used now, so that
                the split could not be read. The dataset is as it was: keep the source.
            ConfigError: if another writer sealed the same split meanwhile. Its rows stand.
            ManifestMismatchError: if the manifest in place is not what was pinned, or is older than
                one this writer has seen. The manifest was left as it is.
            StorageError: if a remote storage did not answer, or refused, see :func:`upload_split`.
        """
        if not self._closed:
            close_together([self])

    def _require_owner(self) -> None:
        if os.getpid() != self._owner:
            raise ConfigError(
                f"split {self._split!r} is sealed by process {self._owner}, and this one was "
                "forked from it. Nothing was done. Write and close in that process, or seal "
                "splits of your own."
            )

    def _finish(self) -> NewSplit | None:
        """Seal the remaining rows, and return what the manifest is to say of all of them."""
        self._closed = True
        if self.complete:
            return None
        if self._pending.schema is None or self.records == 0:
            raise DataError(
                f"split {self._split!r} got no rows, and an empty split is most often a mistake "
                "upstream. The dataset was left as it was."
            )
        if self._pending.rows:
            self._seal_pending(last=True)
        return self._new_split(self._pending.schema, self._queue.finish())

    def _commit(self, new: Sequence[NewSplit]) -> Manifest:
        if not new:
            return self._open_dataset()  # others may have written since it was opened
        return commit_splits(
            self._root, new, keys=self._keys, replace=self._options.replace, pins=self._pins
        )

    def _send(self, manifest: Manifest, splits: Sequence[str]) -> Manifest:
        return self._spool.send(splits) if self._spool else manifest

    def _committed(self) -> None:
        self._over = True
        self._release(keep=False)

    def abort(self) -> None:
        """Give up: remove what was written. The dataset is as it was before this writer.

        What :meth:`close` put into the dataset stays there.

        >>> writer = EncryptedShardWriter(folder / "data", split="train", keys=keys)
        >>> writer.write({"age": 34})
        >>> writer.abort()
        >>> list(folder.rglob("*.lsec"))
        []
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
            self._failed(kind)

    def _failed(self, kind: type[BaseException]) -> None:
        # Rows that were refused are refused again; an interruption, or a key that is away, is not.
        if issubclass(kind, LightningSecureError) and not issubclass(kind, KeyUnavailableError):
            self.abort()
        else:
            self.suspend()

    def _seal_pending(self, *, last: bool) -> None:
        if (schema := self._pending.schema) is not None:
            for columns, records, subject in self._pending.portions(schema, last=last):
                self._add(columns, schema, records, subject)

    def _add(
        self,
        columns: Mapping[str, ColumnData],
        schema: Schema,
        records: int,
        subject: bytes | None = None,
    ) -> None:
        number = self._first_number + self._queue.begun // len(self._layout.partitions)
        for task in self._layout.tasks(
            self._folder,
            columns,
            records=records,
            schema=schema,
            number=number,
            segment_bytes=self._options.segment_bytes,
            subject=subject,
            uuid=self._state.start(number, schema),
        ):
            self._queue.add(task)
        self._begun_rows += records

    def _open_dataset(self) -> Manifest:
        return open_or_start(self._root, self._split, self._keys, pins=self._pins)

    def _begin(self, dataset: Manifest) -> SealingState:
        if self._options.source_id is None:
            return SealingState.fresh(dataset, self._folder, self._keys)
        return SealingState.written_down(
            dataset, self._folder, self._keys, self._options, require_free=self._require_free
        )

    def _require_free(self, dataset: Manifest) -> None:
        if self._spool:
            self._spool.require_free(self._layout.partitions)
        require_free(
            dataset,
            self._root,
            self._split,
            replace=self._options.replace,
            partitions=self._layout.partitions,
        )

    def _new_split(self, schema: Schema, shards: tuple[ShardEntry, ...]) -> NewSplit | None:
        attributes = {**self._remarks, **self._pending.remarks, **self._state.attributes}
        entry = self._layout.split_entry(schema, shards, attributes)
        return NewSplit(name=self._split, entry=entry, partitions=self._layout.wrapped)

    def _end(self, *, keep: bool) -> None:
        self._closed = True
        if self._over or os.getpid() != self._owner:
            return  # in a forked child: the shards and locks are its parent's
        self._over = True
        self._pending.forget()
        stray = self._queue.stop()
        # Shards of a split that was found complete are the manifest's, also if it was rolled back.
        mine = stray if keep or self.complete else [*self._queue.entries, *stray]
        # The manifest may be in place already: an interruption can come right after that.
        remove_unnamed(self._root, [entry.file for entry in mine], keys=self._keys)
        self._release(keep=keep)

    def _release(self, *, keep: bool) -> None:
        self._state.end(keep=keep)
        if self._own_pool:
            self._pool.close()
        if self._spool:
            self._spool.close()


class EncryptedShardWriter(SplitWriter):
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
        anonymize: The plan for identifying columns, applied before a row is encrypted.
        allow_nonfinite: Whether NaN and infinities are sealed rather than refused.
        column_keys: For columns that not every reader may see, the name of the key that they are
            sealed under, for example ``{"diagnosis": "sensitive"}``. They lie in shards of their
            own in the partition ``SPLIT.sensitive``; the others in the partition ``SPLIT``. Who
            is given which is up to :func:`~lightning_secure.add_recipient`.
        subject_column: The column that says whose a row is, as text or a whole number. Each
            subject's rows are sealed under keys of its own, so that
            :func:`~lightning_secure.erase_subject` can destroy them. The ids are read
            before ``anonymize`` changes the column. Give rows ordered by subject: each time
            ``shard_bytes`` are full, every subject among them gets a shard, of 4 KiB at least.
        replace: Whether an existing split of this name may be replaced. Its recipients besides
            ``keys`` do not become those of the new one.
        threads: How many shards are encrypted and written side by side, each a copy of
            ``shard_bytes`` in memory; or a pool that several writers share.
        source_id: Names the state of what the rows come from, for example a version or a digest.
            With it the sealing can be resumed after a crash, by a call with the same arguments;
            for a URL, only in a ``spool`` that is kept.
        resume: Whether to go on from the last shard that such a sealing finished. ``records`` then
            says how many rows are sealed already: the caller goes on with the next. If there is
            nothing to go on from, the sealing begins.
        remarks: Goes into the signed manifest: where the rows come from, what was done to them.
            Those whose names begin with ``encrypted.`` are seen by readers of the split only.
        min_generation: The oldest generation of the dataset that is built on. An older state, put
            back in its place, is refused when the sealing begins and again, under the lock, when
            the split is put into the manifest.
        manifest_digest: The only manifest that is built on, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        spool: For a URL, the folder that the split is sealed in before it is sent, see
            :func:`upload_split`. It is kept; a temporary one, the default, is not.

    Raises:
        ConfigError: if an argument is wrong, the split exists, the folder cannot be written, or
            what would be resumed was sealed from another source or with other arguments.
        ManifestMismatchError: if the manifest in place is not what was pinned.
        KeyUnavailableError: if the provider has no signing key, so it cannot seal.
        IntegrityError: if the folder holds a manifest that is not this provider's, or what would be
            resumed is not what this provider's holder left.
        StorageError: if a remote storage did not answer, or refused.

    Use it as a context manager. The rows can be read once the block has ended without an error;
    until then, and for good after an error or a crash, they are in no manifest and cannot be
    read. No plaintext is written at any time.

        with EncryptedShardWriter("shards", split="train", keys=keys) as writer:
            for row in rows:
                writer.write({"x": row.features, "y": row.label})

    >>> with EncryptedShardWriter(folder / "data", split="train", keys=keys) as writer:
    ...     writer.write({"age": 34, "note": "left ear"})
    ...     writer.write_batch({"age": [51, 29], "note": ["right ear", "both"]})
    >>> writer.records
    3
    """

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
        column_keys: Mapping[str, str] | None = None,
        subject_column: str | None = None,
        replace: bool = False,
        threads: int | ShardPool = 1,
        source_id: str | None = None,
        resume: bool = False,
        remarks: Mapping[str, str] | None = None,
        min_generation: int | None = None,
        manifest_digest: str | None = None,
        storage_options: Options | None = None,
        spool: str | os.PathLike[str] | None = None,
    ) -> None:
        options = SealOptions(
            segment_bytes=segment_bytes,
            shard_bytes=shard_bytes,
            schema=schema,
            anonymize=anonymize,
            allow_nonfinite=allow_nonfinite,
            column_keys=column_keys,
            subject_column=subject_column,
            replace=replace,
            source_id=source_id,
            resume=resume,
            remarks=remarks,
            pin=ManifestPin(min_generation, manifest_digest),
            storage_options=storage_options,
            spool=spool,
        )
        super().__init__(root, split, keys, options, threads=threads)
