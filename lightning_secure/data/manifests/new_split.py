"""The check that a manifest has room for a split and its keys, and the manifest with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_secure.crypto.entries import SplitEntry
from lightning_secure.crypto.keys import WrappedKey
from lightning_secure.crypto.manifest import Manifest
from lightning_secure.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NewSplit:
    """A sealed split on its way into the manifest.

    Attributes:
        name: Its name.
        entry: Its shards, all of them on the disk.
        partitions: Wrapped forms of the keys that the shards' keys are wrapped under.
    """

    name: str
    entry: SplitEntry
    partitions: Mapping[str, tuple[WrappedKey, ...]]


def require_free(
    manifest: Manifest,
    root: object,
    split: str,
    *,
    replace: bool,
    partitions: Collection[str] = (),
) -> None:
    """Raise ConfigError if the split, or a partition, is there and may not be replaced.

    Args:
        manifest: What is in place.
        root: Its place, to be named in the error.
        split: Name of the split.
        replace: Whether the split may be there.
        partitions: What else it needs for itself.
    """
    if split in manifest.splits and not replace:
        raise ConfigError(
            f"split {split!r} of {str(root)!r} exists, with {manifest.splits[split].records} rows, "
            "and was left as it is. Choose another name, or pass replace=True to seal it anew."
        )
    for name, other in manifest.splits.items():
        if name != split and (shared := set(other.partitions) & {split, *partitions}):
            raise ConfigError(
                f"the key names {sorted(shared)} belong to split {name!r}. Choose others in "
                "column_keys, or another name for the split. Nothing was changed."
            )


def with_split(manifest: Manifest, new: NewSplit) -> Manifest:
    """Return a manifest with a split in place of the one of its name, and with its keys."""
    replaced = manifest.splits.get(new.name)
    gone = replaced.partitions if replaced else ()
    others = {name: keys for name, keys in manifest.partitions.items() if name not in gone}
    return dataclasses.replace(
        manifest,
        splits={**manifest.splits, new.name: new.entry},
        partitions={**others, **new.partitions},
    )
