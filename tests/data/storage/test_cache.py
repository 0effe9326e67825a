"""Only ciphertext is kept, within its limit, and trusted no more than where it came from."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest

from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.storage import CiphertextCache, RemoteStorage
from lightning_secure.errors import ConfigError, ShardCorruptedError, StorageError
from lightning_secure.util import events
from lightning_secure.util.files import exclusive_lock

ROWS = np.arange(800, dtype="int64").reshape(400, 2)


class Memory:
    """The dataset in fsspec's memory, and how often it was asked for shards."""

    def __init__(self, local, monkeypatch) -> None:
        self.url = f"memory://{uuid.uuid4().hex}/dataset"
        self.files = fsspec.filesystem("memory")
        self.local = local
        for path in local.rglob("*"):
            if path.suffix in (".json", ".lsec"):
                self.put(path.relative_to(local).as_posix(), path.read_bytes())
        self.asked: list[tuple[str, int]] = []
        original = RemoteStorage.fetch

        def fetch(storage, name, start, end):
            self.asked.append((name, end - start))
            return original(storage, name, start, end)

        monkeypatch.setattr(RemoteStorage, "fetch", fetch)  # to count; it does what it did

    def path(self, name: str) -> str:
        return f"{self.url.removeprefix('memory:/')}/{name}"

    def put(self, name: str, data: bytes) -> None:
        self.files.pipe_file(self.path(name), data)


@pytest.fixture
def memory(local, monkeypatch):
    found = Memory(local, monkeypatch)
    yield found
    found.files.rm(found.url.removeprefix("memory:/"), recursive=True)


@pytest.fixture
def cache(tmp_path):
    return CiphertextCache(tmp_path / "cache", max_bytes=10**6)


def entries(cache):
    return sorted(cache.folder.glob("*.shard"))


@pytest.fixture
def manifest(local, keys):
    return read_manifest(local, trusted=keys.trusted_signers)


def test_the_second_epoch_asks_the_storage_for_no_shard(memory, cache, read):
    for _ in range(2):
        assert np.array_equal(read(memory.url, cache=cache), ROWS)
    assert len(memory.asked) == 5
    assert "CiphertextCache" in repr(cache)


def test_only_ciphertext_is_kept(memory, cache, read, local):
    read(memory.url, cache=cache)
    kept = {path.read_bytes() for path in entries(cache)}
    assert kept == {path.read_bytes() for path in local.rglob("*.lsec")}
    assert ROWS[:2].tobytes() not in b"".join(kept)
    assert cache.folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in entries(cache))
    assert {path.suffix for path in cache.folder.iterdir()} == {".shard", ""}  # "" is the lock


# ---------------------------------------------------------------- tampering


@pytest.mark.parametrize("offset", [0, 100, 5000, 4096 + 165, -1])
def test_a_copy_that_was_altered_is_fetched_once_more(memory, cache, read, offset, heard, caplog):
    read(memory.url, cache=cache)
    victim = entries(cache)[0]
    raw = bytearray(victim.read_bytes())
    raw[offset] ^= 1
    victim.write_bytes(raw)
    memory.asked.clear()
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    assert {name for name, _ in memory.asked} == {memory.asked[0][0]}
    (event,) = [event for event in heard if event.action == "data.cache"]
    assert (event.outcome, event.details["shard"]) == ("failure", victim.name[:32])
    assert "not authentic" in caplog.text
    assert not victim.exists()
    read(memory.url, cache=cache)
    assert victim.exists()


def test_a_copy_that_is_altered_while_it_is_open(memory, cache, opened):
    data = opened(memory.url, cache=cache)
    data[0]
    with entries(cache)[0].open("r+b"):
        pass
    for path in entries(cache):
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"altered")
    for row in range(80):
        assert data[row][0].tolist() == [2 * row, 2 * row + 1]


def test_a_copy_that_is_cut_while_it_is_open(memory, cache, opened):
    data = opened(memory.url, cache=cache)
    data[0]
    for path in entries(cache):
        os.truncate(path, 4200)
    assert data[79][0].tolist() == [158, 159]


def test_if_copy_and_storage_are_both_altered_it_is_refused(memory, cache, read):
    read(memory.url, cache=cache)
    for path in entries(cache):
        raw = bytearray(path.read_bytes())
        raw[5000] ^= 1
        path.write_bytes(raw)
    for path in memory.local.rglob("*.lsec"):
        raw = bytearray(path.read_bytes())
        raw[5000] ^= 1
        memory.put(f"train/{path.name}", bytes(raw))
    with pytest.raises(ShardCorruptedError, match="nothing from it was returned"):
        read(memory.url, cache=cache)
    assert memory.asked[5:] == [memory.asked[5]] * len(memory.asked[5:])  # of one shard only


