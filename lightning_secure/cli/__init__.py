"""``lightning-secure``: the command line, one file for each group of commands."""

from __future__ import annotations

import click

from lightning_secure._version import __version__
from lightning_secure.cli import anonymize, budget, doctor, erase, keys, rotate, seal
from lightning_secure.cli.doctor import Check, run_checks

__all__ = ["Check", "main", "run_checks"]


@click.group()
@click.version_option(__version__, prog_name="lightning-secure")
def main() -> None:
    """Private, confidential and accountable training for PyTorch Lightning."""


main.add_command(anonymize.anonymize)
main.add_command(budget.budget)
main.add_command(doctor.doctor)
main.add_command(erase.erase)
main.add_command(keys.keys)
main.add_command(rotate.rotate)
main.add_command(seal.seal)
