"""Redacting files before they are handed to a store that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_secure.errors import RedactionError
from lightning_secure.redaction.artifacts.encrypted import SUFFIX
from lightning_secure.redaction.artifacts.recognise import is_sealed

#: Is given the name of a file and its bytes, and returns those that are handed on in their place.
#: The name is the same, or has ``.encrypted`` after it.
Binary = Callable[[str, bytes], tuple[str, bytes]]


def as_it_is(name: str, data: bytes) -> tuple[str, bytes]:
    """Hand a binary file on unchecked."""
    return name, data


def copy_checked(
    source: Path,
    target: Path,
    *,
    redact: Callable[[str, str], str],
    binary: Binary | None = None,
) -> Path:
    """Copy a text file with its text redacted, or a file that this package encrypted as it is.

    Args:
        source: The file.
        target: Where to. If something is there already, a number is put before the name: two names
            may have differed only in what was taken out.
        redact: Is given the name of a file and its text, and returns the text redacted; or no name
            and a name to redact.
        binary: The treatment of a file that is neither. By default it is refused.

    Returns:
        Where the copy is.

    Raises:
        RedactionError: if the file is of neither kind, so that it could not be checked.
    """
    data = source.read_bytes()
    target.parent.mkdir(parents=True, exist_ok=True)
    target = _free(target)
    if not is_sealed(data):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = None
        if text is not None and "\0" not in text:
            data = redact(source.name, text).encode()
        elif binary is not None:
            renamed, data = binary(target.name, data)
            target = target.with_name(renamed)
        else:
            shown = redact("", source.name)
            raise RedactionError(
                f"artifact {shown!r} is neither text nor encrypted by this package, so it could "
                "not be checked for secrets and personal data. It was not sent."
            )
    target.write_bytes(data)
    return target


def _free(target: Path) -> Path:
    """Return a path beside ``target`` that is free, also once a file there is encrypted.

    An encrypted file is bound to its name, and cannot be given another one.
    """
    name, number = target.name, 2
    while target.exists() or target.with_name(target.name + SUFFIX).exists():
        target, number = target.with_name(f"{number}_{name}"), number + 1
    return target


def copy_tree_checked(
    root: Path,
    folder: Path,
    *,
    redact: Callable[[str, str], str],
    binary: Binary | None = None,
    passes: Callable[[str], bool] = lambda _: True,
) -> None:
    """Copy the files of a folder into another as :func:`copy_checked` does, names redacted too.

    Args:
        root: The folder.
        folder: The other one.
        redact: As for :func:`copy_checked`.
        binary: As for :func:`copy_checked`.
        passes: Is given a file's redacted path below the folder, and says whether it is copied.

    Raises:
        RedactionError: if a file could not be checked.
    """
    for source in sorted(root.rglob("*")):
        if source.is_file():
            name = redact("", source.relative_to(root).as_posix())
            if passes(name):
                copy_checked(source, folder / name, redact=redact, binary=binary)
