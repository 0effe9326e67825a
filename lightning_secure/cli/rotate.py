"""``lightning-secure rotate``: exchange the keys of a sealed dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lightning_secure.cli.dataset_options import failures, key_file, pins, provider, recipient_files

_ROOT = click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False))


@click.group()
def rotate() -> None:
    """Exchange keys. The dataset is in its old state or in the new one, whatever happens."""


@rotate.command()
@_ROOT
@key_file
@click.option(
    "--to", required=True, type=click.Path(path_type=Path), help="The new key file, or .yaml."
)
@pins
@failures
def kek(root: Path, key_path: Path, to: Path, **pinned: Any) -> None:
    """Put another key in the place of the present one.

    Every reader has to use, or trust, the new one from now on. An old copy of the manifest still
    opens under the old key; destroy that, or rotate the data too.
    """
    from lightning_secure.data.key_rotation.rotate import rotate_kek

    manifest = rotate_kek(root, keys=provider(key_path), to=provider(to), **pinned)
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")


@rotate.command()
@_ROOT
@click.argument("name")
@key_file
@recipient_files
@pins
@failures
def partition(
    root: Path, name: str, key_path: Path, recipients: tuple[Path, ...], **pinned: Any
) -> None:
    """Give partition NAME a new key, for the recipients that it has."""
    from lightning_secure.data.key_rotation.rotate import rotate_partition

    manifest = rotate_partition(
        root,
        name,
        keys=provider(key_path),
        recipients=[provider(path) for path in recipients],
        **pinned,
    )
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")


@rotate.command()
@_ROOT
@click.argument("split")
@key_file
@pins
@failures
def data(root: Path, split: str, key_path: Path, **pinned: Any) -> None:
    """Encrypt the rows of SPLIT anew. It is on the disk twice until that is done."""
    from lightning_secure.data.key_rotation.rotate import rotate_data

    manifest = rotate_data(root, split, keys=provider(key_path), **pinned)
    click.echo(f"generation {manifest.generation}, manifest {manifest.digest}")


@rotate.command()
@_ROOT
@key_file
@click.option(
    "--min-age-days", type=click.FloatRange(min=0), default=7.0, show_default=True,
    help="How old a shard that no manifest names must be. Longer than the longest sealing.",
)  # fmt: skip
@pins
@failures
def clean(root: Path, key_path: Path, min_age_days: float, **pinned: Any) -> None:
    """Remove what crashed sealings and rotations left behind."""
    from lightning_secure.data.manifests.garbage import collect_garbage

    removed = collect_garbage(
        root, keys=provider(key_path), min_age_s=min_age_days * 86400, **pinned
    )
    for name in removed:
        click.echo(name)
    click.echo(f"{len(removed)} files removed")
