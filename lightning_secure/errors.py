"""The exceptions of lightning_secure, one tree.

::

    LightningSecureError
    ├── ConfigError (ValueError)           an argument or a combination of arguments is wrong
    ├── DataError (ValueError)             rows or columns that cannot be sealed or read as asked
    ├── MissingExtraError (ImportError)    an optional package is not installed
    ├── IntegrityError                     bytes are not what their author wrote
    │   ├── ShardCorruptedError            a shard file was altered, swapped, cut or removed
    │   ├── ManifestMismatchError          a manifest is absent, foreign, altered or rolled back
    │   ├── CheckpointCorruptedError       a checkpoint was altered or is not an encrypted one
    │   └── AuditChainError                the audit log was altered
    ├── StorageError                       a remote storage refused, or did not answer well
    ├── AuditWriteError                    an event could not be recorded: the action was refused
    ├── KeyAccessError                     a key may not or cannot be used
    │   ├── KeyUnavailableError            it is missing, unreadable or stored unsafely
    │   └── WrongKeyError                  a key id proves that another key is needed
    ├── PrivacyError                       the privacy promise cannot be kept
    │   ├── BudgetExhaustedError           the next step would exceed ``target_epsilon``
    │   ├── LedgerError                    what was already spent is missing or contradictory
    │   ├── UnsupportedModelError          something about the model is not private, and what
    │   └── UnsupportedTrainerOptionError  a Trainer option would break the promise
    └── RedactionError                     it could not be checked, so it was not released

Every message says what happened, why, and what it means for the data. None of them holds a key, a
plaintext or a personal value.
"""

from __future__ import annotations

__all__ = [
    "AuditChainError",
    "AuditWriteError",
    "BudgetExhaustedError",
    "CheckpointCorruptedError",
    "ConfigError",
    "DataError",
    "IntegrityError",
    "KeyAccessError",
    "KeyUnavailableError",
    "LedgerError",
    "LightningSecureError",
    "ManifestMismatchError",
    "MissingExtraError",
    "PrivacyError",
    "RedactionError",
    "ShardCorruptedError",
    "StorageError",
    "UnsupportedModelError",
    "UnsupportedTrainerOptionError",
    "WrongKeyError",
]


class LightningSecureError(Exception):
    """Root of every error that this package raises on purpose.

    >>> try:
    ...     raise ConfigError("threads must be at least 1, got 0.")
    ... except LightningSecureError as error:
    ...     print(error)
    threads must be at least 1, got 0.
    """


class ConfigError(LightningSecureError, ValueError):
    """An argument, or a combination of arguments, is wrong."""


class DataError(LightningSecureError, ValueError):
    """Rows or columns that cannot be sealed or read as asked."""


class MissingExtraError(LightningSecureError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class IntegrityError(LightningSecureError):
    """Bytes are not what their author wrote. Nothing from them was returned."""


class ShardCorruptedError(IntegrityError):
    """A shard file was altered, swapped, truncated, extended or is missing."""


class ManifestMismatchError(IntegrityError):
    """A dataset's manifest is absent, unsigned, signed by a stranger, altered or rolled back."""


class CheckpointCorruptedError(IntegrityError):
    """A checkpoint was altered or truncated, or is not an encrypted checkpoint."""


class AuditChainError(IntegrityError):
    """The audit log's hash chain is broken."""


class StorageError(LightningSecureError):
    """A remote storage refused, or did not answer in time or as asked; nothing was returned."""


class AuditWriteError(LightningSecureError):
    """An event could not be recorded, so the action that it describes was refused."""


class KeyAccessError(LightningSecureError):
    """A key may not or cannot be used."""


class KeyUnavailableError(KeyAccessError):
    """A key is missing, unreadable or stored where others can read it."""


class WrongKeyError(KeyAccessError):
    """A key id proves that the data was sealed under another key."""


class PrivacyError(LightningSecureError):
    """The differential-privacy promise cannot be kept."""


class BudgetExhaustedError(PrivacyError):
    """The next optimizer step would exceed ``target_epsilon``; it was not taken."""


class LedgerError(PrivacyError):
    """The record of the privacy already spent is missing or contradicts the run."""


class UnsupportedModelError(PrivacyError):
    """The model or its loss cannot be trained privately; the message names the part at fault."""


class UnsupportedTrainerOptionError(PrivacyError):
    """A Trainer option would break the privacy promise; the message says what to use instead."""


class RedactionError(LightningSecureError):
    """A value could not be checked for secrets or personal data, so it was not released."""
