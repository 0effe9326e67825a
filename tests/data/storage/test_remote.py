"""Any file system of fsspec as the root of a dataset."""

from __future__ import annotations

import multiprocessing
import pickle
import ssl
import sys
import threading
import uuid

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.storage import CiphertextCache, RemoteStorage, open_storage
from lightning_secure.data.writing.upload import upload_split
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    ConfigError,
    MissingExtraError,
    ShardCorruptedError,
    StorageError,
)

ROWS = np.arange(800, dtype="int64").reshape(400, 2)


@pytest.fixture
def url(local, keys):
    root = f"{uuid.uuid4().hex}/dataset"
    upload_split(local, f"memory://{root}", split="train", keys=keys)
    yield f"memory://{root}"
    fsspec.filesystem("memory").rm(f"/{root}", recursive=True)


@pytest.fixture
def fails(monkeypatch):
    """Let fsspec's memory raise these errors, one for each read, before it works."""
    errors: list[BaseException] = []
    read = MemoryFileSystem.cat_file

    def cat_file(self, path, **options):
        if errors and ".lsec" in path:
            raise errors.pop(0)
        return read(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return errors


def test_rows_one_by_one_in_order_and_at_random(url, opened):
    data = opened(url)
    order = np.random.default_rng(0).permutation(400)
    for row in order[:60].tolist():
        assert data[row][0].tolist() == [2 * row, 2 * row + 1]
    (x,) = data.__getitems__(order.tolist()).batch()
    assert np.array_equal(x.numpy(), ROWS[order])


def test_a_mounted_folder_can_have_a_cache(local, read, keys, tmp_path):
    cache = CiphertextCache(tmp_path / "cache", max_bytes=10**6)
    url = f"file://{tmp_path}/mounted"
    upload_split(local, RemoteStorage(url), split="train", keys=keys)
    for _ in range(2):
        assert np.array_equal(read(RemoteStorage(url, cache=cache)), ROWS)
    assert len(list(cache.folder.glob("*.shard"))) == 5


def test_threads_read_one_shard_side_by_side(url, opened):
    storage = RemoteStorage(url, range_bytes=300)
    entry = opened(storage).entry.shards[0]
    file = storage.open(entry)
    whole = bytearray(entry.size)
    assert file.read_into(0, whole) == entry.size
    wrong = []

    def work(seed):
        for start in np.random.default_rng(seed).integers(0, entry.size, 200).tolist():
            out = bytearray(70)
            count = file.read_into(start, out)
            if out[:count] != whole[start : start + 70]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert file.read_into(entry.size, bytearray(1)) == 0
    assert file.distrust() is False
    file.close()


@pytest.mark.parametrize(("range_bytes", "times"), [(2**20, 1), (2**17, 2)])
def test_a_shard_that_fits_one_range_is_asked_for_once(
    tmp_path, keys, opened, monkeypatch, range_bytes, times
):
    rows = np.random.default_rng(0).normal(size=(500, 100))  # 400 KB
    with EncryptedShardWriter(tmp_path / "d", split="train", keys=keys) as writer:
        writer.write_batch({"x": rows})
    url = f"memory://{uuid.uuid4().hex}/dataset"
    upload_split(tmp_path / "d", url, split="train", keys=keys)
    asked, fetch = [], RemoteStorage.fetch

    def counting(self, name, start, end):  # it does what it did
        asked.append(end - start)
        return fetch(self, name, start, end)

    monkeypatch.setattr(RemoteStorage, "fetch", counting)
    data = opened(RemoteStorage(url, range_bytes=range_bytes))
    for row in range(500):
        assert np.array_equal(data[row][0].numpy(), rows[row])
    size = data.entry.shards[0].size
    assert (len(asked) == 1) == (times == 1)
    assert size * times * 0.9 < sum(asked) <= size * times


def test_few_ranges_are_held_in_memory(url, opened):
    storage = RemoteStorage(url)
    data = opened(storage)
    data.__getitems__(range(400))
    files = [reader._file for reader in data.shards._readers.values()]
    assert [len(file._window[1]) > 0 for file in files] == [False, True, True, True, True]
    data.close()
    assert storage._windows == {}


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError("SECRET"), TimeoutError("SECRET"), OSError(5, "SECRET"), EOFError()],
)
def test_what_passes_is_tried_again(url, read, fails, error):
    fails += [error, error]
    assert np.array_equal(read(RemoteStorage(url, attempts=3)), ROWS)
    fails += [error] * 3
    with pytest.raises(StorageError, match=type(error).__name__) as caught:
        read(RemoteStorage(url, attempts=3))
    assert "SECRET" not in repr(caught.value)
    assert (caught.value.__context__, caught.value.__cause__) == (None, None)


def test_a_refusal_is_met_with_new_options_once(url, read, fails):
    asked = []

    def options():
        asked.append(1)
        return {}

    storage = RemoteStorage(url, storage_options=options)
    fails += [PermissionError("SECRET")]
    assert np.array_equal(read(storage), ROWS)
    assert len(asked) == 2
    fails += [PermissionError("SECRET")] * 2
    with pytest.raises(StorageError, match="PermissionError") as caught:
        read(storage)
    assert "SECRET" not in str(caught.value)
    assert fails == []


