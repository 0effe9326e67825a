"""The call that turns a source of rows into sealed splits."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_secure.anonymize import AnonymizationPlan, AnonymizationReport
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.format.convert import Ragged, count_rows
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.sources import Source, open_source
from lightning_secure.data.storage import Storage
from lightning_secure.data.storage.opening import local_root
from lightning_secure.data.storage.remote import Options
from lightning_secure.data.writing.close_writers import close_together
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.shard_queue import DEFAULT_THREADS, ShardPool
from lightning_secure.data.writing.split_rules import SplitRule
from lightning_secure.data.writing.spool import remove_own
from lightning_secure.data.writing.writer import SplitWriter
from lightning_secure.errors import ConfigError, DataError

#: Told of the rows taken so far, and of how many there will be if that is known.
Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """The outcome of a sealing.

    Attributes:
        rows: Rows in each split.
        resumed: How many of these an interrupted sealing had sealed before.
        generation: Of the manifest that is in place with them, to be pinned.
        manifest_digest: Of the same.
        reports: The reports of the anonymisation plan, by split; a split that was found
            complete has its report in its attributes only.

    >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> sealed.generation, len(sealed.manifest_digest)
    (2, 64)
    """

    rows: Mapping[str, int]
    resumed: Mapping[str, int]
    generation: int
    manifest_digest: str
    reports: Mapping[str, AnonymizationReport] = field(default_factory=dict)


def seal(
    source: Any,
    root: str | os.PathLike[str] | Storage,
    *,
    keys: KeyProvider,
    split: str | SplitRule = "train",
    segment_bytes: int = 65536,
    shard_bytes: int = 64 * 1024 * 1024,
    schema: Schema | None = None,
    anonymize: AnonymizationPlan | None = None,
    allow_nonfinite: bool = False,
    replace: bool = False,
    threads: int = DEFAULT_THREADS,
    resume: bool = False,
    source_id: str | None = None,
    progress: Progress | None = None,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
    storage_options: Options | None = None,
    spool: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Sealed:
    """Seal all rows of a source.

    Args:
        source: Columns, rows, a table, a torch Dataset or a path, as
            :func:`~lightning_secure.data.sources.open_source` takes them.
        root: The dataset's folder, made if it does not exist, an fsspec URL such as
            ``s3://bucket/dataset``, or a :class:`RemoteStorage`.
        keys: Guards the splits' keys, and signs the manifest.
        split: Name of the split, or a rule that says for each row to which one it goes.
        segment_bytes: Plaintext length of a segment, in bytes; each read of a row reads one.
        shard_bytes: Plaintext length of a shard, in bytes. About ``threads + 2`` shards are in
            memory, and one more for each further split.
        schema: The columns. By default they are read off the first row.
        anonymize: The plan for identifying columns, applied before a row is encrypted.
        allow_nonfinite: Whether NaN and infinities are sealed rather than refused.
        replace: Whether existing splits of these names may be replaced.
        threads: How many shards are encrypted and written side by side.
        resume: Go on where a call with the same arguments, that was killed or interrupted, got to.
        source_id: Names the state of the source where it cannot be told from the source itself,
            which is so for iterators and torch datasets; without it these cannot be resumed.
        progress: Called after each batch with the rows taken so far, and of how many.
        min_generation: The oldest generation of the dataset that is built on.
        manifest_digest: The only manifest that is built on, as SHA-256 in hexadecimal.
        storage_options: For a URL, see :class:`RemoteStorage`.
        spool: For a URL, the folder that the splits are sealed in before they are sent. It is kept,
            and a sealing to a URL can be resumed from it only; a temporary one, the default, is
            not kept.
        options: Of the source, see :func:`~lightning_secure.data.sources.open_source`.

    Raises:
        ConfigError: if an argument is wrong, a split exists, or what would be resumed had another
            source or other arguments.
        DataError: if a row cannot be sealed, or a split got no rows.
        IntegrityError: if the folder or what would be resumed was altered, or the manifest in place
            is not what was pinned.
        MissingExtraError: if the source, or the URL, needs a package that is not installed.
        StorageError: if a remote storage did not answer, or refused.

    Guarantees:
        Rows keep their order within a split. A split is in the manifest with all of its rows, or
        not at all; several splits appear together, in one generation. After an interruption, a
        call with ``resume=True`` yields the rows that one without interruption would have yielded,
        each once. With ``anonymize``, it looks again at those that are sealed, so that the report
        is of all rows.

    >>> from lightning_secure import EncryptedShardDataset
    >>> seal({"age": [34, 51], "ill": [0, 1]}, folder / "data", keys=keys).rows
    {'train': 2}
    >>> EncryptedShardDataset(folder / "data", split="train", keys=keys)[0]
    (tensor(34), tensor(0))
    """
    opened = open_source(source, **options).planned(anonymize)
    identity = _identity(opened, split, source_id)
    if resume and identity is None:
        raise ConfigError(
            "this source cannot tell whether it is what it was, so nothing can be resumed from it: "
            "pass source_id= in the first call and in this one. Nothing was sealed."
        )
    with (
        ShardPool(threads) as pool,
        _one_spool(root, spool) as folder,
        contextlib.ExitStack() as stack,
    ):
        sealing = SealOptions(
            segment_bytes=segment_bytes,
            shard_bytes=shard_bytes,
            schema=schema,
            anonymize=anonymize,
            allow_nonfinite=allow_nonfinite,
            replace=replace,
            source_id=identity,
            resume=resume,
            remarks=opened.remarks,
            pin=ManifestPin(min_generation, manifest_digest),
            storage_options=storage_options,
            spool=folder,
        )

        def writer(name: str) -> SplitWriter:
            return stack.enter_context(SplitWriter(root, name, keys, sealing, threads=pool))

        return _sealed(opened, split, writer, progress)


@contextlib.contextmanager
def _one_spool(
    root: str | os.PathLike[str] | Storage, spool: str | os.PathLike[str] | None
) -> Iterator[str | os.PathLike[str] | None]:
    """Yield the spool; a temporary one for all splits, which otherwise would have one each."""
    if spool is not None or local_root(root) is not None:
        yield spool
        return
    folder, owner = Path(tempfile.mkdtemp(prefix="lightning-secure-")), os.getpid()
    try:
        yield folder
    finally:
        remove_own(folder, owner)


def _sealed(
    source: Source,
    split: str | SplitRule,
    writer: Callable[[str], SplitWriter],
    progress: Progress | None,
) -> Sealed:
    """Seal a source's rows by the writers of its splits, and put these into the manifest."""
    if isinstance(split, str):
        writers = {split: writer(split)}
        resumed = {split: writers[split].records}
        _pour(source, writers[split], progress)
    else:
        writers, resumed = _distribute(source, split, writer, progress)
    empty = [name for name, one in writers.items() if one.records == 0]
    if empty or not writers:
        raise DataError(
            f"the source has no rows for split {', '.join(map(repr, empty)) or '(any)'}, and an "
            "empty split is most often a mistake upstream. The dataset was left as it was."
        )
    manifest = close_together(list(writers.values()))
    return Sealed(
        rows={name: one.records for name, one in writers.items()},
        resumed=resumed,
        generation=manifest.generation,
        manifest_digest=manifest.digest,
        reports={n: report for n, one in writers.items() if (report := one.report) is not None},
    )


