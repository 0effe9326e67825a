"""Sources of passphrases, PINs and tokens: asked at each use, and never kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Final

from lightning_secure.crypto.providers.keyfiles import read_file
from lightning_secure.errors import ConfigError, KeyAccessError, KeyUnavailableError

SecretSource = Callable[[], str]
_MAX_CHARACTERS: Final = 65536


@dataclass(frozen=True)
class EnvironmentSecret:
    """Reads a secret from an environment variable, each time it is needed.

    >>> EnvironmentSecret("VAULT_TOKEN")
    EnvironmentSecret(name='VAULT_TOKEN')
    """

    name: str

    def __call__(self) -> str:
        """Return the variable's value, or nothing if it is not set."""
        return os.environ.get(self.name, "")


@dataclass(frozen=True)
class FileSecret:
    """Reads a secret from a file with mode 0600 or 0400, each time it is needed.

    To refresh the secret, replace the file, as an agent that renews tokens does. White space
    around the secret is left out.

    Raises:
        KeyUnavailableError: if, when the secret is read, the file is missing or others can use it.

    >>> FileSecret("/run/secrets/token")
    FileSecret(path='/run/secrets/token')
    """

    path: str

    def __call__(self) -> str:
        """Return the file's content."""
        data = read_file(Path(self.path), what="secret file", forbidden=0o077)
        return data.decode("utf-8", errors="replace").strip()


def require_source(name: str, source: object) -> None:
    """Refuse a secret that was given as text.

    Raises:
        ConfigError: if ``source`` cannot be called.
    """
    if not callable(source):
        raise ConfigError(
            f"{name} must be a function that returns the secret, EnvironmentSecret(...) or "
            "FileSecret(...): a provider does not keep secrets, and one that it kept could be "
            "pickled or shown with it."
        )


def source_name(source: SecretSource) -> str:
    """Name a source in errors and representations, without calling it."""
    if isinstance(source, EnvironmentSecret | FileSecret):
        return repr(source)
    return str(getattr(source, "__qualname__", type(source).__qualname__))


def read_secret(source: SecretSource, *, what: str) -> str:
    """Ask a source for its secret.

    Raises:
        KeyUnavailableError: if the source has no secret, or failed. The error holds nothing that
            the source said.

    >>> read_secret(lambda: "hunter2", what="the token")
    'hunter2'
    """
    value: object = None
    try:
        value = source()
    except KeyUnavailableError:
        raise
    except Exception:  # noqa: BLE001 # its text or its chain may hold the secret
        value = None
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_CHARACTERS:
        raise KeyUnavailableError(
            f"{what} is not available: {source_name(source)} failed or gave none. No key was used."
        )
    return value


def require_portable(source: SecretSource, *, what: str) -> None:
    """Refuse to pickle a source that might carry its secret along.

    Raises:
        KeyAccessError: if the source is neither one of this module's nor a function of a module,
            which both pickle as their name.
    """
    if isinstance(source, EnvironmentSecret | FileSecret):
        return
    if isinstance(source, FunctionType) and "<" not in source.__qualname__:
        return
    raise KeyAccessError(
        f"{what} comes from {source_name(source)}, which cannot be pickled without the risk that "
        "the secret goes with it. Use EnvironmentSecret, FileSecret or a function of a module."
    )
