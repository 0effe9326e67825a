"""Pins against roll-backs: facts about a manifest, kept outside the storage, and their comparison.

A manifest cannot show that it is the newest: a writer to the storage can put an older, complete
state back, signed by the right key. Readers and writers compare it with what they know.
"""

from __future__ import annotations

import re

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.errors import ConfigError, ManifestMismatchError


class Pins:
    """The pins of one writer: what its caller knows, and what it has seen itself.

    Args:
        min_generation: The oldest generation that is accepted. Where there is no manifest yet, its
            generation counts as 0.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.

    Raises:
        ConfigError: if a pin is neither of its type nor None.

    A change is made of the manifest that is in place at that moment, so each is checked right where
    it is read for the change, under the lock or with the condition that goes with it. Pinned or
    not, no manifest is accepted that is older than one that was seen here, nor another dataset's.
    """

    def __init__(
        self, min_generation: int | None = None, manifest_digest: str | None = None
    ) -> None:
        if not (min_generation is None or (type(min_generation) is int and min_generation >= 0)):
            raise ConfigError(
                f"min_generation must be a whole number of at least 0, not {min_generation!r}. "
                "Nothing was changed."
            )
        if not (manifest_digest is None or re.fullmatch("[0-9a-f]{64}", str(manifest_digest))):
            raise ConfigError(
                "manifest_digest must be 64 hexadecimal digits in lower case, not "
                f"{manifest_digest!r}. Nothing was changed."
            )
        self._least = min_generation or 0
        self._digest = manifest_digest
        self._dataset: bytes | None = None

    def check(self, manifest: Manifest | None, where: object) -> None:
        """Compare the manifest in place, or that there is none, with what is known.

        Args:
            manifest: It, verified; None if there is none.
            where: The dataset's place, to be named in the error.

        Raises:
            ManifestMismatchError: if the manifest is older, is another, or is missing although
                there must be one.
        """
        if manifest is None:
            if self._least > 0 or self._digest is not None:
                raise ManifestMismatchError(
                    f"there is no dataset at {str(where)!r}, and one was pinned or was there "
                    "before: it was removed, or this is another place. Nothing was changed."
                )
            return
        if self._dataset not in (None, manifest.dataset_id):
            raise ManifestMismatchError(
                f"another dataset than before lies at {str(where)!r}. Nothing was changed."
            )
        check_pins(manifest, self._least, self._digest, outcome="Nothing was changed.")
        self._dataset, self._least = manifest.dataset_id, max(self._least, manifest.generation)


def check_pins(
    manifest: Manifest,
    min_generation: int | None,
    digest: str | None,
    *,
    outcome: str = "Nothing was read.",
) -> None:
    """Compare a manifest with what was pinned outside of the storage.

    Raises:
        ManifestMismatchError: if the manifest is older than ``min_generation``, or not the one with
            ``digest``. The message ends with ``outcome``.

    >>> from lightning_secure import seal
    >>> from lightning_secure.crypto.manifest import read_manifest
    >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> manifest = read_manifest(folder / "data", trusted=keys.trusted_signers)
    >>> check_pins(manifest, sealed.generation, sealed.manifest_digest)
    >>> check_pins(manifest, sealed.generation + 1, None)
    Traceback (most recent call last):
    lightning_secure.errors.ManifestMismatchError: ...
    """
    if min_generation is not None and manifest.generation < min_generation:
        raise ManifestMismatchError(
            f"the dataset is at generation {manifest.generation} and generation {min_generation} "
            f"or later was pinned, or seen before: it was rolled back to an older state. {outcome}"
        )
    if digest is not None and manifest.digest != digest:
        raise ManifestMismatchError(
            f"the manifest has digest {manifest.digest} and {digest} was pinned: the dataset was "
            f"changed or rolled back. {outcome}"
        )
