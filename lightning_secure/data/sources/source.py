"""A source of rows to seal: batches that are always the same, in the same order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from typing_extensions import Buffer

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from lightning_secure.anonymize import AnonymizationPlan

#: Plaintext that a source should hand over at once: large enough that the cost of a call does not
#: matter, small beside a shard.
BATCH_BYTES: Final = 4 * 1024 * 1024
_MOST_ROWS: Final = 4096
_PIECE: Final = 2**30

Batch = dict[str, Any]


class Source(ABC):
    """Rows on their way to be sealed."""

    @property
    def rows(self) -> int | None:
        """The number of rows, if it is known beforehand."""
        return None

    @property
    def remarks(self) -> Mapping[str, str]:
        """Remarks on the rows for the signed manifest, known once they were read."""
        return {}

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield columns of about ``BATCH_BYTES``, from row ``start`` on.

        Raises:
            DataError: if a row cannot be sealed. The message names column and row, and no value.
        """

    @abstractmethod
    def identity(self) -> str | None:
        """Return what changes whenever the rows do, or None if that cannot be told."""

    def planned(self, plan: AnonymizationPlan | None) -> Source:
        """Return the source as it must come to be changed by ``plan``."""
        return self

    def shown(self, plan: AnonymizationPlan) -> Source:
        """Return the source as it must come to be looked at with ``plan``."""
        return self.planned(plan)


def gathered(rows: Iterable[Mapping[str, Any]], *, first_row: int) -> Iterator[Batch]:
    """Yield columns of many rows each, out of rows one by one.

    Raises:
        DataError: if a row is no mapping, or has other columns than the one before it.
    """
    names: tuple[str, ...] = ()
    batch: Batch = {}
    size = count = 0
    for number, row in enumerate(rows, first_row):
        if not isinstance(row, Mapping):
            raise DataError(
                f"row {number} is a {type(row).__name__}; a row is a mapping of values by column. "
                "Nothing of the split was put into the dataset."
            )
        if row.keys() != set(names) or not names:
            if names:
                raise DataError(
                    f"row {number} has other columns than the rows before it. Nothing of the "
                    "split was put into the dataset."
                )
            names = tuple(row)
            batch = {name: [] for name in names}
        for name, values in batch.items():
            value = row[name]
            values.append(value)
            size += size_of(value)
        count += 1
        if size >= BATCH_BYTES or count >= _MOST_ROWS:
            yield batch
            batch = {name: [] for name in names}
            size = count = 0
    if count:
        yield batch


class Checksum:
    """A fast sum of many byte strings, to see that a source is the one it was.

    It is there against mistakes, at the speed of memory where SHA-256 would take longer than the
    encryption. The caller who chooses the source can seal any rows, and so gains nothing by
    two sources with one sum. Manifest and journal hold a keyed digest of it and never itself.

    Source:
        GMAC, SP 800-38D, under a public key and with the count of the string as nonce; the tags
        are hashed with SHA-256.

    >>> one, other = Checksum(), Checksum()
    >>> one.update(b"ab", b"c")
    >>> other.update(b"abc")
    >>> one.hexdigest() == other.hexdigest()
    False
    """

    def __init__(self) -> None:
        self._gmac = AESGCM(bytes(32))
        self._tags = hashlib.sha256()
        self._count = 0

    def update(self, *parts: Buffer) -> None:
        """Add byte strings; two that follow each other are not their concatenation."""
        for part in parts:
            with memoryview(part).cast("B") as view:
                for start in range(0, max(1, len(view)), _PIECE):
                    nonce = self._count.to_bytes(12, "little")
                    self._tags.update(self._gmac.encrypt(nonce, b"", view[start : start + _PIECE]))
                    self._count += 1

    def hexdigest(self) -> str:
        """Return the sum so far."""
        return self._tags.hexdigest()


def size_of(value: Any) -> int:
    """Return about how many bytes a value takes."""
    if isinstance(value, str | bytes):
        return len(value)
    return int(getattr(value, "nbytes", 8))


def files_identity(paths: Iterable[Path], *, root: Path) -> str:
    """Return what changes whenever one of the files does: a digest of names, sizes and times.

    The content is not read twice for it. The time of the last change of the inode is among them,
    which cannot be set back; a file that was merely moved counts as changed.
    """
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        name = path.relative_to(root).as_posix() if path != root else path.name
        digest.update(canonical_json([name.encode(errors="surrogateescape").hex(), *times]))
    return f"files:{digest.hexdigest()}"


def extra(module: str, name: str, *, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: What to import.
        name: The extra of this package that brings it.
        what: What needs it, for the error.

    Raises:
        MissingExtraError: if the package is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        pass
    raise MissingExtraError(
        f"{what} needs {module.split('.')[0]}, which is not installed. Nothing was sealed. "
        f"pip install 'lightning-secure[{name}]'"
    )
