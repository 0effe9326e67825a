"""The end of writers: the splits of several appear together, in one generation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.data.manifests.commit import commit_splits

if TYPE_CHECKING:
    from lightning_secure.data.writing.writer import EncryptedShardWriter

__all__ = ["close_together"]


def close_together(writers: Sequence[EncryptedShardWriter]) -> Manifest:
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
    for one in writers:
        one._closed = True
    try:
        ends = [one._ended() for one in writers if not one.complete]
        new = [end for end in ends if end is not None]
        if new:
            manifest = commit_splits(
                first._root, new, keys=first._keys, replace=first._replace, pins=first._pins
            )
        else:
            manifest = first._open_dataset()  # others may have written since it was opened
    except BaseException as error:  # an interruption leaves no lock or shard behind either
        for one in writers:
            one._leave(type(error))
        raise
    # From here on the manifest names the shards: they are no longer the writers' to remove.
    with contextlib.ExitStack() as held:
        for one in writers:
            one._over = True
            held.callback(one._release, keep=False)
        if first._spool:
            manifest = first._spool.send([one._split for one in writers])
    return manifest
