"""``lightning-secure``: the command line, one file for each group of commands."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from lightning_secure._version import __version__

if TYPE_CHECKING:
    from lightning_secure.cli.doctor import Check, run_checks

__all__ = ["Check", "main", "run_checks"]

_COMMANDS: Final = ("anonymize", "budget", "doctor", "erase", "keys", "rotate", "seal")


@click.group()
@click.version_option(__version__, prog_name="lightning-secure")
def main() -> None:
    """Private, confidential and accountable training for PyTorch Lightning."""


def _command(name: str) -> click.Command:
    """Return a command; where a package that it needs is broken, one that says so.

    The others go on working, and ``doctor`` above all.
    """
    try:
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a broken extension module panics past Exception
        return _unusable(name, f"{type(error).__name__}: {error}")
    return command


def _unusable(name: str, problem: str) -> click.Command:
    remedy = (
        "pip install --force-reinstall lightning-secure"
        if name == "doctor"
        else "`lightning-secure doctor` names the package to install again"
    )

    @click.command(
        name,
        short_help="Unusable: a package that it needs cannot be imported.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1)
    def unusable(arguments: tuple[str, ...]) -> None:
        click.echo(
            f"{name} cannot run: importing what it needs fails ({problem}). Nothing was done. "
            f"Way on: {remedy}.",
            err=True,
        )
        sys.exit(1)

    return unusable


for _name in _COMMANDS:
    main.add_command(_command(_name))


def __getattr__(name: str) -> Any:
    if name not in {"Check", "run_checks"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.doctor"), name)
