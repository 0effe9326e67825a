"""The attacker's moves in ``attacks.py``: a few lines each, with the files alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack_systems import PER_SHARD

OURS = "lightning_secure"


@dataclass(frozen=True)
class Dataset:
    """The attacker's material: the folder, older and other states, and where rows lie in shards."""

    system: str
    root: Path
    old: Path
    other: Path
    stranger: Path
    parts: dict[str, list[list[int]]]

    def shards(self, split: str = "train", root: Path | None = None) -> list[Path]:
        found = (root or self.root) / split
        return sorted(p for p in found.iterdir() if p.suffix not in (".json", ".tmp"))

    @property
    def index(self) -> Path | None:
        paths = (self.root / "manifest.json", self.root / "train" / "index.json")
        return next((path for path in paths if path.exists()), None)

    def edit(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the index; where it is signed, the old signature stays."""
        if self.index is None:
            raise NotApplicableError
        value = json.loads(self.index.read_bytes())
        if self.system == OURS:
            payload = json.loads(base64.b64decode(value["payload"]))
            change(payload["splits"]["train"])
            packed = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
            value["payload"] = base64.b64encode(packed).decode()
        else:
            change(value)
        self.index.write_text(json.dumps(value, sort_keys=True, separators=(",", ":")))

    def correct(self) -> None:
        """Make an unprotected index agree with the files again."""
        if self.system == OURS or self.index is None:
            return

        def change(value: dict[str, Any]) -> None:
            for chunk in value.get("chunks", []):
                path = self.root / "train" / chunk["filename"]
                chunk["chunk_bytes"] = path.stat().st_size - 4 * (chunk["chunk_size"] + 2)
            for shard in value.get("shards", []):
                raw = shard["raw_data"]
                data = (self.root / "train" / raw["basename"]).read_bytes()
                raw["bytes"] = len(data)
                raw["hashes"] = {"sha1": hashlib.sha1(data).hexdigest()}

        self.edit(change)


class NotApplicableError(Exception):
    """The system has nothing that this attack could be made on."""


def entries(value: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = value["chunks"] if "chunks" in value else value["shards"]
    return found


# ---------------------------------------------------------------- the attacks


def swap_shards(data: Dataset) -> None:
    a, b, *_ = data.shards()
    exchange(a, b)
    data.correct()


def exchange(a: Path, b: Path) -> None:
    left, right = a.read_bytes(), b.read_bytes()
    a.write_bytes(right), b.write_bytes(left)


def foreign_shard(data: Dataset) -> None:
    shutil.copyfile(data.shards(root=data.other)[1], data.shards()[1])
    data.correct()


def replayed_shard(data: Dataset) -> None:
    shutil.copyfile(data.shards(root=data.old)[1], data.shards()[1])
    data.correct()


def exchanged_splits(data: Dataset) -> None:
    for a, b in zip(data.shards("train"), data.shards("val"), strict=True):
        exchange(a, b)
    data.correct()


def dropped_shard(data: Dataset) -> None:
    data.shards()[1].unlink()
    if data.index is not None:

        def change(value: dict[str, Any]) -> None:
            del entries(value)[1]
            if data.system == OURS:
                for number, shard in enumerate(value["shards"]):
                    shard["number"] = number

        data.edit(change)


def truncated_shard(data: Dataset) -> None:
    path = data.shards()[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data.correct()


def extended_shard(data: Dataset) -> None:
    path = data.shards()[1]
    path.write_bytes(path.read_bytes() + bytes(176))
    data.correct()


def reordered_rows(data: Dataset) -> None:
    path = data.shards()[1]
    parts = data.parts[str(path.relative_to(data.root))]
    if not parts:
        raise NotApplicableError
    (a, length), (b, other) = parts
    raw = bytearray(path.read_bytes())
    size = min(length, other)
    raw[a : a + size], raw[b : b + size] = raw[b : b + size], raw[a : a + size]
    path.write_bytes(raw)
    data.correct()


def flipped_bit(data: Dataset) -> None:
    path = data.shards()[1]
    raw = bytearray(path.read_bytes())
    parts = data.parts[str(path.relative_to(data.root))]
    start, length = parts[0] if parts else (len(raw) - 60, 60)
    raw[start + 3 * length // 4] ^= 4
    path.write_bytes(raw)
    data.correct()


def lowered_count(data: Dataset) -> None:
    def change(value: dict[str, Any]) -> None:
        entry = entries(value)[1]
        for name in ("chunk_size", "samples", "records"):
            if name in entry:
                entry[name] -= 10

    data.edit(change)


def edited_type(data: Dataset) -> None:
    """The same bytes, read as floating-point numbers."""

    def change(value: dict[str, Any]) -> None:
        if "config" in value:
            form = value["config"]["data_format"][0]
            value["config"]["data_format"][0] = form.split(":")[0] + ":" + FLOAT64_IN_LITDATA
        elif "schema" in value:
            value["schema"][0]["dtype"] = "float64"
        else:
            for shard in value["shards"]:
                shard["column_encodings"] = ["ndarray:float64:2"]

    data.edit(change)


FLOAT64_IN_LITDATA = "10"  # its number in litdata's list of numpy types; int64 is 3


def edited_schema_to_code(data: Dataset) -> None:
    """The index says that rows are pickled, and one is."""
    if data.system == OURS or data.system.startswith("Parquet"):
        raise NotApplicableError  # neither knows such a type
    payload = pickle.dumps(Payload(data.root.parent / "ran"))
    row = struct.pack("<I", len(payload)) + payload
    path = data.shards()[0]
    litdata = data.system.startswith("litdata")
    # Both: count, offsets, rows; MDS also describes the columns before the rows.
    described = b"" if litdata else json.dumps(PICKLED, sort_keys=True).encode()
    count = PER_SHARD if litdata else struct.unpack_from("<I", path.read_bytes())[0]
    start = 4 * (count + 2) + len(described)
    table = [start + len(row) * i for i in range(count + 1)]
    path.write_bytes(struct.pack(f"<{count + 2}I", count, *table) + described + row * count)
    if litdata:
        data.edit(lambda value: value["config"].update(data_format=["pickle"], encryption=None))
    else:

        def change(value: dict[str, Any]) -> None:
            for shard in value["shards"]:
                shard.update(PICKLED)

        data.edit(change)
    data.correct()


PICKLED = {"column_encodings": ["pkl"], "column_names": ["x"], "column_sizes": [None]}


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def pipe_as_shard(data: Dataset) -> None:
    path = data.shards()[1]
    path.unlink()
    os.mkfifo(path)


def another_signer(data: Dataset) -> None:
    """All of it made by a stranger, under keys of their own."""
    put(data.stranger, data.root)


def put(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)


def roll_back(data: Dataset) -> None:
    put(data.old, data.root)


def exchanged_keys(data: Dataset) -> None:
    if data.system != OURS:
        raise NotApplicableError  # keys are not kept one by one, or lie in the shard itself

    def change(value: dict[str, Any]) -> None:
        a, b, *_ = value["shards"]
        a["wrapped_key"], b["wrapped_key"] = b["wrapped_key"], a["wrapped_key"]

    data.edit(change)


ATTACKS: dict[str, Callable[[Dataset], None]] = {
    "two shards exchanged": swap_shards,
    "a shard of another dataset, same key": foreign_shard,
    "an older shard replayed": replayed_shard,
    "train and val exchanged": exchanged_splits,
    "a shard dropped": dropped_shard,
    "a shard cut in half": truncated_shard,
    "a shard extended": extended_shard,
    "rows of a shard exchanged": reordered_rows,
    "a bit flipped": flipped_bit,
    "a shard's row count lowered": lowered_count,
    "a column's type changed": edited_type,
    "wrapped keys exchanged": exchanged_keys,
    "plaintext in place of the dataset": another_signer,
    "a stranger's dataset": another_signer,
    "rows declared as pickled": edited_schema_to_code,
    "a pipe in place of a shard": pipe_as_shard,
    "an older, complete state": roll_back,
    "the same, with a pin": roll_back,
}
