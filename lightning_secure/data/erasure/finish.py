"""Ending an erasure that broke off after the rows went and before the old key did."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.data.erasure.erasure_report import ErasureReport, conclude
from lightning_secure.data.key_rotation.rotate import rotating
from lightning_secure.data.manifests.pending_erasure import RECORD_NAME, UnfinishedErasure
from lightning_secure.data.manifests.rollback_pins import Pins
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
    pins = Pins(min_generation, manifest_digest)
    with rotating(folder, keys=keys, pins=pins):
        trusted = {**(old.trusted_signers if old else {}), **keys.trusted_signers}
        record = UnfinishedErasure.read(folder, trusted=trusted)
        current = read_manifest(folder, trusted=keys.trusted_signers)
        pins.check(current, folder)
        if record is not None and not record.happened(current):
            UnfinishedErasure.remove(folder)
            record = None
        if record is None:
            raise ConfigError(
                f"{str(root)!r} has no unfinished erasure: one that was interrupted before its "
                "manifest was in place erased nothing. Nothing was done."
            )
        present = (keys.name, keys.key_id)
        if old is not None and (old.name, old.key_id) != record.key:
            raise ConfigError(
                f"the erasure in {str(root)!r} was begun with key {record.key[1]!r}, and key "
                f"{old.key_id!r} was given as the old one. Nothing was done; {RECORD_NAME} stays."
            )
        ordered = record.retire and not record.retired and record.key != present
        if ordered and old is None and not old_is_gone:
            raise ConfigError(
                f"the erasure in {str(root)!r} was to destroy key {record.key[1]!r}, which opens "
                "old copies unless it is gone. Give it as the old key, or say that it is gone "
                f"(old_is_gone, --old-key-is-gone). Nothing was done; {RECORD_NAME} stays."
            )
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