def test_a_short_answer_each_time_is_refused(url, opened, monkeypatch):
    data = opened(url)
    read = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda self, path, **options: read(self, path, **options)[:100],
    )
    with pytest.raises(ShardCorruptedError):
        data[0]


def test_a_folder_in_the_place_of_a_shard(url, opened, read):
    data = opened(url)
    path = f"/{url[9:]}/{data.entry.shards[0].file}"
    files = fsspec.filesystem("memory")
    files.rm(path)
    files.pipe_file(f"{path}/x", b"x")
    with pytest.raises(ShardCorruptedError, match="cannot be opened"):
        data[0]


# ---------------------------------------------------------------- other processes


def _read_in_child(data, rows, results):
    results.put([data[row][0].tolist() for row in rows])


@pytest.fixture
def chained(sealed, tmp_path, monkeypatch):
    """Options that hold no credentials, and a file from which the SDK takes them."""
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = SECRET\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    return {"client_kwargs": sealed.options["client_kwargs"]}


def test_a_forked_process_makes_a_connection_of_its_own(sealed, opened, chained):
    """A client's threads, and the locks that others held, are not there after a fork."""
    context = multiprocessing.get_context("fork")
    data = opened(sealed.root, storage_options=chained)
    data[0]
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(data, [1, 399], results))
    with data._storage._lock:
        child.start()
    assert results.get(timeout=60) == [[2, 3], [798, 799]]
    child.join(30)
    assert child.exitcode == 0


def test_a_dataset_is_pickled_without_credentials(sealed, opened, chained, read):
    data = opened(sealed.root, storage_options=chained)
    pickled = pickle.dumps(data)
    assert b"SECRET" not in pickled
    assert np.array_equal(read(pickle.loads(pickled)), ROWS)


# ---------------------------------------------------------------- https


@pytest.fixture
def public(sealed):
    """The dataset as a web server shows it to everybody, and how to trust that server."""
    for name in sealed.names():
        sealed.client.put_object_acl(Bucket=sealed.bucket, Key=f"dataset/{name}", ACL="public-read")
    context = ssl.create_default_context(cafile=str(sealed.ca))
    sealed.line.requests.clear()
    return f"{sealed.endpoint}/{sealed.bucket}/dataset", {"ssl": context}


def test_a_dataset_behind_https_can_be_read(public, sealed, read):
    root, options = public
    assert np.array_equal(read(root, storage_options=options), ROWS)
    sealed.line.requests.clear()
    with pytest.raises(StorageError, match="FileNotFoundError"):  # fsspec's word for it
        read(RemoteStorage(root, attempts=1))
    with pytest.raises(ConfigError, match="ssl"):
        read(root, storage_options={"ssl": False})
    assert sealed.line.requests == []
    name = next(name for name in sealed.names() if name.endswith(".lsec"))
    sealed.client.put_object_acl(Bucket=sealed.bucket, Key=f"dataset/{name}", ACL="private")
    with pytest.raises(StorageError, match="refused"):
        read(root, storage_options=options)
    sealed.client.delete_object(Bucket=sealed.bucket, Key=f"dataset/{name}")
    with pytest.raises((ShardCorruptedError, StorageError)):
        read(root, storage_options=options)


def test_a_redirect_of_https_is_not_followed(public, sealed, read):
    root, options = public

    def redirect(environ, start_response):
        if ".lsec" not in environ["PATH_INFO"] or environ["QUERY_STRING"]:
            return None
        location = f"{sealed.endpoint}{environ['PATH_INFO']}?there"
        start_response("302 Found", [("Location", location), ("Content-Length", "0")])
        return []

    sealed.line.disturb = redirect
    with pytest.raises(ShardCorruptedError):
        read(root, storage_options=options)
    assert "there" not in sealed.line.queries


# ---------------------------------------------------------------- what is not accepted


def test_options_for_a_folder_are_refused(tmp_path, keys):
    with pytest.raises(ConfigError, match="need a URL"):
        open_storage(tmp_path, storage_options={"key": "SECRET"})
    with pytest.raises(ConfigError, match="need a URL"):
        open_storage(
            RemoteStorage("memory://x"), cache=CiphertextCache(tmp_path / "c", max_bytes=1)
        )
    with pytest.raises(ConfigError, match="need a URL"):
        EncryptedDataModule(tmp_path, keys=keys, batch_size=1, storage_options={})


def test_a_storage_of_ones_own_is_read_and_not_sealed_to(local, read, seal):
    class Own:
        def __init__(self):
            self.inner = open_storage(local)

        def open(self, entry):
            return self.inner.open(entry)

        def read(self, name):
            return self.inner.read(name)

    assert np.array_equal(read(Own()), ROWS)
    with pytest.raises(ConfigError, match="not sealed to"):
        seal(Own())


@pytest.mark.parametrize(
    "arguments", [{"attempts": 0}, {"timeout": 0}, {"range_bytes": -1}, {"timeout": float("inf")}]
)
def test_numbers_that_make_no_sense(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        RemoteStorage("memory://x", **arguments)


def test_what_is_not_installed_is_named(monkeypatch):
    # What fsspec has loaded is loaded again, as if it had not been and the package were not there.
    monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"lightning-secure\[s3\]"):
        RemoteStorage("s3://x/y")
    with pytest.raises(MissingExtraError, match="fsspec package"):
        RemoteStorage("gs://x/y")
