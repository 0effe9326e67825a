"""The start of a sealing: from nothing, or from the shards that an earlier one finished."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.shards.shard import ShardReader
from lightning_secure.data.storage import LocalStorage
from lightning_secure.data.writing.progress_log import Progress, ProgressLog, source_mark
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.errors import ConfigError, IntegrityError, ShardCorruptedError
from lightning_secure.util import events

#: The split's attribute in the manifest that tells what it was sealed from, see `source_mark`.
SOURCE_ATTRIBUTE: Final = "sealing.source"


class SealingState:
    """The keys, the columns and the finished shards of a sealing that is under way.

    Args:
        partition: Wraps the shards' keys.
        wrapped: The partition's key as the manifest holds it.
        folder: The split's folder.
        journal: Where progress is written down, or None.

    Attributes:
        schema: The columns, if shards were finished before.
        shards: Shards that were finished before.
        complete: Whether the manifest has the split already, sealed from the same source.
        attributes: What the manifest says of the source.
    """

    def __init__(
        self,
        partition: PartitionKey,
        wrapped: tuple[WrappedKey, ...],
        *,
        folder: Path,
        journal: ProgressLog | None = None,
    ) -> None:
        self.partition = partition
        self.wrapped = wrapped
        self.schema: Schema | None = None
        self.shards: tuple[ShardEntry, ...] = ()
        self.complete = False
        self.attributes: Mapping[str, str] = {}
        self._folder = folder
        self._journal = journal

    @classmethod
    def fresh(cls, dataset: Manifest, folder: Path, keys: KeyProvider) -> SealingState:
        """Return the state of a sealing that is not written down and cannot be resumed."""
        return cls(*PartitionKey.create(dataset.dataset_id, folder.name, keys), folder=folder)

    @classmethod
    def written_down(
        cls,
        dataset: Manifest,
        folder: Path,
        keys: KeyProvider,
        options: SealOptions,
        *,
        require_free: Callable[[Manifest], None],
    ) -> SealingState:
        """Return the state of a sealing with a journal.

        Args:
            dataset: The dataset's manifest.
            folder: The split's folder.
            keys: Unwraps the split's key to resume, and signs the journal.
            options: Of the sealing, with a ``source_id``. Without ``resume``, the shards of an
                earlier sealing are removed.
            require_free: Raises ConfigError if a split that was sealed from something else is there
                and may not be replaced.

        Raises:
            ConfigError: if the split exists, is being sealed by another writer, or the earlier
                sealing had another source or other settings.
            KeyAccessError: if this provider cannot unwrap what it wrapped: one that seals and does
                not read.
            IntegrityError: if the journal or a shard is not what the earlier sealing left.
        """
        settings, resume = options.settings, options.resume
        identity = canonical_json([options.identity, settings]).decode()
        journal = ProgressLog(folder, keys)
        try:
            if resume and (done := _sealed(dataset, folder, keys, identity)):
                journal.close(remove=True)
                return done
            require_free(dataset)
            earlier = _earlier(journal, strict=resume)
            if earlier is not None and resume:
                return cls._resumed(dataset, folder, keys, journal, earlier, identity, settings)
            if earlier is not None and earlier.dataset_id == dataset.dataset_id:
                earlier.remove_all(folder, keep=_named(dataset))
            state = cls(
                *PartitionKey.create(dataset.dataset_id, folder.name, keys),
                folder=folder,
                journal=journal,
            )
            mark = source_mark(state.partition, identity)
            state.attributes = {SOURCE_ATTRIBUTE: mark}
            journal.begin(
                Progress(
                    dataset_id=dataset.dataset_id,
                    split=folder.name,
                    partitions={folder.name: state.wrapped},
                    settings=settings,
                    source=mark,
                )
            )
        except BaseException:
            journal.close(remove=journal.empty)
            raise
        return state

    @classmethod
    def _resumed(
        cls,
        dataset: Manifest,
        folder: Path,
        keys: KeyProvider,
        journal: ProgressLog,
        earlier: Progress,
        identity: str,
        settings: Mapping[str, Any],
    ) -> SealingState:
        if (earlier.dataset_id, earlier.split) != (dataset.dataset_id, folder.name):
            raise IntegrityError(
                f"the journal in {str(folder)!r} is that of another dataset or split. Nothing was "
                "sealed; start anew with resume=False."
            )
        wrapped = earlier.partitions[folder.name]
        partition = _open(dataset, folder.name, wrapped, keys)
        mark = source_mark(partition, identity)
        if mark != earlier.source:
            changed = sorted(
                name
                for name in settings.keys() | earlier.settings.keys()
                if settings.get(name) != earlier.settings.get(name)
            )
            raise ConfigError(
                f"split {folder.name!r} was begun "
                + (f"with another {', '.join(changed)}" if changed else "from another source")
                + f" and has {sum(entry.records for entry in earlier.shards)} sealed rows; a mix "
                "of both would be no dataset. Nothing was sealed. Give back what it was begun "
                "with, or start anew with resume=False."
            )
        _verify(folder, dataset.dataset_id, partition, earlier)
        earlier.remove_unfinished(folder, keep=_named(dataset))
        state = cls(partition, wrapped, folder=folder, journal=journal)
        state.schema, state.shards = earlier.schema, tuple(earlier.shards)
        state.attributes = {SOURCE_ATTRIBUTE: mark}
        events.announce(
            "data.resume",
            {
                "dataset": dataset.dataset_id.hex(),
                "split": folder.name,
                "records": sum(entry.records for entry in earlier.shards),
                "shards": len(earlier.shards),
            },
        )
        return state

    @property
    def resumable(self) -> bool:
        """Whether what is finished survives an interruption."""
        return self._journal is not None

    def start(self, number: int, schema: Schema) -> bytes:
        """Return the uuid of the next shard, after writing down that its file may appear."""
        uuid = secrets.token_bytes(16)
        if self._journal is not None:
            if self.schema is None:
                self._journal.columns(schema)
            self._journal.start(number, uuid)
        self.schema = schema
        return uuid

    def done(self, entry: ShardEntry) -> None:
        """Write down that a shard is finished, with all before it."""
        if self._journal is not None:
            self._journal.done(entry)

    def end(self, *, keep: bool) -> None:
        """Let go of the journal; it stays only if the sealing shall be resumed."""
        if self._journal is not None:
            self._journal.close(remove=not keep)


def _earlier(journal: ProgressLog, *, strict: bool) -> Progress | None:
    try:
        return journal.read()
    except IntegrityError:
        if strict:
            raise
        return None  # who starts anew does not care for a journal that cannot be believed


def _sealed(
    dataset: Manifest, folder: Path, keys: KeyProvider, identity: str
) -> SealingState | None:
    """Return the state of a split that the manifest has already, from the same source."""
    split = dataset.splits.get(folder.name)
    if split is None or SOURCE_ATTRIBUTE not in split.attributes:
        return None
    partition = dataset.open_partition(split.partition, keys)
    if split.attributes[SOURCE_ATTRIBUTE] != source_mark(partition, identity):
        return None
    state = SealingState(partition, dataset.partitions[split.partition], folder=folder)
    state.schema, state.shards, state.complete = Schema.from_json(split.schema), split.shards, True
    return state


def _open(
    dataset: Manifest, split: str, wrapped: tuple[WrappedKey, ...], keys: KeyProvider
) -> PartitionKey:
    partitions = {split: wrapped}
    return dataclasses.replace(dataset, partitions=partitions).open_partition(split, keys)


def _verify(folder: Path, dataset_id: bytes, partition: PartitionKey, earlier: Progress) -> None:
    for entry in earlier.shards:
        assert earlier.schema is not None  # noqa: S101 # written down before the first shard
        try:
            ShardReader(
                LocalStorage(folder.parent),
                entry,
                key=partition.open(entry),
                schema=earlier.schema,
                dataset_id=dataset_id,
            ).close()
        except ShardCorruptedError as error:
            raise ShardCorruptedError(
                f"{error} The sealing cannot go on from it; start anew with resume=False."
            ) from None


def _named(dataset: Manifest) -> Collection[str]:
    return dataset.files
