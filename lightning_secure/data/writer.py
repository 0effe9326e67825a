"""Sealing: rows go in, encrypted shards and one signed manifest come out."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from lightning_secure import events
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    NAME_PATTERN,
    Manifest,
    ShardEntry,
    read_manifest,
    write_manifest,
)
from lightning_secure.crypto.segments import MAX_SEGMENT_BYTES, MAX_SEGMENTS
from lightning_secure.data.columns import convert_column, count_rows, infer_column, joined
from lightning_secure.data.format import ColumnData, Schema, segment_lengths
from lightning_secure.data.layout import SplitLayout
from lightning_secure.data.leftovers import LOCK_NAME, remove_unnamed, require_files
from lightning_secure.data.subjects import by_subject, taken
from lightning_secure.errors import ConfigError, DataError
from lightning_secure.files import exclusive_lock
from lightning_secure.redaction.anonymize import AnonymizationPlan

__all__ = ["EncryptedShardWriter"]


class EncryptedShardWriter:
    """Seals the rows of one split.

    Args:
        root: The dataset's folder, made if it does not exist. Splits of one dataset share it.
        split: Name of the split, for example ``train``.
        keys: Guards the key under which the split is sealed, and signs the manifest.
        segment_bytes: Plaintext length of a segment, in bytes. One segment is read to get any of
            its rows: small ones suit random access, large ones streaming.
        shard_bytes: Plaintext held in memory, and so the size of a shard, in bytes.
        schema: The columns. By default they are read off the first row.
        anonymize: What happens to identifying columns before a row is encrypted.
        allow_nonfinite: Whether NaN and infinities are sealed rather than refused.
        column_keys: For columns that not every reader may see, the name of the key that they are
            sealed under, for example ``{"diagnosis": "sensitive"}``. They lie in shards of their
            own in the partition ``SPLIT.sensitive``; the others in the partition ``SPLIT``. Who
            is given which is up to :func:`~lightning_secure.data.rotation.add_recipient`.
        subject_column: The column that says whose a row is, as text or a whole number. Each
            subject's rows are sealed under keys of its own, so that
            :func:`~lightning_secure.data.erasure.erase_subject` can destroy them. The ids are read
            before ``anonymize`` changes the column. Give rows ordered by subject: each time
            ``shard_bytes`` are full, every subject among them gets a shard, of 4 KiB at least.
        replace: Whether an existing split of this name may be replaced. Its recipients besides
            ``keys`` do not become those of the new one.

    Raises:
        ConfigError: An argument is wrong, or the split exists.
        IntegrityError: The folder holds a manifest that is not this provider's.

    Use it as a context manager. The rows can be read once the block has ended without an error;
    until then, and for good after an error or a crash, they are in no manifest and nobody reads
    them. No plaintext is written at any time.

        with EncryptedShardWriter("shards", split="train", keys=keys) as writer:
            for row in rows:
                writer.write({"x": row.features, "y": row.label})
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
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
    ) -> None:
        if not NAME_PATTERN.fullmatch(split):
            raise ConfigError(
                f"split={split!r} is not a name of 1 to 64 letters, digits, '.', '_' and '-'."
            )
        if segment_bytes < 1 or shard_bytes < segment_bytes:
            raise ConfigError("segment_bytes must be positive and shard_bytes no smaller.")
        self._root = Path(root)
        self._split = split
        self._keys = keys
        self._segment_bytes = segment_bytes
        self._shard_bytes = shard_bytes
        self._schema = schema
        self._plan = anonymize
        self._anonymizer = anonymize.bind(keys) if anonymize else None
        self._allow_nonfinite = allow_nonfinite
        self._replace = replace
        self._layout = SplitLayout(split, column_keys or {}, subject_column)
        self._pending_subjects: list[bytes] = []

        self._folder = self._root / split
        self._folder.mkdir(parents=True, exist_ok=True)
        self._layout.create_keys(self._open_dataset().dataset_id, keys)
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
        return sum(entry.records for entry in self._entries[:: len(self._layout.partitions)])

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
        subjects = self._layout.subjects_of(columns)
        if self._anonymizer is not None:
            columns = self._anonymizer.apply(columns)
        schema = self._schema or Schema(
            tuple(infer_column(name, values) for name, values in columns.items())
        )
        if columns.keys() != set(schema.names):
            raise DataError(_name_mismatch(schema, columns.keys()))
        self._layout.groups(schema)
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
        self._pending_subjects += subjects
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
        while not self._layout.by_subject and (
            rows - start >= per_shard or (last and start < rows)
        ):
            stop = min(start + per_shard, rows)
            chosen = {name: values[start:stop] for name, values in columns.items()}
            self._seal(chosen, schema, stop - start)
            start = stop
        if self._layout.by_subject:
            for subject, own in by_subject(self._pending_subjects, per_shard):
                chosen = {name: taken(values, own) for name, values in columns.items()}
                self._seal(chosen, schema, len(own), subject)
            self._pending_subjects, start = [], rows
        # Cloned, so that the rest of a large batch does not keep all of it in memory.
        rest = {
            name: values[start:].clone() if isinstance(values, Tensor) else values[start:]
            for name, values in columns.items()
        }
        self._parts = [rest] if start < rows else []
        self._pending_rows = rows - start
        self._pending_bytes = segment_lengths(schema, rest)(0, rows - start)

    def _seal(
        self,
        columns: Mapping[str, ColumnData],
        schema: Schema,
        records: int,
        subject: bytes | None = None,
    ) -> None:
        self._entries += self._layout.seal(
            self._folder,
            columns,
            records=records,
            schema=schema,
            number=len(self._entries) // len(self._layout.partitions),
            segment_bytes=self._segment_bytes,
            subject=subject,
        )

    def _open_dataset(self) -> Manifest:
        """Return the dataset's manifest, after starting an empty one if there is none."""
        with exclusive_lock(self._root / LOCK_NAME):
            if not (self._root / MANIFEST_NAME).exists():
                manifest = Manifest(
                    dataset_id=secrets.token_bytes(16),
                    generation=1,
                    previous=None,
                    created=_now(),
                    splits={},
                    partitions={},
                )
                write_manifest(self._root, manifest, signer=self._keys.signer)
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
        self._layout.require_free(manifest)

    def _commit(self, schema: Schema) -> None:
        with exclusive_lock(self._root / LOCK_NAME):
            current = read_manifest(self._root, trusted=self._keys.trusted_signers)
            self._require_free(current)
            split = self._layout.split_entry(schema, self._entries, _remarks(self._plan))
            replaced = current.splits.get(self._split)
            kept = current.partitions.keys() - set(replaced.partitions if replaced else ())
            manifest = dataclasses.replace(
                current,
                generation=current.generation + 1,
                previous=current.digest,
                created=_now(),
                splits={**current.splits, self._split: split},
                partitions={
                    **{name: current.partitions[name] for name in kept},
                    **self._layout.wrapped,
                },
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
            require_files(self._root, split.files)
            write_manifest(self._root, manifest, signer=self._keys.signer)
        # From here on the new manifest stands, whatever happens; old files go last.
        remove_unnamed(self._root, replaced.files if replaced else (), keys=self._keys)

    def _discard(self) -> None:
        self._parts = []
        self._pending_subjects = []
        self._pending_rows = self._pending_bytes = 0
        # The manifest may be in place already: an interruption can come right after that.
        remove_unnamed(self._root, [entry.file for entry in self._entries], keys=self._keys)
        self._entries = []


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
