"""Commit of a split to a dataset's manifest: whole, under a lock, as one more generation."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_secure.crypto.entries import SplitEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from lightning_secure.crypto.partitions import partition_context
from lightning_secure.crypto.rotation import successor
from lightning_secure.data.manifests.garbage import LOCK_NAME, locked, remove_unnamed, require_files
from lightning_secure.data.manifests.new_split import NewSplit, require_free, with_split
from lightning_secure.data.manifests.rollback_pins import Pins
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
)
from lightning_secure.util import events
from lightning_secure.util.files import exclusive_lock


def open_or_start(
    root: Path, split: str, keys: KeyProvider, *, pins: Pins | None = None
) -> Manifest:
    """Return a dataset's manifest, after starting an empty dataset if there is none.

    The folder of ``split`` is made too.

    Raises:
        ConfigError: if there is no folder and none can be made, or it cannot be written.
        KeyUnavailableError: if the provider has no signing key.
        IntegrityError: if the folder holds a manifest that is not this provider's, or it is not
            what was pinned, or there is none where one was.
    """
    pins = pins or Pins()
    reason, signer = None, keys.signer  # a mere reader is refused before a row is taken
    try:
        if not (root / MANIFEST_NAME).exists():
            pins.check(None, root)  # before a folder is made there
        (root / split).mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / LOCK_NAME):
            if (root / MANIFEST_NAME).exists():
                manifest = read_manifest(root, trusted=keys.trusted_signers)
                pins.check(manifest, root)
                return manifest
            pins.check(None, root)
            manifest = Manifest(
                dataset_id=secrets.token_bytes(16),
                generation=1,
                previous=None,
                created=_now(),
                splits={},
                partitions={},
            )
            write_manifest(root, manifest, signer=signer)
            pins.check(manifest, root)
            return manifest
    except OSError as error:
        reason = error.strerror
    raise ConfigError(
        f"{str(root)!r} cannot hold a dataset ({reason}): it must be a folder, or a path where one "
        "can be made, that this process may write to. Nothing was sealed."
    )


def commit_split(
    root: Path,
    split: str,
    entry: SplitEntry,
    *,
    partitions: Mapping[str, tuple[WrappedKey, ...]],
    keys: KeyProvider,
    replace: bool,
    pins: Pins | None = None,
) -> Manifest:
    """Put one split into the manifest, see :func:`commit_splits`."""
    new = NewSplit(name=split, entry=entry, partitions=partitions)
    return commit_splits(root, [new], keys=keys, replace=replace, pins=pins or Pins())


def commit_splits(
    root: Path, splits: Sequence[NewSplit], *, keys: KeyProvider, replace: bool, pins: Pins
) -> Manifest:
    """Put splits into the manifest, all in one generation, and remove files of replaced ones.

    Args:
        root: The dataset's folder.
        splits: The sealed splits.
        keys: Signs the manifest.
        replace: Whether splits of these names may be replaced.
        pins: What the manifest in place is compared with, under the lock.

    Raises:
        ConfigError: if one of the splits exists by now and may not be replaced. The dataset is as
            it was.
        ManifestMismatchError: if the manifest in place is not what was pinned, or is older than one
            that was seen. The dataset is as it was.
        AuditWriteError: if a listener could not record it. The dataset is as it was.
        KeyUnavailableError: if the key that the split was sealed under was destroyed meanwhile, or
            cannot be used now. The dataset is as it was.
    """
    with locked(root, LOCK_NAME):
        current = read_manifest(root, trusted=keys.trusted_signers)
        pins.check(current, root)
        joined = current
        for new in splits:
            require_free(joined, root, new.name, replace=replace, partitions=new.partitions.keys())
            _require_openable(current, new, keys)
            joined = with_split(joined, new)
        manifest = successor(current, joined)
        for new in splits:
            events.announce(
                "data.seal",
                {
                    "dataset": manifest.dataset_id.hex(),
                    "split": new.name,
                    "generation": manifest.generation,
                    "records": new.entry.records,
                    "shards": len(new.entry.shards),
                    "manifest": manifest.digest,
                },
            )
        for new in splits:
            require_files(root, new.entry.files)
        write_manifest(root, manifest, signer=keys.signer)
    # From here on the new manifest stands, whatever happens; old files go last.
    remove_unnamed(root, current.files - manifest.files, keys=keys)
    return manifest


def _require_openable(manifest: Manifest, new: NewSplit, keys: KeyProvider) -> None:
    """Refuse a split that could never be read, while its source may still be there."""
    reason = ""
    try:
        name = new.entry.partition
        context = partition_context(manifest.dataset_id, name)
        keys.confirm(new.partitions[name], context=context)
    except (KeyAccessError, IntegrityError) as error:
        reason = str(error)
    if reason:
        raise KeyUnavailableError(
            f"split {new.name!r} was sealed under key {keys.key_id!r}, which does not open it "
            f"any more ({reason.rstrip('.')}). It was not put into the dataset: keep its source. "
            "If the key was destroyed, seal it anew under another; if it is only away, call again "
            "with resume=True once it is back."
        )


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
