"""Ending an erasure that broke off after the rows went and before the old key did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import Manifest, read_manifest
from lightning_secure.data.erasure.erasure_report import ErasureReport, conclude
from lightning_secure.data.key_rotation.rotate import rotating
from lightning_secure.data.manifests.pending_erasure import RECORD_NAME, UnfinishedErasure
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.storage.opening import folder_of
from lightning_secure.errors import ConfigError
from lightning_secure.util import events


def finish_erasure(
    root: str | os.PathLike[str],
    *,
    keys: KeyProvider,
    old: KeyProvider | None = None,
    recipients: Sequence[KeyProvider] = (),
    old_is_gone: bool = False,
    min_generation: int | None = None,
    manifest_digest: str | None = None,
) -> ErasureReport:
    """Do what an interrupted erasure had still to do, and report as it would have.

    Args:
        root: The dataset's folder.
        keys: Opens the dataset as it is now: what was ``rotate_kek_to`` then, if it was given.
        old: What was ``keys`` then, if that was another. If the erasure was to destroy it, it is
            destroyed now, once ``keys`` was seen to open the manifest in place.
        recipients: All other recipients, to be tried on the old manifest.
        old_is_gone: Ends it without ``old``, although it was to destroy that key and did not write
            down that it had; after a crash right behind that, the key is gone and cannot be given.
        min_generation: The oldest generation that is accepted as the manifest in place.
        manifest_digest: The only manifest that is.

    Returns:
        The report, and whether an old copy of the manifest still opens. A key that is not given
        counts as one that opens it.

    Raises:
        ConfigError: if no erasure is unfinished or it stopped before rows were erased; or if
            ``old`` is not the key that it was begun with, or is missing and was to be destroyed.
        IntegrityError: if the record of it was altered, or its signer is trusted neither by
            ``keys`` nor by ``old``.
        AuditWriteError: if a listener could not record the erasure, which is then still unfinished.

    >>> from lightning_secure import seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> finish_erasure(folder / "data", keys=keys)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: ... has no unfinished erasure: ...
    """
    folder = folder_of(root)
    present = (keys.name, keys.key_id)
    pin = ManifestPin(min_generation, manifest_digest)
    with rotating(folder, keys=keys, pin=pin) as pins:
        current = read_manifest(folder, trusted=keys.trusted_signers)
        pins.check(current, folder)
        record = _unfinished(folder, current, keys, old)
        _require_old_key(folder, record, present, old, old_is_gone=old_is_gone)
        events.announce(
            "data.erase.finish",
            {
                "dataset": current.dataset_id.hex(),
                "split": record.split,
                "shards": len(record.numbers),
                "generation": current.generation,
            },
        )
        same = record.key == present
        return conclude(
            folder,
            record,
            keys=keys if same else old,
            to=None if same else keys,
            recipients=recipients,
            generation=current.generation,
        )


def _unfinished(
    folder: Path, current: Manifest, keys: KeyProvider, old: KeyProvider | None
) -> UnfinishedErasure:
    """Return the record of an erasure that the manifest in place shows."""
    trusted = {**(old.trusted_signers if old else {}), **keys.trusted_signers}
    record = UnfinishedErasure.read(folder, trusted=trusted)
    if record is not None and record.happened(current):
        return record
    if record is not None:
        UnfinishedErasure.remove(folder)
    raise ConfigError(
        f"{str(folder)!r} has no unfinished erasure: one that was interrupted before its manifest "
        "was in place erased nothing. Nothing was done."
    )


def _require_old_key(
    folder: Path,
    record: UnfinishedErasure,
    present: tuple[str, str],
    old: KeyProvider | None,
    *,
    old_is_gone: bool,
) -> None:
    """Raise ConfigError if the old key is another, or is missing and was to be destroyed."""
    if old is not None and (old.name, old.key_id) != record.key:
        raise ConfigError(
            f"the erasure in {str(folder)!r} was begun with key {record.key[1]!r}, and key "
            f"{old.key_id!r} was given as the old one. Nothing was done; {RECORD_NAME} stays."
        )
    ordered = record.retire and not record.retired and record.key != present
    if ordered and old is None and not old_is_gone:
        raise ConfigError(
            f"the erasure in {str(folder)!r} was to destroy key {record.key[1]!r}, which opens "
            "old copies unless it is gone. Give it as the old key, or say that it is gone "
            f"(old_is_gone, --old-key-is-gone). Nothing was done; {RECORD_NAME} stays."
        )
