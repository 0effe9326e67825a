"""The end of writers: the splits of several appear together, in one generation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Protocol

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.data.manifests.new_split import NewSplit


class ClosingWriter(Protocol):
    """The part of a split's writer that ending it uses."""

    _split: str

    def _require_owner(self) -> None:
        """Raise ConfigError in a process that was forked from the writer's."""

    def _finish(self) -> NewSplit | None:
        """Take no more rows, and seal those that remain; None if there is nothing to commit."""

    def _commit(self, new: Sequence[NewSplit]) -> Manifest:
        """Put the splits of all writers into the manifest of the dataset."""

    def _send(self, manifest: Manifest, splits: Sequence[str]) -> Manifest:
        """Send the splits of all writers, if the dataset is behind a URL."""

    def _committed(self) -> None:
        """Let go of the shards, which are the manifest's now."""

    def _failed(self, kind: type[BaseException]) -> None:
        """Remove what was written, or keep it to be resumed."""


def close_together(writers: Sequence[ClosingWriter]) -> Manifest:
    """Seal what remains and put the splits of several writers into the manifest at once.

    Args:
        writers: Writers of one dataset with one provider, each of another split, none of them
            closed. They share a spool if the dataset is behind a URL.

    Returns:
        The manifest that is in place now, behind the URL if there is one.

    Raises:
        ConfigError: if a split exists by now and may not be replaced.
        ManifestMismatchError: if the manifest in place is not what was pinned.
        StorageError: if a remote storage did not answer, or refused.

    After an error no split of any of them is in the dataset that was not there before; what
    :meth:`EncryptedShardWriter.close` keeps to be resumed is kept of each.
    """
    first = writers[0]
    for one in writers:
        one._require_owner()
    try:
        ends = [one._finish() for one in writers]
        manifest = first._commit([end for end in ends if end is not None])
    except BaseException as error:  # an interruption leaves no lock or shard behind either
        for one in writers:
            one._failed(type(error))
        raise
    # From here on the manifest names the shards: they are no longer the writers' to remove.
    with contextlib.ExitStack() as held:
        for one in writers:
            held.callback(one._committed)
        return first._send(manifest, [one._split for one in writers])
