"""How a split gets into a dataset's manifest: whole, under a lock, as one more generation."""

from __future__ import annotations

import dataclasses
import datetime as dt
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lightning_secure import events
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitEntry,
    read_manifest,
    write_manifest,
)
from lightning_secure.errors import ConfigError
from lightning_secure.files import exclusive_lock

__all__ = ["commit_split", "open_or_start", "require_free"]

_LOCK_NAME: Final = ".lock"


def open_or_start(root: Path, split: str, keys: KeyProvider) -> Manifest:
    """Return a dataset's manifest, after starting an empty dataset if there is none.

    The folder of ``split`` is made too.

    Raises:
        ConfigError: There is no folder and none can be made, or it cannot be written.
        IntegrityError: The folder holds a manifest that is not this provider's.
    """
    reason = None
    try:
        (root / split).mkdir(parents=True, exist_ok=True)
        with exclusive_lock(root / _LOCK_NAME):
            if (root / MANIFEST_NAME).exists():
                return read_manifest(root, trusted=keys.trusted_signers)
            manifest = Manifest(
                dataset_id=secrets.token_bytes(16),
                generation=1,
                previous=None,
                created=_now(),
                splits={},
                partitions={},
            )
            write_manifest(root, manifest, signer=keys.signer)
            return manifest
    except OSError as error:
        reason = error.strerror
    raise ConfigError(
        f"{str(root)!r} cannot hold a dataset ({reason}): it must be a folder, or a path where one "
        "can be made, that this process may write to. Nothing was sealed."
    )


def require_free(manifest: Manifest, root: Path, split: str, *, replace: bool) -> None:
    """Raise ConfigError if the split exists and may not be replaced."""
    if split in manifest.splits and not replace:
        raise ConfigError(
            f"split {split!r} of {str(root)!r} exists, with {manifest.splits[split].records} rows, "
            "and was left as it is. Choose another name, or pass replace=True to seal it anew."
        )


def commit_split(
    root: Path,
    split: str,
    entry: SplitEntry,
    *,
    partitions: Mapping[str, tuple[WrappedKey, ...]],
    keys: KeyProvider,
    replace: bool,
) -> Manifest:
    """Put a split into the manifest, and remove the files of the one that it replaces.

    Args:
        root: The dataset's folder.
        split: Name of the split.
        entry: Its shards, all of them on the disk.
        partitions: Wrapped forms of the keys that the shards' keys are wrapped under.
        keys: Signs the manifest.
        replace: Whether a split of this name may be replaced.

    Raises:
        ConfigError: The split exists by now and may not be replaced. It stands.
        AuditWriteError: A listener could not record it. The dataset is as it was.
    """
    with exclusive_lock(root / _LOCK_NAME):
        current = read_manifest(root, trusted=keys.trusted_signers)
        require_free(current, root, split, replace=replace)
        manifest = dataclasses.replace(
            current,
            generation=current.generation + 1,
            previous=current.digest,
            created=_now(),
            splits={**current.splits, split: entry},
            partitions={**current.partitions, **partitions},
        )
        events.announce(
            "data.seal",
            {
                "dataset": manifest.dataset_id.hex(),
                "split": split,
                "generation": manifest.generation,
                "records": entry.records,
                "shards": len(entry.shards),
                "manifest": manifest.digest,
            },
        )
        write_manifest(root, manifest, signer=keys.signer)
        replaced = current.splits.get(split)
    for shard in replaced.shards if replaced else ():
        (root / shard.file).unlink(missing_ok=True)
    return manifest


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
