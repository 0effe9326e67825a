"""``lightning-secure keys recipients``: who may open a partition of a sealed dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lightning_secure.cli.dataset_options import failures, key_file, pins, provider, recipient_files

_ROOT = click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False))


@click.group()
def recipients() -> None:
    """Say who may open which partition of a dataset, and change it."""


@recipients.command("list")
@_ROOT
@key_file
@pins
@failures
def show(root: Path, key_path: Path, **pinned: Any) -> None:
    """Show the recipients of each partition: kind of provider, and id of the key."""
    from lightning_secure.crypto.manifest import read_manifest
    from lightning_secure.data.manifests.rollback_pins import ManifestPin

    manifest = read_manifest(root, trusted=provider(key_path).trusted_signers)
    ManifestPin(**pinned).check(manifest)
    for name, wraps in sorted(manifest.partitions.items()):
        for wrapped in wraps:
            click.echo(f"{name}: {wrapped.provider} {wrapped.key_id}")
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")


@recipients.command()
@_ROOT
@click.argument("partition")
@key_file
@click.option(
    "--recipient", required=True, type=click.Path(path_type=Path),
    help="Who may open it too: a key file, or .yaml, as for --key-file.",
)  # fmt: skip
@pins
@failures
def add(root: Path, partition: str, key_path: Path, recipient: Path, **pinned: Any) -> None:
    """Let another key open PARTITION: the name of a split, or SPLIT.KEY."""
    from lightning_secure.data.key_rotation.rotate import add_recipient

    manifest = add_recipient(
        root, partition, keys=provider(key_path), recipient=provider(recipient), **pinned
    )
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")


@recipients.command()
@_ROOT
@click.argument("partition")
@click.argument("key_id")
@key_file
@recipient_files
@pins
@failures
def remove(
    root: Path,
    partition: str,
    key_id: str,
    key_path: Path,
    recipients: tuple[Path, ...],
    **pinned: Any,
) -> None:
    """Take PARTITION from the key KEY_ID, by a new partition key that it is not given.

    The key's holder keeps what it has read or copied; `rotate data` encrypts the rows anew.
    """
    from lightning_secure.data.key_rotation.rotate import remove_recipient

    manifest = remove_recipient(
        root,
        partition,
        keys=provider(key_path),
        key_id=key_id,
        recipients=[provider(path) for path in recipients],
        **pinned,
    )
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")
