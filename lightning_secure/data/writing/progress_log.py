"""The progress of a sealing, kept so that a killed one can go on.

Each line of the journal is a DSSE envelope, signed like a manifest but as a type of its own, and
names the digest of the line before. Nothing is believed that the sealer did not sign: a writer to
the storage can cut lines off, which costs time and no row, and nothing else. Of the source the
journal holds a keyed digest only, so that no guess of the plaintext can be tested against it.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.keys import KeyProvider, WrappedKey
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.signing import open_envelope, seal_envelope
from lightning_secure.data.format.columns import Schema
from lightning_secure.data.manifests.garbage import SEALING_JOURNAL_NAME
from lightning_secure.data.shards.shard import shard_name
from lightning_secure.errors import ConfigError, IntegrityError
from lightning_secure.util.append_log import AppendLog, whole_lines
from lightning_secure.util.files import sync_directory

JOURNAL_NAME: Final = SEALING_JOURNAL_NAME
PAYLOAD_TYPE: Final = "application/vnd.lightning-secure.sealing.v1+json"
#: The longest line that is read, in bytes: a shard's entry has a few hundred for each segment.
_MAX_LINE: Final = 1 << 26
_FIELDS: Final = {
    "begin": {"version", "dataset_id", "split", "partitions", "settings", "source"},
    "schema": {"columns"},
    "start": {"number", "uuid"},
    "shard": {"entry"},
}


def source_mark(partition: PartitionKey, source_id: str) -> str:
    """Return what stands for a source in journal and manifest: HMAC-SHA256, in hexadecimal.

    Its key is derived from the split's random partition key, so the mark tells nothing to those
    who cannot read the rows anyway.
    """
    key = partition.subkey("sealing-source").derive(info=b"lsec/v1/source-mark")
    return hmac.digest(key, source_id.encode(), hashlib.sha256).hex()


@dataclass(kw_only=True)
class Progress:
    """The content of a journal.

    Attributes:
        dataset_id: 16 bytes.
        split: Name of the split.
        partitions: Wrapped keys by partition.
        settings: What the rows and shards were made with.
        source: From :func:`source_mark`.
        schema: The columns, once they were known.
        shards: Those that are done, from number 0 on without a gap.
        started: uuid by number of the shards that were begun and are not among ``shards``.
    """

    dataset_id: bytes
    split: str
    partitions: Mapping[str, tuple[WrappedKey, ...]]
    settings: Mapping[str, Any]
    source: str
    schema: Schema | None = None
    shards: list[ShardEntry] = field(default_factory=list)
    started: list[tuple[int, bytes]] = field(default_factory=list)

    def remove_unfinished(self, folder: Path, *, keep: Collection[str]) -> None:
        """Remove the files of shards that were begun and not written down as done.

        Args:
            folder: The split's folder.
            keep: Files, by their path below the dataset, that a manifest names.
        """
        for number, uuid in self.started:
            name = shard_name(number, uuid)
            if f"{folder.name}/{name}" not in keep:
                (folder / name).unlink(missing_ok=True)
                for temporary in folder.glob(f".{name}.*.tmp"):
                    temporary.unlink(missing_ok=True)
        self.started = []

    def remove_all(self, folder: Path, *, keep: Collection[str]) -> None:
        """Remove the files of all shards that no manifest names, see `remove_unfinished`."""
        self.started += [(entry.number, entry.uuid) for entry in self.shards]
        self.shards = []
        self.remove_unfinished(folder, keep=keep)


class ProgressLog:
    """The journal of one split's sealing, held open under a lock.

    Args:
        folder: The split's folder.
        keys: Signs what is written; nothing that another signed is believed.

    Raises:
        ConfigError: if another sealing of this split is at work, or the file cannot be opened.

    A line that could not be written whole, for example to a full disk, is cut off again, and no
    other follows it: what was written down before stays good to be resumed.
    """

    def __init__(self, folder: Path, keys: KeyProvider) -> None:
        self._path = folder / JOURNAL_NAME
        self._signer = keys.signer
        self._seq = 0
        self._digest = ""
        self._broken = False
        self._log = _open_locked(self._path)
        sync_directory(folder)

    @property
    def empty(self) -> bool:
        """Whether nothing is written down."""
        return self._log.end == 0

    def read(self) -> Progress | None:
        """Return what the journal says, or None if nothing was begun.

        A last line without its end is what a crash leaves, and is cut off.

        Raises:
            IntegrityError: if a line was altered, left out, moved, or is not of this sealer.
        """
        progress: Progress | None = None
        self._seq, self._digest = 0, ""
        whole = 0
        too_long = (
            f"the sealing's journal {str(self._path)!r} has a line of more than {_MAX_LINE} bytes, "
            "which is no sealer's. Nothing was sealed; start anew with resume=False."
        )
        for line in whole_lines(os.dup(self._log.fd), limit=_MAX_LINE, too_long=too_long):
            kind, record = self._parse(line[:-1])
            progress = _apply(progress, kind, record)
            whole += len(line)
        self._log.cut(whole)
        return progress

    def clear(self) -> None:
        """Forget what was written; the file stays, locked."""
        self._log.cut(0)
        self._seq, self._digest = 0, ""

    def begin(self, progress: Progress) -> None:
        """Write down what the sealing is made with, in place of whatever was there."""
        self.clear()
        self._append(
            "begin",
            {
                "version": 1,
                "dataset_id": progress.dataset_id.hex(),
                "split": progress.split,
                "partitions": {
                    name: [key.to_json() for key in keys]
                    for name, keys in progress.partitions.items()
                },
                "settings": dict(progress.settings),
                "source": progress.source,
            },
        )

    def columns(self, schema: Schema) -> None:
        """Write down the columns."""
        self._append("schema", {"columns": schema.to_json()})

    def start(self, number: int, uuid: bytes) -> None:
        """Write down that a file of this name may appear from now on."""
        self._append("start", {"number": number, "uuid": uuid.hex()}, flush=False)

    def done(self, entry: ShardEntry) -> None:
        """Write down that a shard, and all before it, are on the disk."""
        self._append("shard", {"entry": entry.to_json()})

    def close(self, *, remove: bool) -> None:
        """Let go of the lock.

        Args:
            remove: Whether the file goes: the sealing is over, one way or the other.
        """
        if remove and self._log.fd >= 0:
            self._path.unlink(missing_ok=True)
        self._log.close()

    def _append(self, kind: str, record: Mapping[str, Any], *, flush: bool = True) -> None:
        payload = canonical_json(
            {"kind": kind, "seq": self._seq, "previous": self._digest, "record": dict(record)}
        )
        line = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=self._signer) + b"\n"
        if self._broken:
            raise OSError(errno.EIO, "an earlier line of the sealing's journal was not written")
        try:
            self._log.append(line, flush=flush)
        except BaseException:
            # Shards that other threads finish are written down after this: not behind half a line.
            self._broken = True
            raise
        self._seq, self._digest = self._seq + 1, hashlib.sha256(payload).hexdigest()

    def _parse(self, line: bytes) -> tuple[str, dict[str, Any]]:
        what = f"the sealing's journal {str(self._path)!r}"
        trusted = {self._signer.key_id: self._signer.public_key}
        payload = open_envelope(line, payload_type=PAYLOAD_TYPE, trusted=trusted, what=what)
        value = parse_json_object(payload, what=what)
        kind, record = value.get("kind"), value.get("record")
        if (
            value.keys() != {"kind", "seq", "previous", "record"}
            or (value["seq"], value["previous"]) != (self._seq, self._digest)
            or not isinstance(kind, str)
            or not isinstance(record, dict)
            or record.keys() != _FIELDS.get(kind)
        ):
            raise IntegrityError(
                f"{what} has a line that does not follow the one before: lines were taken out or "
                "exchanged. Nothing was sealed; start anew with resume=False."
            )
        self._seq, self._digest = self._seq + 1, hashlib.sha256(payload).hexdigest()
        return kind, record


def _open_locked(path: Path) -> AppendLog:
    try:
        return AppendLog(path, os.O_CREAT | os.O_NOFOLLOW)
    except BlockingIOError:
        raise ConfigError(
            f"split {path.parent.name!r} of {str(path.parent.parent)!r} is being sealed by "
            "another process or writer. Nothing was done."
        ) from None
    except OSError as error:
        reason = error.strerror
    raise ConfigError(f"the journal {str(path)!r} cannot be opened ({reason}).")


def _apply(progress: Progress | None, kind: str, record: dict[str, Any]) -> Progress:
    """Return the progress after one more line; all lines are this sealer's own."""
    if (kind == "begin") != (progress is None):
        raise IntegrityError("the sealing's journal begins twice or not at all. Nothing was done.")
    if progress is None:
        if record["version"] != 1:
            raise IntegrityError("the sealing's journal has a version that cannot be read.")
        return Progress(
            dataset_id=bytes.fromhex(record["dataset_id"]),
            split=record["split"],
            partitions={
                name: tuple(WrappedKey.from_json(key) for key in keys)
                for name, keys in record["partitions"].items()
            },
            settings=record["settings"],
            source=record["source"],
        )
    if kind == "schema":
        progress.schema = Schema.from_json(record["columns"])
    elif kind == "start":
        progress.started.append((record["number"], bytes.fromhex(record["uuid"])))
    else:
        entry = ShardEntry.from_json(record["entry"])
        if entry.number != len(progress.shards):
            raise IntegrityError("the sealing's journal skips a shard. Nothing was done.")
        progress.shards.append(entry)
        progress.started = [item for item in progress.started if item[1] != entry.uuid]
    return progress
