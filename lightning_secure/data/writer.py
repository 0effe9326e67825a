"""Sealing: rows go in, encrypted shards and one signed manifest come out."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import secrets
from collections.abc import Collection, Mapping
from typing import Any, Final, Self

from torch import Tensor

from lightning_secure import events
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    Manifest,
    PartitionKey,
    ShardEntry,
    SplitEntry,
    read_manifest,
    write_manifest,
)
from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from lightning_secure.data.columns import convert_column, count_rows, infer_column, joined
from lightning_secure.data.format import ColumnData, Schema, segment_lengths
from lightning_secure.data.shard import seal_shard
from lightning_secure.data.storage import Storage
from lightning_secure.data.storage.remote import Options
from lightning_secure.data.storage.upload import open_spool
from lightning_secure.errors import ConfigError, DataError
from lightning_secure.files import exclusive_lock
from lightning_secure.redaction.anonymize import AnonymizationPlan

__all__ = ["EncryptedShardWriter"]

_LOCK_NAME: Final = ".lock"


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

    Raises:
        ConfigError: An argument is wrong, or the split exists.
        KeyUnavailableError: The provider has no signing key, so it cannot seal.
        IntegrityError: The folder holds a manifest that is not this provider's.
        StorageError: A remote storage did not answer, or refused.

    Use it as a context manager. The rows can be read once the block has ended without an error;
    until then, and for good after an error or a crash, they are in no manifest and nobody reads
    them. No plaintext is written at any time.

        with EncryptedShardWriter("shards", split="train", keys=keys) as writer:
            for row in rows:
                writer.write({"x": row.features, "y": row.label})
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
        replace: bool = False,
        storage_options: Options | None = None,
        spool: str | os.PathLike[str] | None = None,
    ) -> None:
        if not NAME_PATTERN.fullmatch(split):
            raise ConfigError(
                f"split={split!r} is not a name of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        if segment_bytes < 1 or shard_bytes < segment_bytes:
            raise ConfigError("segment_bytes must be positive and shard_bytes no smaller.")
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

        self._folder = self._root / split
        self._folder.mkdir(parents=True, exist_ok=True)
        self._dataset_id = self._open_dataset().dataset_id
        self._partition, self._wrapped = PartitionKey.create(self._dataset_id, split, keys)
        self._parts: list[Mapping[str, ColumnData]] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._entries: list[ShardEntry] = []
        self._closed = False

    @property
    def records(self) -> int:
        """Rows taken so far."""
        return self._sealed_rows + self._pending_rows

    @property
    def _sealed_rows(self) -> int:
        return sum(entry.records for entry in self._entries)

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row.

        Args:
            row: A value for each column: a number, text, bytes, an array or a tensor.

        Raises:
            DataError: A column is missing or unknown, or a value does not fit. The row was not
                taken; those before it were.
        """
        self.write_batch({name: [value] for name, value in row.items()})

    def write_batch(self, columns: Mapping[str, Any]) -> None:
        """Take many rows at once, which is much faster.

        Args:
            columns: For each column its values: arrays or tensors of shape ``(rows, *shape)``, or
                sequences.

        Raises:
            DataError: As for :meth:`write`. None of the rows was taken.
        """
        if self._closed:
            raise ConfigError("the writer is closed; its split is sealed and does not grow.")
        rows = count_rows(columns)
        if rows == 0:
            return
        if self._anonymizer is not None:
            columns = self._anonymizer.apply(columns)
        schema = self._schema or Schema(
            tuple(infer_column(name, values) for name, values in columns.items())
        )
        if columns.keys() != set(schema.names):
            raise DataError(_name_mismatch(schema, columns.keys()))
        part = {
            column.name: convert_column(
                column,
                columns[column.name],
                allow_nonfinite=self._allow_nonfinite,
                first_row=self.records,
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

        Raises:
            DataError: There is no row. The dataset is as it was.
            ConfigError: Another writer sealed the same split meanwhile. Its rows stand.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._schema is None or self.records == 0:
                raise DataError(
                    f"split {self._split!r} got no rows, and an empty split is most often a "
                    "mistake upstream. The dataset was left as it was."
                )
            if self._pending_rows:
                self._seal_pending(self._schema, last=True)
            self._commit(self._schema)
        except BaseException:
            self._discard()
            raise
        if self._spool:
            try:
                self._spool.send()
            finally:
                self._spool.close()

    def abort(self) -> None:
        """Give up: remove what was written. The dataset is as it was before this writer."""
        self._closed = True
        self._discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _seal_pending(self, schema: Schema, *, last: bool) -> None:
        columns = {name: joined([part[name] for part in self._parts]) for name in schema.names}
        rows, start = self._pending_rows, 0
        # A segment has one row at least, so that many rows never need too many segments.
        per_shard = max(1, rows * self._shard_bytes // max(1, self._pending_bytes))
        per_shard = min(per_shard, MAX_SEGMENTS)
        while rows - start >= per_shard or (last and start < rows):
            stop = min(start + per_shard, rows)
            entry = seal_shard(
                self._folder,
                {name: values[start:stop] for name, values in columns.items()},
                records=stop - start,
                schema=schema,
                dataset_id=self._dataset_id,
                number=len(self._entries),
                segment_bytes=self._segment_bytes,
                partition=self._partition,
            )
            self._entries.append(entry)
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
        """Return the dataset's manifest, after starting an empty one if there is none."""
        with exclusive_lock(self._root / _LOCK_NAME):
            if not (self._root / MANIFEST_NAME).exists():
                manifest = Manifest(
                    dataset_id=secrets.token_bytes(16),
                    generation=1,
                    previous=None,
                    created=_now(),
                    splits={},
                    partitions={},
                )
                write_manifest(self._root, manifest, signer=self._signer)
            else:
                manifest = read_manifest(self._root, trusted=self._keys.trusted_signers)
        self._require_free(manifest)
        return manifest

    def _require_free(self, manifest: Manifest) -> None:
        if self._split in manifest.splits and not self._replace:
            raise ConfigError(
                f"split {self._split!r} of {str(self._root)!r} exists, with "
                f"{manifest.splits[self._split].records} rows, and was left as it is. Choose "
                "another name, or pass replace=True to seal it anew."
            )

    def _commit(self, schema: Schema) -> None:
        with exclusive_lock(self._root / _LOCK_NAME):
            current = read_manifest(self._root, trusted=self._keys.trusted_signers)
            self._require_free(current)
            split = SplitEntry(
                partition=self._split,
                schema=tuple(schema.to_json()),
                shards=tuple(self._entries),
                attributes=_remarks(self._plan),
            )
            manifest = dataclasses.replace(
                current,
                generation=current.generation + 1,
                previous=current.digest,
                created=_now(),
                splits={**current.splits, self._split: split},
                partitions={**current.partitions, self._split: self._wrapped},
            )
            events.announce(
                "data.seal",
                {
                    "dataset": manifest.dataset_id.hex(),
                    "split": self._split,
                    "generation": manifest.generation,
                    "records": split.records,
                    "shards": len(split.shards),
                    "manifest": manifest.digest,
                },
            )
            write_manifest(self._root, manifest, signer=self._signer)
            replaced = current.splits.get(self._split)
        for entry in replaced.shards if replaced else ():
            (self._root / entry.file).unlink(missing_ok=True)

    def _discard(self) -> None:
        self._parts = []
        self._pending_rows = self._pending_bytes = 0
        for entry in self._entries:
            with contextlib.suppress(OSError):  # unreadable without a manifest in any case
                (self._root / entry.file).unlink()
        self._entries = []
        if self._spool:
            self._spool.close()


def _remarks(plan: AnonymizationPlan | None) -> dict[str, str]:
    return {f"anonymize.{name}": text for name, text in plan.describe().items()} if plan else {}


def _name_mismatch(schema: Schema, given: Collection[str]) -> str:
    unknown = ", ".join(repr(name) for name in given if name not in schema.names)
    missing = ", ".join(repr(name) for name in schema.names if name not in given)
    return (
        f"the rows have {'unknown columns ' + unknown if unknown else 'no unknown columns'} and "
        f"{'lack ' + missing if missing else 'lack none'}; the split's columns are fixed by its "
        "first row or its schema. Nothing of this call was sealed."
    )


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
