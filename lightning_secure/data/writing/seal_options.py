"""The options of a sealing, as they are handed on from its call down to the rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_secure.anonymize import AnonymizationPlan
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.storage.remote import Options
from lightning_secure.errors import ConfigError


@dataclass(frozen=True, kw_only=True, repr=False)  # storage_options may hold a password
class SealOptions:
    """The arguments of :class:`EncryptedShardWriter` that all splits of a sealing share.

    Raises:
        ConfigError: if an option is out of range, or does not go with another.
    """

    segment_bytes: int
    shard_bytes: int
    schema: Schema | None
    anonymize: AnonymizationPlan | None
    allow_nonfinite: bool
    replace: bool
    pin: ManifestPin
    column_keys: Mapping[str, str] | None = None
    subject_column: str | None = None
    source_id: str | None = None
    resume: bool = False
    remarks: Mapping[str, str] | None = None
    storage_options: Options | None = None
    spool: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.segment_bytes < 1:
            raise ConfigError(f"segment_bytes must be at least 1, not {self.segment_bytes}.")
        if self.shard_bytes < self.segment_bytes:
            raise ConfigError(
                f"shard_bytes must be at least segment_bytes={self.segment_bytes}, not "
                f"{self.shard_bytes}."
            )
        if self.resume and self.source_id is None:
            raise ConfigError(
                "resume=True needs source_id=, which names the state of the source: without it the "
                "remaining rows cannot be matched with those that are sealed."
            )
        if self.source_id is not None and (self.column_keys or self.subject_column is not None):
            raise ConfigError(
                "a sealing with column_keys or subject_column cannot be resumed: leave source_id "
                "out. Nothing was sealed."
            )

    @property
    def identity(self) -> str | None:
        """The state of the source and of the plan, if a sealing can be resumed at all."""
        if self.anonymize is None:
            return self.source_id
        return self.anonymize.identity(self.source_id)

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that decides what rows and shards come of a source, as JSON values."""
        return {
            "segment_bytes": self.segment_bytes,
            "shard_bytes": self.shard_bytes,
            "schema": self.schema.to_json() if self.schema else None,
            "anonymize": self.anonymize.describe() if self.anonymize else None,
            "allow_nonfinite": self.allow_nonfinite,
        }
