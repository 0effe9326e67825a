"""Whether a manifest has room for a split and its keys."""

from __future__ import annotations

from collections.abc import Collection

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.errors import ConfigError

__all__ = ["require_free"]


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
