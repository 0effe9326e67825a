"""A storage system, driven by ``attacks.py`` over pipes, with the real library.

Runs in the environment of that library. Each line of JSON on standard input is one task, which runs
in a process of its own: a crash, a hang or a cache of one says nothing about the next.

A dataset has the splits ``train`` and ``val`` of 200 rows; row ``i`` is ``(first + i, i)``.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS, SHARDS, VAL = 200, 4, 1000
PER_SHARD = ROWS // SHARDS
TIMEOUT = 10.0
Parts = dict[str, list[list[int]]]


def rows_of(first: int) -> np.ndarray[Any, Any]:
    return np.stack([np.arange(first, first + ROWS), np.arange(ROWS)], axis=1).astype("int64")


class System:
    """A library.

    ``refusals`` and ``texts``: the types, and words of the messages, of errors with which it says
    that the data are not right; any other error is a crash.
    """

    packages: tuple[str, ...] = ()
    refusals: tuple[type[BaseException], ...] = ()
    texts: tuple[str, ...] = ()
    encrypted = True

    def seal(self, root: Path, keys: Path, first: int) -> Parts:
        """Write both splits; return for each shard two ranges of one length that hold rows."""
        parts: Parts = {}
        for split, start in (("train", first), ("val", first + VAL)):
            parts |= self.seal_split(root / split, keys, rows_of(start))
        return {os.path.relpath(name, root): ranges for name, ranges in parts.items()}

    def seal_split(self, folder: Path, keys: Path, rows: Any) -> Parts:
        raise NotImplementedError

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        raise NotImplementedError


class LitData(System):
    """litdata: chunks and an index; in the clear, or with Fernet as it offers it."""

    packages = ("litdata",)

    def __init__(self, level: str | None) -> None:
        from cryptography.fernet import InvalidToken

        self.level = level
        self.refusals = (InvalidToken,)
        self.texts = ("does not match index.json", "Timed out")

    def encryption(self, keys: Path) -> Any:
        from litdata.utilities.encryption import FernetEncryption

        if self.level is None or not self.encrypted:
            return None
        keys.mkdir(parents=True, exist_ok=True)
        path, password = keys / "salt", keys.name * 16  # the salt is what litdata keeps
        if not path.exists():
            FernetEncryption(password=password, level=self.level).save(str(path))
        return FernetEncryption.load(str(path), password)

    def seal_split(self, folder: Path, keys: Path, rows: Any) -> Parts:
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir(parents=True)
        writer = BinaryWriter(str(folder), chunk_size=PER_SHARD, encryption=self.encryption(keys))
        for number, row in enumerate(rows):
            writer[number] = {"x": row}
        writer.done()
        writer.merge()
        parts: Parts = {}
        for path in sorted(folder.glob("*.bin")):
            parts[str(path)] = []
            if self.level != "chunk":  # then a chunk is one token, with no parts
                first, second, third = np.frombuffer(path.read_bytes(), "<u4", 3, 4).tolist()
                parts[str(path)] = [[first, second - first], [second, third - second]]
        return parts

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        from litdata import StreamingDataset

        data = StreamingDataset(
            str(root / "train"), shuffle=False, encryption=self.encryption(keys)
        )
        return [np.asarray(data[i]["x"]).tolist() for i in range(len(data))]


class Mds(System):
    """MosaicML streaming: shards and an index with their hashes; in the clear."""

    packages = ("mosaicml-streaming",)
    texts = ("unsafe type", "Checksum failure")

    def __init__(self) -> None:
        import peers

        self.library = peers.mosaicml_streaming()

    def seal_split(self, folder: Path, keys: Path, rows: Any) -> Parts:
        with self.library.MDSWriter(
            out=str(folder), columns={"x": "ndarray:int64:2"}, size_limit=1112, hashes=["sha1"]
        ) as writer:
            for row in rows:
                writer.write({"x": row})
        parts: Parts = {}
        for path in sorted(folder.glob("*.mds")):
            first, second, third = np.frombuffer(path.read_bytes(), "<u4", 3, 4).tolist()
            parts[str(path)] = [[first, second - first], [second, third - second]]
        return parts

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        self.library.util.clean_stale_shared_memory()
        data = self.library.StreamingDataset(
            local=str(root / "train"), shuffle=False, batch_size=1, validate_hash="sha1"
        )
        return [np.asarray(data[i]["x"]).tolist() for i in range(len(data))]


class Parquet(System):
    """Modular encryption as pyarrow offers it: master keys in a key service, wrapped data keys."""

    packages = ("pyarrow",)
    texts = ("Parquet magic bytes not found",)

    def __init__(self) -> None:
        from cryptography.exceptions import InvalidTag

        # What Arrow turns a failed decryption into, and what our key service raises.
        self.refusals = (OSError, InvalidTag)

    def factory(self, keys: Path) -> tuple[Any, Any]:
        import pyarrow.parquet.encryption as pe
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        keys.mkdir(parents=True, exist_ok=True)
        if not (keys / "master").exists():
            (keys / "master").write_bytes(os.urandom(32))
        cipher = AESGCM((keys / "master").read_bytes())

        class Service(pe.KmsClient):  # type: ignore[misc] # no types
            def wrap_key(self, key: bytes, name: str) -> bytes:
                nonce = os.urandom(12)
                return base64.b64encode(nonce + cipher.encrypt(nonce, key, name.encode()))

            def unwrap_key(self, wrapped: bytes, name: str) -> bytes:
                blob = base64.b64decode(wrapped)
                return cipher.decrypt(blob[:12], blob[12:], name.encode())

        return pe.CryptoFactory(lambda _: Service()), pe.KmsConnectionConfig()

    def encrypting(self, path: Path, keys: Path) -> Any:
        import pyarrow.parquet.encryption as pe

        crypto, service = self.factory(keys)
        config = pe.EncryptionConfiguration(
            footer_key="footer", column_keys={"columns": ["a", "b"]}, data_key_length_bits=256
        )
        return crypto.file_encryption_properties(service, config)

    def decrypting(self, path: Path, keys: Path) -> Any:
        import pyarrow.parquet.encryption as pe

        crypto, service = self.factory(keys)
        return crypto.file_decryption_properties(service, pe.DecryptionConfiguration())

    def seal_split(self, folder: Path, keys: Path, rows: Any) -> Parts:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder.mkdir(parents=True)
        parts: Parts = {}
        for shard in range(SHARDS):
            mine = rows[shard * PER_SHARD : (shard + 1) * PER_SHARD]
            table = pa.table({"a": mine[:, 0], "b": mine[:, 1]})
            path = folder / f"part-{shard}.parquet"
            properties = self.encrypting(path, keys) if self.encrypted else None
            with pq.ParquetWriter(
                path, table.schema, encryption_properties=properties,
                compression="none", use_dictionary=False,
            ) as writer:  # fmt: skip
                writer.write_table(table, row_group_size=PER_SHARD // 2)
            if properties is None:
                continue
            keyed = self.decrypting(path, keys)
            metadata = pq.ParquetFile(path, decryption_properties=keyed).metadata
            chunks = [metadata.row_group(group).column(0) for group in range(2)]
            parts[str(path)] = [[c.data_page_offset, c.total_compressed_size] for c in chunks]
        return parts

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        import pyarrow.dataset as pd
        import pyarrow.parquet.encryption as pe

        crypto, service = self.factory(keys)
        config = pd.ParquetDecryptionConfig(
            crypto, service, pe.DecryptionConfiguration(cache_lifetime=dt.timedelta(minutes=5))
        )
        options = pd.ParquetFragmentScanOptions(decryption_config=config)
        form = pd.ParquetFileFormat(default_fragment_scan_options=options)
        files = [str(path) for path in sorted((root / "train").glob("*.parquet"))]
        table = pd.dataset(files, format=form).to_table()
        rows: list[Any] = np.stack([table[name].to_numpy() for name in "ab"], axis=1).tolist()
        return rows


class ParquetPrefix(Parquet):
    """Modular encryption as pyarrow offers it to who brings the keys: one key, AAD prefixes.

    The prefix names the dataset, the split and the file, and the reader knows what to expect.
    """

    def properties(self, path: Path, keys: Path, *, reading: bool) -> Any:
        import pyarrow.parquet.encryption as pe

        self.factory(keys)  # makes the key
        key = (keys / "master").read_bytes()
        dataset = "other" if path.parent.parent.name in ("other", "stranger") else "mine"
        prefix = f"{dataset}/{path.parent.name}/{path.name}".encode()
        if reading:
            return pe.create_decryption_properties(key, aad_prefix=prefix)
        return pe.create_encryption_properties(key, aad_prefix=prefix, store_aad_prefix=False)

    def encrypting(self, path: Path, keys: Path) -> Any:
        return self.properties(path, keys, reading=False)

    def decrypting(self, path: Path, keys: Path) -> Any:
        return self.properties(path, keys, reading=True)

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        import pyarrow.parquet as pq

        rows: list[Any] = []
        for path in sorted((root / "train").glob("*.parquet")):
            with pq.ParquetFile(path, decryption_properties=self.decrypting(path, keys)) as file:
                table = file.read()
            rows += np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1).tolist()
        return rows


class Ours(System):
    """The system of this package."""

    packages = ("lightning-secure",)

    def __init__(self) -> None:
        from lightning_secure.errors import IntegrityError, KeyAccessError

        self.refusals = (IntegrityError, KeyAccessError)

    def provider(self, keys: Path) -> Any:
        from lightning_secure import LocalKeyProvider

        path = keys / "project.kek"
        return LocalKeyProvider(path) if path.exists() else LocalKeyProvider.generate(path)

    def seal_split(self, folder: Path, keys: Path, rows: Any) -> Parts:
        from lightning_secure import EncryptedShardWriter

        with EncryptedShardWriter(
            folder.parent, split=folder.name, keys=self.provider(keys),
            segment_bytes=160, shard_bytes=16 * PER_SHARD, replace=True,
        ) as writer:  # fmt: skip
            writer.write_batch({"x": rows})
        return {
            str(path): [[4096, 176], [4096 + 176, 176]] for path in sorted(folder.glob("*.lsec"))
        }

    def read(self, root: Path, keys: Path, **pins: Any) -> list[Any]:
        from lightning_secure import EncryptedShardDataset

        data = EncryptedShardDataset(root, split="train", keys=self.provider(keys), **pins)
        (x,) = data.__getitems__(range(len(data))).batch()
        rows: list[Any] = x.tolist()
        return rows


SYSTEMS: dict[str, Any] = {
    "lightning_secure": Ours,
    "litdata": lambda: LitData(None),
    "litdata Fernet, chunk": lambda: LitData("chunk"),
    "litdata Fernet, sample": lambda: LitData("sample"),
    "Parquet, key service": Parquet,
    "Parquet, AAD prefix": ParquetPrefix,
    "MosaicML MDS": Mds,
}


def run(system: System, task: dict[str, Any]) -> dict[str, Any]:
    root, keys = Path(task["root"]), Path(task["keys"])
    if task["do"] == "seal":
        return {"parts": system.seal(root, keys, task["first"])}
    if task["do"] == "seal plaintext":
        system.encrypted = False
        return {"parts": system.seal(root, keys, task["first"]), "root": str(root)}
    try:
        return {"rows": system.read(root, keys, **task.get("pins", {}))}
    except Exception as error:  # noqa: BLE001 - what it raises is the result
        meant = isinstance(error, system.refusals) or any(t in str(error) for t in system.texts)
        kind = "refused" if meant else "crashed"
        return {kind: type(error).__name__, "message": str(error)[:200]}


def apart(system: System, task: dict[str, Any]) -> dict[str, Any]:
    """Run a task in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.dup2(2, 1)  # libraries print
                result = run(system, task)
                answer.with_suffix(".tmp").write_text(json.dumps(result))
                answer.with_suffix(".tmp").rename(answer)
            os._exit(0)
        end = time.monotonic() + (TIMEOUT if task["do"] == "read" else 60)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"hung": TIMEOUT}
            time.sleep(0.005)
        if not answer.exists():
            return {"crashed": "process died", "message": ""}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def version(package: str) -> str:
    if package == "lightning-secure":
        import lightning_secure

        return lightning_secure.__version__
    return importlib.metadata.version(package)


def main() -> None:
    system: System = SYSTEMS[sys.argv[1]]()
    print(json.dumps({name: version(name) for name in system.packages}), flush=True)
    for line in sys.stdin:
        print(json.dumps(apart(system, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