def test_if_the_copy_is_altered_and_the_shard_is_gone_it_is_refused(memory, cache, read):
    read(memory.url, cache=cache)
    for path in memory.local.rglob("*.lsec"):
        memory.files.rm_file(memory.path(f"train/{path.name}"))
    assert np.array_equal(read(memory.url, cache=cache), ROWS)  # the copies are still good
    entries(cache)[0].write_bytes(entries(cache)[0].read_bytes()[:-1] + b"x")
    with pytest.raises(ShardCorruptedError):
        read(memory.url, cache=cache)


def test_the_copy_of_another_shard_in_its_place(memory, cache, read):
    read(memory.url, cache=cache)
    first, second, *_ = entries(cache)
    first.write_bytes(second.read_bytes())
    assert np.array_equal(read(memory.url, cache=cache), ROWS)


def test_another_sealing_under_the_same_name_is_not_served(memory, cache, read, seal, keys):
    """The files have one name here and there; what the manifests say of them differs."""
    read(memory.url, cache=cache)
    manifest = read_manifest(memory.local, trusted=keys.trusted_signers)
    one, two = manifest.splits["train"].shards[:2]
    names = {path.name for path in entries(cache)}
    for change in (
        {"uuid": two.uuid},
        {"header_sha256": two.header_sha256},
        {"merkle_root": two.merkle_root},
        {"commitment": two.commitment},
    ):
        other = dataclasses.replace(one, **change)
        copy = cache.open(other, origin=lambda: RemoteStorage(memory.url)._origin(one), step=4096)
        copy.close()
    assert len({path.name for path in entries(cache)} - names) == 4


@pytest.mark.parametrize("what", ["link", "pipe", "short", "folder"])
def test_something_else_in_the_place_of_a_copy(memory, cache, read, what, tmp_path):
    read(memory.url, cache=cache)
    victim = entries(cache)[0]
    good = victim.read_bytes()
    victim.unlink()
    (tmp_path / "elsewhere").write_bytes(good)
    if what == "link":
        victim.symlink_to(tmp_path / "elsewhere")
    elif what == "pipe":
        os.mkfifo(victim)
    elif what == "short":
        victim.write_bytes(good[:-1])
    else:
        victim.mkdir()
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    if what != "folder":  # which is read past
        assert not victim.is_symlink()
        assert victim.read_bytes() == good
    assert (tmp_path / "elsewhere").read_bytes() == good


# ---------------------------------------------------------------- room


def test_the_limit_holds_and_the_oldest_goes_first(memory, tmp_path, opened, manifest):
    sizes = [entry.size for entry in manifest.splits["train"].shards]
    cache = CiphertextCache(tmp_path / "small", max_bytes=3 * max(sizes))
    data = opened(memory.url, cache=cache)
    for row in (0, 80, 160):
        data[row]
    for row in (0, 240):  # shard 0 was used, so that 1 makes room for 3
        data.close()
        data[row]
        time.sleep(0.01)
    names = {path.name[:32] for path in entries(cache)}
    shards = manifest.splits["train"].shards
    assert names == {shards[number].uuid.hex() for number in (0, 2, 3)}
    for row in range(0, 400, 7):
        assert data[row][0].tolist() == [2 * row, 2 * row + 1]
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes


def test_a_shard_that_is_evicted_while_it_is_open_stays_readable(memory, cache, opened):
    data = opened(memory.url, cache=cache)
    data[0]
    memory.asked.clear()
    for path in entries(cache):
        path.unlink()
    assert data[79][0].tolist() == [158, 159]
    assert memory.asked == []


def test_a_shard_that_is_larger_than_the_cache_is_read_through(memory, tmp_path, read):
    cache = CiphertextCache(tmp_path / "tiny", max_bytes=100)
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    assert entries(cache) == []


