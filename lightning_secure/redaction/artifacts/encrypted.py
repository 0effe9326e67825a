"""Files that are tracked as ciphertext: figures, pickles, models.

Such a file is a head (:mod:`~lightning_secure.crypto.file_header`) and a Cobblestone-256 stream.
The head holds an id, the file's name and the wrapped data key; all bytes before the
stream are bound to it. ``.encrypted`` is put after the file's name.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, cast

from lightning_secure.crypto.file_header import FILE
from lightning_secure.crypto.keys import DataKey, KeyProvider, WrappedKey
from lightning_secure.crypto.stream import StreamReader, StreamWriter
from lightning_secure.errors import ConfigError, DataError, IntegrityError
from lightning_secure.util import events
from lightning_secure.util.files import as_path, atomic_writer, open_regular

SUFFIX: Final = ".encrypted"


def encrypted(data: bytes, *, name: str, keys: KeyProvider) -> bytes:
    """Return a file encrypted, under a fresh data key.

    Args:
        data: All of it.
        name: The file's, without ``.encrypted``. It is bound to the content, and not hidden.
        keys: Wraps the data key.

    Raises:
        ConfigError: if the key has more recipients than the header can hold.
    """
    key, number = DataKey.generate(), secrets.token_hex(16)
    wrapped = [one.to_json() for one in keys.wrap_all(key, context=_context(number))]
    prefix = FILE.write({"file": number, "name": name, "key": wrapped})
    raw = io.BytesIO()
    raw.write(prefix)
    stream = StreamWriter(raw, key=key, context=prefix)
    stream.write(data)
    stream.finish()
    events.announce("artifact.encrypt", {"file": number, "name": name, "bytes": raw.tell()})
    return raw.getvalue()


@contextlib.contextmanager
def open_artifact(path: str | os.PathLike[str], *, keys: KeyProvider) -> Iterator[BinaryIO]:
    """Open a file that was tracked as ciphertext, after it was downloaded.

    Args:
        path: The file, under the name that it was stored by.
        keys: Release its key.

    Yields:
        A seekable binary file. Each chunk is authenticated before it is handed out.

    Raises:
        IntegrityError: if the file was altered, cut off or renamed, or is not an encrypted one. A
            truncated file fails at once, a flipped bit when its chunk is read.
        WrongKeyError: if the file was encrypted under another key.
        FileNotFoundError: if there is no such file.

    Guarantees:
        What is read is what some holder of the key tracked under this name. It does not show in
        which run: a file of the same name out of another one, put in its place, opens.

    >>> path = folder / "model.bin.encrypted"
    >>> _ = path.write_bytes(encrypted(b"weights", name="model.bin", keys=keys))
    >>> with open_artifact(path, keys=keys) as file:
    ...     file.read()
    b'weights'
    """
    place = as_path(path, what="path")
    refused = ""
    raw: BinaryIO | None = None
    try:
        raw = os.fdopen(open_regular(place), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        refused = str(error.strerror)
    if raw is None:
        raise _rejected(place, refused)
    with raw:
        try:
            prefix, header = FILE.read(raw)
            if not header["key"]:
                raise IntegrityError("its header was altered")
            if place.name != header["name"] + SUFFIX:
                raise IntegrityError("it was tracked under another name")
            key = keys.unwrap_any(
                [WrappedKey.from_json(one) for one in header["key"]],
                context=_context(header["file"]),
            )
            stream = StreamReader(raw, key=key, context=prefix, start=len(prefix))
            events.announce("artifact.open", {"file": header["file"], "name": header["name"]})
            with stream:
                yield cast("BinaryIO", stream)
        except IntegrityError as error:
            refused = str(error)
    if refused:
        raise _rejected(place, refused)


def decrypt_artifacts(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    keys: KeyProvider,
    insecure_copy_others: bool = False,
) -> list[Path]:
    """Decrypt a downloaded folder, or one file, into a folder.

    Args:
        source: What ``mlflow.artifacts.download_artifacts`` returned.
        target: A folder that does not exist yet, or is empty.
        keys: Release the keys.
        insecure_copy_others: Also copy the files that are not encrypted, as MLflow needs it to load
            a model. Nothing authenticates them, and MLflow runs code that they name: a writer to
            the artifact store could then run code here.

    Returns:
        The files that were written, which have their own names again.

    Raises:
        IntegrityError: if an encrypted file was altered, cut off or renamed. That file was not
            written, and those after it were not looked at.
        WrongKeyError: if a file was encrypted under another key.
        ConfigError: if the target is not empty.
        DataError: if there is no encrypted file.

    >>> path = folder / "model.bin.encrypted"
    >>> _ = path.write_bytes(encrypted(b"weights", name="model.bin", keys=keys))
    >>> [file.name for file in decrypt_artifacts(path, folder / "plain", keys=keys)]
    ['model.bin']
    >>> (folder / "plain" / "model.bin").read_bytes()
    b'weights'
    """
    root, folder = as_path(source, what="source"), as_path(target, what="target")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(folder)!r} is not an empty folder; nothing was decrypted.")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    if not any(file.name.endswith(SUFFIX) for file in files):
        raise DataError(f"there is no encrypted file (*{SUFFIX}) in {str(root)!r}.")
    written = []
    for file in files:
        inside = Path(file.name) if file == root else file.relative_to(root)
        if file.name.endswith(SUFFIX):
            place = folder / inside.with_name(file.name.removesuffix(SUFFIX))
            place.parent.mkdir(parents=True, exist_ok=True)
            with open_artifact(file, keys=keys) as stream, atomic_writer(place) as out:
                shutil.copyfileobj(stream, out)
        elif insecure_copy_others:
            place = folder / inside
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        else:
            continue
        written.append(place)
    return written


def _rejected(place: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"file {place.name!r} rejected: {reason.rstrip('.')}. Nothing more of it was returned."
    )


def _context(number: str) -> dict[str, str]:
    return {"purpose": "artifact", "artifact": number}
