"""An S3 bucket over TLS as the root of a dataset, and what a server or its line may do to it."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
import threading
import time

import numpy as np
import pytest

from lightning_secure.crypto.manifest import MANIFEST_NAME
from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.storage import CiphertextCache, RemoteStorage
from lightning_secure.errors import (
    ConfigError,
    ManifestMismatchError,
    ShardCorruptedError,
    StorageError,
)

ROWS = np.arange(800, dtype="int64").reshape(400, 2)


def shard_names(s3) -> list[str]:
    return [name for name in s3.names() if name.endswith(".lsec")]


def test_what_is_sealed_to_a_bucket_is_read_from_it(s3, seal, read, tmp_path):
    seal(s3.root, storage_options=s3.options)
    assert [name.split("/")[0] for name in s3.names()] == ["manifest.json"] + 5 * ["train"]
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)
    cache = CiphertextCache(tmp_path / "cache", max_bytes=10**6)
    for _ in range(2):
        got = read(s3.root, storage_options=s3.options, cache=cache)
        assert np.array_equal(got, ROWS)


def test_an_epoch_takes_large_ranges_and_a_jump_takes_what_it_needs(sealed, opened, read):
    storage = RemoteStorage(sealed.root, storage_options=sealed.options)
    data = opened(storage)
    read(data)
    # The window that brought header and tags holds these small shards whole.
    assert len(sealed.line.ranges(".lsec")) == 5
    file = storage.open(data.entry.shards[0])
    sealed.line.requests.clear()
    file._near = 100
    for offset in (5000, 4200, 5300):
        file.read_into(offset, bytearray(64))
    assert sealed.line.ranges(".lsec") == [
        f"bytes={offset}-{offset + 63}" for offset in (5000, 4200, 5300)
    ]


def test_the_datamodule_reads_from_a_bucket_also_in_a_worker_process(sealed, keys, tmp_path):
    for workers in (0, 1):
        module = EncryptedDataModule(
            sealed.root,
            keys=keys,
            batch_size=64,
            num_workers=workers,
            storage_options=sealed.options,
            cache=CiphertextCache(tmp_path / "cache", max_bytes=10**6),
        )
        module.setup("fit")
        seen = [value for (x,) in module.train_dataloader() for value in x[:, 0].tolist()]
        assert sorted(seen) == ROWS[:, 0].tolist()
        module.teardown("fit")


# ---------------------------------------------------------------- a hostile server


def test_an_object_that_is_exchanged_while_it_is_open(sealed, opened):
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, range_bytes=1)
    data = opened(storage)
    assert data[0][0].tolist() == [0, 1]
    first, second, *_ = shard_names(sealed)
    sealed.put(first, sealed.get(second))
    with pytest.raises(ShardCorruptedError, match="tag mismatch in segment 5"):
        data[55]


def test_an_object_that_is_removed_while_it_is_open(sealed, opened):
    data = opened(RemoteStorage(sealed.root, storage_options=sealed.options, range_bytes=1))
    data[0]
    name = shard_names(sealed)[0]
    sealed.client.delete_object(Bucket=sealed.bucket, Key=f"dataset/{name}")
    with pytest.raises(ShardCorruptedError, match="tag mismatch in segment 5"):
        data[55]
    with pytest.raises(ShardCorruptedError, match="cannot be opened"):
        opened(sealed.root, storage_options=sealed.options)[0]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + bytes(176)])
def test_an_object_that_was_cut_or_extended(sealed, read, change, tmp_path):
    name = shard_names(sealed)[0]
    sealed.put(name, change(sealed.get(name)))
    for cache in (None, CiphertextCache(tmp_path / "cache", max_bytes=10**6)):
        with pytest.raises(ShardCorruptedError, match="bytes where the manifest has"):
            read(sealed.root, storage_options=sealed.options, cache=cache)


def answering(s3, change, only=".lsec"):
    """Let moto answer, and change the body of what it says about shards."""

    def disturb(environ, start_response):
        if environ["REQUEST_METHOD"] != "GET" or only not in environ["PATH_INFO"]:
            return None
        status, head, body = s3.line.passed_on(environ)
        body = change(environ, body)
        told = ("content-length", "x-amz-checksum")  # this server makes its checksums agree
        head = [(name, value) for name, value in head if not name.lower().startswith(told)]
        start_response(status, [*head, ("Content-Length", str(len(body)))])
        return [body]

    s3.line.disturb = disturb


@pytest.mark.parametrize(
    "change",
    [
        lambda _, body: body[:-1] + bytes([body[-1] ^ 1]),  # other bytes
        lambda _, body: body[8:] + body[:8],  # another range
        lambda _, body: body[: len(body) // 2],  # less, with a length that agrees
    ],
)
def test_a_server_that_answers_with_other_bytes(sealed, read, change, tmp_path):
    answering(sealed, change)
    cache = CiphertextCache(tmp_path / "cache", max_bytes=10**6)
    for options in ({}, {"cache": cache}):
        with pytest.raises(ShardCorruptedError):
            read(sealed.root, storage_options=sealed.options, **options)
    sealed.line.disturb = None  # and nothing of it stays in the cache
    assert np.array_equal(read(sealed.root, storage_options=sealed.options, cache=cache), ROWS)


def test_a_server_that_answers_with_more_than_was_asked_for(sealed, read):
    answering(sealed, lambda _, body: body + bytes(100))
    with pytest.raises(StorageError, match="does not serve ranges"):
        read(sealed.root, storage_options=sealed.options)


def test_a_manifest_that_is_exchanged_or_too_large(sealed, read, monkeypatch):
    envelope = json.loads(sealed.get(MANIFEST_NAME))
    envelope["signatures"] = []
    sealed.put(MANIFEST_NAME, json.dumps(envelope).encode())
    with pytest.raises(ManifestMismatchError):
        read(sealed.root, storage_options=sealed.options)
    # The true limit is a gigabyte.
    monkeypatch.setattr("lightning_secure.data.storage.remote._MANIFEST_LIMIT", 10)
    with pytest.raises(StorageError, match="larger than"):
        read(sealed.root, storage_options=sealed.options)


def test_a_bucket_without_a_dataset(s3, read):
    with pytest.raises(ManifestMismatchError, match="not an encrypted dataset"):
        read(s3.root, storage_options=s3.options)


# ---------------------------------------------------------------- a bad line


class Fails:
    """Break off the first answers about shards, each in the way that is given."""

    def __init__(self, s3, times: int, how: str) -> None:
        self.line, self.left, self.how = s3.line, times, how
        self.line.disturb = self

    def __call__(self, environ, start_response):
        if (
            environ["REQUEST_METHOD"] != "GET"
            or ".lsec" not in environ["PATH_INFO"]
            or not self.left
        ):
            return None
        self.left -= 1
        if self.how in ("503 Slow Down", "500 Internal Server Error"):
            start_response(self.how, [("Content-Length", "0")])
            return []
        status, head, body = self.line.passed_on(environ)
        if self.how == "slow":
            time.sleep(1.0)
            body = b""
        start_response(status, head)
        return [body[: len(body) // 2]]  # fewer bytes than the header says; then it is closed


@pytest.mark.parametrize("how", ["drop", "503 Slow Down", "500 Internal Server Error"])
def test_a_line_that_breaks_is_tried_again_and_not_for_ever(sealed, read, how):
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, attempts=3)
    Fails(sealed, 2, how)
    assert np.array_equal(read(storage), ROWS)
    Fails(sealed, 10**6, how)
    sealed.line.requests.clear()
    with pytest.raises(StorageError, match="Nothing was returned") as caught:
        read(storage)
    assert len(sealed.line.ranges(".lsec")) == 3
    assert caught.value.__context__ is None


def test_a_slow_server_costs_the_timeout_and_not_more(sealed, read):
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, attempts=2, timeout=0.4)
    Fails(sealed, 1, "slow")
    assert np.array_equal(read(storage), ROWS)
    Fails(sealed, 10**6, "slow")
    start = time.monotonic()
    with pytest.raises(StorageError, match="in time"):
        read(storage)
    assert time.monotonic() - start < 2.5


def test_waiting_grows_between_the_tries(sealed, read, monkeypatch):
    waits = []
    # The clock itself is not the subject; what is asked of it is.
    monkeypatch.setattr("lightning_secure.data.storage.remote.time.sleep", waits.append)
    monkeypatch.setattr("lightning_secure.data.storage.remote._BACKOFF_SECONDS", 1.0)
    Fails(sealed, 10**6, "503 Slow Down")
    with pytest.raises(StorageError):
        read(sealed.root, storage_options=sealed.options)
    assert len(waits) == 4
    for wait, most in zip(waits, (2, 4, 5, 5), strict=True):
        assert most / 2 <= wait <= most


# ---------------------------------------------------------------- credentials


def test_credentials_that_expire_in_the_middle_are_asked_for_again(sealed, opened):
    issued = []

    def options():
        issued.append(f"AKID{len(issued)}")
        sealed.line.valid_ids = {issued[-1]}  # as with STS: the older ones have expired
        return {**sealed.options, "key": issued[-1], "token": "SESSION"}

    data = opened(RemoteStorage(sealed.root, storage_options=options, range_bytes=1))
    assert data[0][0].tolist() == [0, 1]
    assert issued == ["AKID0"]
    sealed.line.valid_ids = {"another"}
    assert data[399][0].tolist() == [798, 799]
    assert issued == ["AKID0", "AKID1"]


def test_credentials_of_the_sdks_own_chain_are_renewed(sealed, opened, monkeypatch, tmp_path):
    """A `credential_process` that gives another id each time it is asked."""
    count = tmp_path / "count"
    count.write_text("0")
    program = tmp_path / "credentials.py"
    program.write_text(
        "import json, pathlib\n"
        f"count = pathlib.Path({str(count)!r})\n"
        "number = int(count.read_text()) + 1\n"
        "count.write_text(str(number))\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'AKID{number}', 'SecretAccessKey': 's'}))"
    )
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    sealed.line.valid_ids = {"AKID1"}
    options = {"client_kwargs": sealed.options["client_kwargs"]}
    data = opened(RemoteStorage(sealed.root, storage_options=options, range_bytes=1))
    data[0]
    sealed.line.valid_ids = {"AKID2"}
    assert data[399][0].tolist() == [798, 799]
    assert count.read_text() == "2"


def test_threads_whose_credentials_expire_renew_them_once(sealed, opened):
    asked = []

    def options():
        asked.append(1)
        return {**sealed.options, "key": f"AKID{len(asked)}"}

    storage = RemoteStorage(sealed.root, storage_options=options)
    entries = opened(storage).entry.shards
    files = [storage.open(entry) for entry in entries]
    sealed.line.valid_ids = {"AKID2"}
    failed = []

    def work(file):
        try:
            file.read_into(0, bytearray(64))
        except StorageError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(asked), failed) == (2, [])


def test_credentials_that_stay_refused_are_not_tried_for_ever(sealed, read):
    sealed.line.valid_ids = set()
    with pytest.raises(StorageError, match="refused"):
        read(sealed.root, storage_options=sealed.options)
    assert len(sealed.line.requests) <= 4


def test_credentials_are_in_no_error_log_repr_or_pickle(sealed, read, caplog, keys):
    caplog.set_level(logging.DEBUG, logger="lightning_secure")
    secrets = (sealed.options["secret"], sealed.options["key"])
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, attempts=1)
    told = [repr(storage), str(storage)]
    Fails(sealed, 10**6, "drop")
    with pytest.raises(StorageError) as caught:
        read(storage)
    told += [str(caught.value), repr(caught.value.__context__), repr(caught.value.__cause__)]
    with pytest.raises(ConfigError, match="may hold credentials") as caught:
        pickle.dumps(storage)
    told.append(str(caught.value))
    module = EncryptedDataModule(
        sealed.root, keys=keys, batch_size=8, storage_options=sealed.options
    )
    with pytest.raises(ConfigError, match="may hold credentials"):
        pickle.dumps(module)
    told += [repr(module), str(module.hparams), caplog.text]
    assert not [text for text in told if any(secret in text for secret in secrets)]


def test_what_holds_no_credentials_is_pickled(s3):
    harmless = {"anon": True, "client_kwargs": {"region_name": "us-east-1"}}
    for options in (harmless, len, None):
        storage = RemoteStorage(s3.root, storage_options=options, attempts=7)
        copy = pickle.loads(pickle.dumps(storage))
        assert (str(copy), copy._attempts, copy._options) == (s3.root, 7, options or {})
        assert re.search("secret|SECRET", repr(pickle.dumps(storage))) is None


def test_options_that_make_no_connection(s3):
    with pytest.raises(StorageError, match="cannot be connected to"):
        RemoteStorage(s3.root, storage_options={"client_kwargs": {"nonsense": 1}}).size("x")
