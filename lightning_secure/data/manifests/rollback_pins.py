"""Pins against roll-backs: facts about a manifest, kept outside the storage, and their comparison.

A manifest cannot show that it is the newest: a writer to the storage can put an older, complete
state back, signed by the right key. Readers and writers compare it with what they know.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from lightning_secure.crypto.manifest import Manifest
from lightning_secure.errors import ConfigError, ManifestMismatchError


@dataclass(frozen=True)
class ManifestPin:
    """The knowledge of a manifest that a reader or writer brings along.

    Attributes:
        min_generation: The oldest generation that is accepted.
        manifest_digest: The only manifest that is accepted, as SHA-256 in hexadecimal.

    >>> from lightning_secure import seal
    >>> from lightning_secure.crypto.manifest import read_manifest
    >>> sealed = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> manifest = read_manifest(folder / "data", trusted=keys.trusted_signers)
    >>> ManifestPin(sealed.generation, sealed.manifest_digest).check(manifest)
    >>> ManifestPin(sealed.generation + 1).check(manifest)
    Traceback (most recent call last):
    lightning_secure.errors.ManifestMismatchError: ...
    """

    min_generation: int | None = None
    manifest_digest: str | None = None

    def check(self, manifest: Manifest, *, outcome: str = "Nothing was read.") -> None:
        """Compare a manifest with the pin.

        Raises:
            ManifestMismatchError: if the manifest is older than ``min_generation``, or not the one
                with ``manifest_digest``. The message ends with ``outcome``.
        """
        least, digest = self.min_generation, self.manifest_digest
        if least is not None and manifest.generation < least:
            raise ManifestMismatchError(
                f"the dataset is at generation {manifest.generation} and generation {least} or "
                f"later was pinned, or seen before: it was rolled back to an older state. {outcome}"
            )
        if digest is not None and manifest.digest != digest:
            raise ManifestMismatchError(
                f"the manifest has digest {manifest.digest} and {digest} was pinned: the dataset "
                f"was changed or rolled back. {outcome}"
            )

    def since(self, generation: int) -> ManifestPin:
        """Return a pin that accepts nothing older than ``generation`` either."""
        return dataclasses.replace(self, min_generation=max(self.min_generation or 0, generation))


class Pins:
    """The pins of one writer: what its caller knows, and what it has seen itself.

    Args:
        pin: The caller's. Where there is no manifest yet, its generation counts as 0.

    Raises:
        ConfigError: if a value of the pin is neither of its type nor None.

    A change is made of the manifest that is in place at that moment, so each is checked right where
    it is read for the change, under the lock or with the condition that goes with it. Pinned or
    not, no manifest is accepted that is older than one that was seen here, nor another dataset's.
    """

    def __init__(self, pin: ManifestPin | None = None) -> None:
        self._pin = pin or ManifestPin()
        least, digest = self._pin.min_generation, self._pin.manifest_digest
        if not (least is None or (type(least) is int and least >= 0)):
            raise ConfigError(
                f"min_generation must be a whole number of at least 0, not {least!r}. Nothing was "
                "changed."
            )
        if not (digest is None or re.fullmatch("[0-9a-f]{64}", str(digest))):
            raise ConfigError(
                f"manifest_digest must be 64 hexadecimal digits in lower case, not {digest!r}. "
                "Nothing was changed."
            )
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
            if self._pin.min_generation or self._pin.manifest_digest is not None:
                raise ManifestMismatchError(
                    f"there is no dataset at {str(where)!r}, and one was pinned or was there "
                    "before: it was removed, or this is another place. Nothing was changed."
                )
            return
        if self._dataset not in (None, manifest.dataset_id):
            raise ManifestMismatchError(
                f"another dataset than before lies at {str(where)!r}. Nothing was changed."
            )
        self._pin.check(manifest, outcome="Nothing was changed.")
        self._dataset, self._pin = manifest.dataset_id, self._pin.since(manifest.generation)
