"""What the commands on datasets share: key files, and errors as one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from lightning_secure.errors import LightningSecureError

if TYPE_CHECKING:
    from lightning_secure.crypto.keys import KeyProvider

__all__ = ["failures", "key_file", "provider", "recipient_files"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

key_file = click.option(
    "--key-file", "key_path", required=True, type=click.Path(path_type=Path),
    help="The key file that opens the dataset.",
)  # fmt: skip
recipient_files = click.option(
    "--recipient", "recipients", multiple=True, type=click.Path(path_type=Path),
    help="Key file of another recipient. Give each one that keeps its access.",
)  # fmt: skip


def provider(path: Path) -> KeyProvider:
    """Return the provider of a key file."""
    from lightning_secure.crypto.providers import LocalKeyProvider

    return LocalKeyProvider(path)


def failures(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """Show an error of this package as one line, and exit with 1."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return command(*args, **kwargs)
        except LightningSecureError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)

    return wrapped