def _pour(source: Source, writer: SplitWriter, progress: Progress | None) -> None:
    if writer.complete:
        return
    for columns in source.batches(writer.records - writer.unseen):
        rest = _after_unseen(writer, columns)
        if rest is not None:
            writer.take(rest, copy=False)
            if progress is not None:
                progress(writer.records, source.rows)


def _after_unseen(writer: SplitWriter, columns: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Have rows that are sealed already counted for the report, and return the others."""
    rows = count_rows(columns)
    again = min(writer.unseen, rows)
    if again == 0:
        return columns
    writer.recount({name: values[:again] for name, values in columns.items()})
    return {name: values[again:] for name, values in columns.items()} if again < rows else None


def _distribute(
    source: Source,
    rule: SplitRule,
    writer: Callable[[str], SplitWriter],
    progress: Progress | None,
) -> tuple[dict[str, SplitWriter], dict[str, int]]:
    """Hand each row to its split's writer, but for those that were sealed before."""
    writers: dict[str, SplitWriter] = {}
    resumed: dict[str, int] = {}
    left: dict[str, int] = {}
    row = 0
    for columns in source.batches():
        for name, positions in rule.assign(columns, row).items():
            if name not in writers:
                writers[name] = writer(name)
                resumed[name] = left[name] = writers[name].records
            skip = min(left[name], len(positions))
            left[name] -= skip
            again = skip if writers[name].unseen else 0
            if again or skip < len(positions):
                rest = positions[skip - again :]
                chosen = rule.remaining(columns).items()
                taken = {key: _taken(values, rest) for key, values in chosen}
                if (new := _after_unseen(writers[name], taken)) is not None:
                    writers[name].take(new, copy=False)
        row += count_rows(columns)
        if progress is not None:
            progress(row, source.rows)
    return writers, resumed


def _taken(values: Any, positions: np.ndarray[Any, Any]) -> Any:
    if isinstance(values, Tensor | np.ndarray):
        return values[positions]
    chosen = [values[position] for position in positions.tolist()]
    return Ragged(chosen) if isinstance(values, Ragged) else chosen


def _identity(source: Source, split: str | SplitRule, source_id: str | None) -> str | None:
    told = source_id if source_id is not None else source.identity()
    rule = split if isinstance(split, str) else repr(split)
    return None if told is None else canonical_json([told, rule]).decode()
