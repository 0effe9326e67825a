"""``lightning-secure erase``: destroy the keys of rows, and say whether that was enough."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lightning_secure.cli.dataset_options import failures, key_file, pins, provider, recipient_files

if TYPE_CHECKING:
    from lightning_secure.crypto.keys import KeyProvider
    from lightning_secure.data.erasure.erasure_report import ErasureReport

#: Exit status if the rows are erased, and an old copy can still be opened.
RECOVERABLE = 3
#: If they are erased, and what should follow did not.
UNFINISHED = 4


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--retire-kek", is_flag=True, help="Destroy --key-file when all is done."),
        click.option(
            "--rotate-kek-to", type=click.Path(path_type=Path),
            help="The key file, or .yaml, that takes the place of --key-file.",
        ),
        pins,
        recipient_files,
        key_file,
        click.argument("split"),
        click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False)),
    ):  # fmt: skip
        command = option(command)
    return command


@click.group()
def erase() -> None:
    """Erase rows, then try to get them back and report.

    Exit status 0: no key that was tried opens an old copy. 3: erased, and one does. 4: erased, and
    it broke off before the old key was destroyed or tried; `erase finish` does the rest. 1: an
    error, and nothing was erased.
    """


@erase.command()
@_options
@click.argument("numbers", nargs=-1, type=int, required=True)
@failures
def shard(root: Path, split: str, numbers: tuple[int, ...], **options: Any) -> None:
    """Erase the shards NUMBERS of SPLIT."""
    from lightning_secure.data.erasure.erase import erase_shard

    _confirm(f"Erase {len(numbers)} shards of {split!r}", options)
    arguments = _keys(options)
    with _unfinished(root, arguments["keys"], arguments["rotate_kek_to"]):
        _show(erase_shard(root, split, numbers, **arguments))


@erase.command()
@_options
@click.option("--number", is_flag=True, help="The subject's id is a whole number, not text.")
@failures
def subject(root: Path, split: str, number: bool, **options: Any) -> None:
    """Erase all rows of one subject of SPLIT, whose id is read from the terminal or a pipe.

    Arguments of a command can be seen by other users of the machine and stay in a shell's history.
    """
    from lightning_secure.data.erasure.erase import erase_subject

    if _at_a_terminal():
        name = click.prompt("Subject", hide_input=True)
    else:
        name = sys.stdin.readline().rstrip("\n")
        if not options["yes"]:
            raise click.UsageError("the subject comes from a pipe; confirm the erasure with --yes")
    if number and not name.lstrip("-").isdecimal():
        raise click.UsageError("the subject is not a whole number")
    if not name:
        raise click.UsageError("no subject was given")
    _confirm(f"Erase this subject's rows in {split!r}", options)
    arguments = _keys(options)
    with _unfinished(root, arguments["keys"], arguments["rotate_kek_to"]):
        _show(erase_subject(root, split, int(name) if number else name, **arguments))


@erase.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, file_okay=False))
@key_file
@click.option(
    "--old-key-file",
    type=click.Path(path_type=Path),
    help="What was --key-file then, if the dataset has another now. It is destroyed if the erasure "
    "was to do so.",
)
@click.option(
    "--old-key-is-gone", is_flag=True, help="It was to be destroyed, and cannot be given any more."
)
@recipient_files
@pins
@click.option("--yes", is_flag=True, help="Do not ask.")
@failures
def finish(
    root: Path,
    key_path: Path,
    old_key_file: Path | None,
    old_key_is_gone: bool,
    recipients: tuple[Path, ...],
    yes: bool,
    **pinned: Any,
) -> None:
    """Finish an erasure that broke off after the rows went."""
    from lightning_secure.data.erasure.finish import finish_erasure

    if old_key_file is not None and not yes:
        click.confirm(f"Finish the erasure, and destroy {old_key_file} if it says so?", abort=True)
    keys, old = provider(key_path), provider(old_key_file) if old_key_file else None
    with _unfinished(root, keys, old):
        _show(
            finish_erasure(
                root,
                keys=keys,
                old=old,
                recipients=[provider(path) for path in recipients],
                old_is_gone=old_key_is_gone,
                **pinned,
            )
        )


@contextlib.contextmanager
def _unfinished(root: Path, *keys: KeyProvider | None) -> Iterator[None]:
    """Say of an error that comes after the rows went that they did."""
    from lightning_secure.errors import ConfigError, LightningSecureError

    try:
        yield
    except LightningSecureError as error:
        # An error in the arguments comes before anything, even if an older record lies there.
        if isinstance(error, ConfigError) or not _erased(root, [one for one in keys if one]):
            raise
        click.echo(f"{type(error).__name__}: {error}", err=True)
        click.echo(
            "The rows are erased from the dataset, and the erasure is not finished: the old key "
            "may still open an old copy. Run `lightning-secure erase finish`.",
            err=True,
        )
        sys.exit(UNFINISHED)


def _erased(root: Path, keys: Sequence[KeyProvider]) -> bool:
    """Whether the manifest in place is without the rows of a record that can be believed."""
    from lightning_secure.crypto.manifest import read_manifest
    from lightning_secure.data.manifests.pending_erasure import UnfinishedErasure
    from lightning_secure.errors import IntegrityError

    trusted = {name: key for one in keys for name, key in one.trusted_signers.items()}
    with contextlib.suppress(IntegrityError):
        record = UnfinishedErasure.read(root, trusted=trusted)
        return record is not None and record.happened(read_manifest(root, trusted=trusted))
    return False


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _confirm(question: str, options: dict[str, Any]) -> None:
    if options["retire_kek"]:
        question += f", and destroy {options['key_path']} with all else that is sealed under it"
    if not options["yes"]:
        click.confirm(f"{question}?", abort=True)


def _keys(options: dict[str, Any]) -> dict[str, Any]:
    to = options["rotate_kek_to"]
    return {
        "keys": provider(options["key_path"]),
        "recipients": [provider(path) for path in options["recipients"]],
        "rotate_kek_to": provider(to) if to else None,
        "retire_kek": options["retire_kek"],
        "min_generation": options["min_generation"],
        "manifest_digest": options["manifest_digest"],
    }


def _show(report: ErasureReport) -> None:
    click.echo(str(report))
    if report.recoverable or report.files_left:
        sys.exit(RECOVERABLE)