def test_a_full_disk_costs_the_cache_and_not_the_run(memory, cache, read, caplog):
    """The limit of a file's size stands for the disk's end: both refuse to give the room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, before[1]))
    try:
        assert np.array_equal(read(memory.url, cache=cache), ROWS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]
    assert "EFBIG" in caplog.text


def test_a_folder_that_went_away_costs_the_cache_and_not_the_run(memory, cache, read, caplog):
    os.rmdir(cache.folder)
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    cache.folder.write_bytes(b"")
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    assert "ENOTDIR" in caplog.text
    with pytest.raises(ConfigError, match="cannot be made"):
        CiphertextCache(cache.folder, max_bytes=1)
    with pytest.raises(ConfigError, match="max_bytes"):
        CiphertextCache(cache.folder, max_bytes=0)


def test_a_download_that_fails_leaves_nothing(memory, cache, read, monkeypatch):
    def fails(*_):
        raise StorageError("the line is down")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStorage, "fetch", fails)
        with pytest.raises(StorageError, match="line"):
            read(memory.url, cache=cache)
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]
    assert np.array_equal(read(memory.url, cache=cache), ROWS)


# ---------------------------------------------------------------- side by side


def test_many_threads_download_a_shard_once(memory, cache, keys):
    results, ready = [], threading.Barrier(6)

    def work():
        data = EncryptedShardDataset(memory.url, split="train", keys=keys, cache=cache)
        ready.wait()
        (x,) = data.__getitems__(range(400)).batch()
        results.append(x.numpy())
        data.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(np.array_equal(result, ROWS) for result in results)
    assert len(memory.asked) == 5


READER = """
import sys
import numpy as np
from lightning_secure import CiphertextCache, EncryptedShardDataset, LocalKeyProvider, RemoteStorage
from lightning_secure import upload_split

local, folder, key, limit, kill = sys.argv[1:]
keys = LocalKeyProvider(key)
upload_split(local, "memory://x/y", split="train", keys=keys)
fetched = 0
fetch = RemoteStorage.fetch
def counting(self, name, start, end):
    global fetched
    fetched += 1
    if fetched == int(kill):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return fetch(self, name, start, end)
RemoteStorage.fetch = counting
cache = CiphertextCache(folder, max_bytes=int(limit))
# Ranges of a thousand bytes, so that a download takes several.
storage = RemoteStorage("memory://x/y", cache=cache, range_bytes=1000)
for _ in range(3):
    data = EncryptedShardDataset(storage, split="train", keys=keys)
    (x,) = data.__getitems__(range(400)).batch()
    assert np.array_equal(x.numpy(), np.arange(800).reshape(400, 2))
    total = sum(p.stat().st_size for p in cache.folder.iterdir() if p.exists())
    data.close()
print(fetched)
"""


def start_reader(local, folder, key_file, limit=10**6, kill=-1):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            READER,
            str(local),
            str(folder),
            str(key_file),
            str(limit),
            str(kill),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def key_file(keys):
    return keys._path


def test_a_reader_that_is_killed_leaves_the_cache_usable(local, cache, key_file, memory, read):
    """It holds the lock of its download when it dies; the next one neither waits nor trusts it."""
    killed = start_reader(local, cache.folder, key_file, kill=9)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert list(cache.folder.glob("*.part"))
    before = time.monotonic()
    assert np.array_equal(read(memory.url, cache=cache), ROWS)
    assert time.monotonic() - before < 5
    assert list(cache.folder.glob("*.part")) == []


def test_a_half_download_of_the_dead_gives_its_room_back(memory, manifest, tmp_path, read):
    size = max(entry.size for entry in manifest.splits["train"].shards)
    cache = CiphertextCache(tmp_path / "cache", max_bytes=size)
    (cache.folder / "dead.part").write_bytes(bytes(size))
    alive = cache.folder / "alive.part"
    alive.write_bytes(bytes(size))
    with alive.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        read(memory.url, cache=cache)  # there is no room: that of the living is taken
        assert entries(cache) == []
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", "alive.part"]
    read(memory.url, cache=cache)
    assert len(entries(cache)) == 1
    assert not alive.exists()


def test_several_processes_share_a_cache_that_is_too_small(local, cache, key_file, manifest):
    limit = 2 * max(entry.size for entry in manifest.splits["train"].shards)
    readers = [start_reader(local, cache.folder, key_file, limit=limit) for _ in range(2)]
    largest = 0
    while any(reader.poll() is None for reader in readers):
        with exclusive_lock(cache.folder / ".lock"):
            total = 0
            for path in cache.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
        largest = max(largest, total)
        time.sleep(0.001)
    for reader in readers:
        reader.communicate()
        assert reader.returncode == 0
    assert 0 < largest <= limit


def test_a_listener_that_cannot_record_stops_the_reader(memory, cache, read):
    read(memory.url, cache=cache)
    path = entries(cache)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    def refuse(event):
        if event.action == "data.cache":
            raise StorageError("no room in the log")

    events.subscribe("test", refuse)
    with pytest.raises(StorageError, match="log"):
        read(memory.url, cache=cache)
