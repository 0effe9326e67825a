"""The privacy account of a checkpoint, without its weights."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from lightning_secure.compat.torch import FakeTensorMode
from lightning_secure.crypto.file_header import CHECKPOINT
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.errors import CheckpointCorruptedError, ConfigError, LedgerError
from lightning_secure.plugins.checkpoint import opened
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.util.files import open_regular

_FAILURES: Final = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError)


def read_account(path: Path, *, keys: KeyProvider | None = None) -> Ledger:
    """Return the account that travels in a checkpoint.

    Args:
        path: An encrypted checkpoint, or one in the clear.
        keys: Opens an encrypted one.

    Raises:
        ConfigError: if the checkpoint is encrypted, and there are no keys.
        CheckpointCorruptedError: if the file was altered, is no checkpoint, or holds objects that
            are not safe to load.
        WrongKeyError: if the checkpoint was written under another key.
        LedgerError: if the checkpoint has no account, or one that cannot be read.
        FileNotFoundError: if there is no checkpoint.

    Guarantees:
        No code of the checkpoint runs, and no tensor's data is read into memory.
    """
    with _opened(path) as file:
        encrypted = file.read(len(CHECKPOINT.magic)) == CHECKPOINT.magic
    if encrypted and keys is None:
        raise ConfigError(f"checkpoint {str(path)!r} is encrypted, and no key was given.")
    checkpoint: Any = None
    if encrypted and keys is not None:
        with opened(path, keys=keys) as stream, FakeTensorMode():
            checkpoint = torch.load(stream, weights_only=True)
    else:
        with _opened(path) as file, contextlib.suppress(*_FAILURES), FakeTensorMode():
            checkpoint = torch.load(file, weights_only=True)
        if checkpoint is None:
            # Raised out here: what torch says can hold parts of the file.
            raise CheckpointCorruptedError(
                f"{str(path)!r} is no checkpoint, was cut off, or holds objects that are not safe "
                "to load. Nothing from it was used."
            )
    ledger = Ledger.from_checkpoint(checkpoint) if isinstance(checkpoint, dict) else None
    if ledger is None:
        raise LedgerError(
            f"checkpoint {str(path)!r} has no privacy ledger: it was not trained privately, or the "
            "ledger was removed. Its privacy loss is unknown."
        )
    return ledger


def _opened(path: Path) -> BinaryIO:
    reason = None
    try:
        return os.fdopen(open_regular(path), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror
    raise CheckpointCorruptedError(
        f"checkpoint {str(path)!r} cannot be opened ({reason}). Nothing from it was used."
    )
