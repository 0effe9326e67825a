"""Parts that the commands on datasets share: keys, pins, and errors as one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from lightning_secure.cli.providers import provider_in
from lightning_secure.errors import LightningSecureError

if TYPE_CHECKING:
    from lightning_secure.crypto.keys import KeyProvider

_P = ParamSpec("_P")
_T = TypeVar("_T")

key_file = click.option(
    "--key-file", "key_path", required=True, type=click.Path(path_type=Path),
    help="What opens the dataset: a key file, or a .yaml file that names a provider as keys: does "
    "in the configuration of seal.",
)  # fmt: skip
recipient_files = click.option(
    "--recipient", "recipients", multiple=True, type=click.Path(path_type=Path),
    help="The same for another recipient. Give each one that keeps its access.",
)  # fmt: skip


def pins(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """Add ``--min-generation`` and ``--manifest-digest``."""
    for option in (
        click.option(
            "--manifest-digest", metavar="SHA256",
            help="The only manifest of the dataset that is built on.",
        ),
        click.option(
            "--min-generation", metavar="N", type=click.IntRange(min=0),
            help="The oldest generation that is built on: an older state that was put back is "
            "refused.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def provider(path: Path) -> KeyProvider:
    """Return the provider of a key file, or the one that a YAML file names."""
    from lightning_secure.crypto.providers import LocalKeyProvider

    if path.suffix in (".yaml", ".yml"):
        return provider_in(path)
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
