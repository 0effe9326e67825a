"""Sealing to a remote storage: shards first, the manifest last, and never over another's."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lightning_secure.crypto.manifest import MANIFEST_NAME, read_manifest
from lightning_secure.data.erasure.erase import erase_subject
from lightning_secure.data.key_rotation.rotate import rotate_data, rotate_kek, rotate_partition
from lightning_secure.data.manifests.garbage import collect_garbage
from lightning_secure.data.storage import CiphertextCache, LocalStorage, RemoteStorage
from lightning_secure.data.writing.close_writers import close_together
from lightning_secure.data.writing.seal import seal as seal_source
from lightning_secure.data.writing.split_rules import SplitByRatio
from lightning_secure.data.writing.upload import upload_split
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    AuditWriteError,
    ConfigError,
    ManifestMismatchError,
    ShardCorruptedError,
    StorageError,
)
from lightning_secure.util import events

ROWS = np.arange(800, dtype="int64").reshape(400, 2)
OTHER = ROWS + 10_000


@pytest.fixture
def seal(keys, seal):
    """Seal a split of 2 shards."""
    return functools.partial(seal, shard_bytes=3200)


@pytest.fixture(autouse=True)
def spools(tmp_path, monkeypatch):
    """Where temporary folders are made, to see that none stays."""
    folder = tmp_path / "spools"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def remote_names(url):
    return sorted(path.rpartition("/")[2] for path in fsspec.filesystem("memory").find(url[8:]))


def remote_contents(url):
    memory = fsspec.filesystem("memory")
    return {path: memory.cat_file(path) for path in memory.find(url[8:])}


def test_splits_are_sealed_one_after_another(url, seal, read, keys, spools):
    seal(url)
    seal(url, rows=OTHER, split="val")
    assert np.array_equal(read(url), ROWS)
    assert np.array_equal(read(url, split="val"), OTHER)
    manifest = read_manifest(RemoteStorage(url), trusted=keys.trusted_signers)
    assert (manifest.generation, len(manifest.splits)) == (3, 2)
    assert list(spools.iterdir()) == []


def test_a_file_url_is_the_folder_itself(tmp_path, seal, read):
    seal(f"file://{tmp_path}/a%20b")
    assert np.array_equal(read(f"file://{tmp_path}/a%20b"), ROWS)
    assert np.array_equal(read(tmp_path / "a b"), ROWS)
    assert np.array_equal(read(str(tmp_path / "a b")), ROWS)
    assert np.array_equal(read(LocalStorage(tmp_path / "a b")), ROWS)
    seal(LocalStorage(tmp_path / "a b"), split="val")


def test_an_existing_split_is_refused_before_anything_is_sealed(url, seal, read, spools):
    seal(url)
    names = remote_names(url)
    with pytest.raises(ConfigError, match="exists, with 400"):
        seal(url, rows=OTHER)
    assert list(spools.iterdir()) == []
    seal(url, rows=OTHER, replace=True)
    assert np.array_equal(read(url), OTHER)
    assert len(remote_names(url)) == len(names)  # the older shards were removed
    assert set(remote_names(url)) & set(names) == {MANIFEST_NAME}


def test_an_error_while_sealing_leaves_the_storage_as_it_was(url, seal, read, keys, spools):
    seal(url)
    names = remote_names(url)
    writer = EncryptedShardWriter(url, split="val", keys=keys)
    writer.write_batch({"x": OTHER})
    writer.__exit__(KeyError)
    assert remote_names(url) == names
    assert list(spools.iterdir()) == []


def test_a_spool_that_is_kept_can_be_sent_again(s3, seal, read, keys, tmp_path):
    def refuse(environ, start_response):
        if environ["REQUEST_METHOD"] != "PUT":
            return None
        start_response("503 Slow Down", [("Content-Length", "0")])
        return []

    s3.line.disturb = refuse
    with pytest.raises(StorageError):
        seal(s3.root, storage_options=s3.options, spool=tmp_path / "spool")
    assert s3.names() == []
    s3.line.disturb = None
    upload_split(tmp_path / "spool", s3.root, split="train", keys=keys, storage_options=s3.options)
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)
    with pytest.raises(ConfigError, match="exists, with 400"):
        seal(s3.root, storage_options=s3.options, spool=tmp_path / "spool")
    seal(s3.root, split="val", storage_options=s3.options, spool=tmp_path / "spool")


def test_the_manifest_goes_last(s3, seal, read, heard):
    seal(s3.root, storage_options=s3.options)
    sent = [path for method, path, _ in s3.line.requests if method == "PUT"]
    assert [path.endswith(MANIFEST_NAME) for path in sent] == [False] * 2 + [True]
    actions = [event.action for event in heard]
    assert actions[-1] == "data.upload"


def test_a_record_that_cannot_be_written_stops_the_manifest(url, seal, read):
    def refuse(event):
        if event.action == "data.upload":
            raise AuditWriteError("no room")

    events.subscribe("test", refuse)
    with pytest.raises(AuditWriteError):
        seal(url)
    assert MANIFEST_NAME not in remote_names(url)


# ---------------------------------------------------------------- side by side


def test_two_writers_at_once_lose_neither_split(s3, seal, read, keys):
    """Both read the same manifest before either puts its own: S3's condition tells the second."""
    seal(s3.root, split="first", storage_options=s3.options)
    both, failed = threading.Barrier(2), []

    def wait(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None if both.n_waiting else s3.line.disturb
            both.wait(10)
        return None

    s3.line.disturb = wait

    def work(split, rows):
        try:
            seal(s3.root, rows=rows, split=split, storage_options=s3.options)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [
        threading.Thread(target=work, args=arguments) for arguments in (("a", ROWS), ("b", OTHER))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert np.array_equal(read(s3.root, split="a", storage_options=s3.options), ROWS)
    assert np.array_equal(read(s3.root, split="b", storage_options=s3.options), OTHER)
    storage = RemoteStorage(s3.root, storage_options=s3.options)
    assert read_manifest(storage, trusted=keys.trusted_signers).generation == 4


def test_the_second_writer_of_one_split_is_refused_and_cleans_up(s3, seal, read):
    """The other one commits between the look at the manifest and the attempt to replace it."""
    seal(s3.root, split="first", storage_options=s3.options)
    puts = []

    def other_first(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None
            puts.append(1)
            seal(s3.root, storage_options=s3.options)
        return None

    s3.line.disturb = other_first
    with pytest.raises(ConfigError, match="exists, with 400"):
        seal(s3.root, rows=OTHER, storage_options=s3.options)
    assert puts == [1]
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)
    assert len(s3.names()) == 1 + 2 * 2


def test_two_writers_that_begin_a_dataset_do_not_overwrite_each_other(s3, seal, read):
    def other_first(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None
            seal(s3.root, storage_options=s3.options)
        return None

    s3.line.disturb = other_first
    with pytest.raises(ConfigError, match="another dataset lies"):
        seal(s3.root, rows=OTHER, split="val", storage_options=s3.options)
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)
    assert len(s3.names()) == 3


def test_an_answer_that_got_lost_is_not_taken_for_a_conflict(s3, seal, read):
    """The manifest is in place; the client is not told, sends it again, and is refused."""
    statuses = []

    def lose(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            status, head, body = s3.line.passed_on(environ)
            statuses.append(status[:3])
            if len(statuses) == 1:
                status = "503 Slow Down"
            start_response(status, head)
            return [body]
        return None

    s3.line.disturb = lose
    seal(s3.root, storage_options=s3.options)
    assert statuses == ["200", "412"]
    s3.line.disturb = None
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)


@pytest.mark.parametrize("where", ["folder", "url"])
def test_a_sealing_that_was_complete_returns_the_manifest_that_is_in_place_at_its_end(
    url, keys, tmp_path, where
):
    root, place = (url, RemoteStorage(url)) if where == "url" else [tmp_path / "d"] * 2
    spool = tmp_path / "kept" if where == "url" else None
    options = {"split": "train", "keys": keys, "source_id": "v1", "spool": spool}
    with EncryptedShardWriter(root, **options) as writer:
        writer.write_batch({"x": ROWS})
    again = EncryptedShardWriter(root, resume=True, **options)
    assert again.complete
    with EncryptedShardWriter(root, split="val", keys=keys) as writer:
        writer.write_batch({"x": ROWS})
    newest = read_manifest(place, trusted=keys.trusted_signers)
    assert close_together([again]) == newest


def test_an_answer_that_got_lost_is_not_taken_for_a_conflict_after_another_writer(
    s3, seal, read, keys, tmp_path
):
    """Before the client asks again, somebody builds on its manifest: the split there is its own."""
    here = seal(tmp_path / "d")

    def lose(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None
            _, head, body = s3.line.passed_on(environ)
            seal(s3.root, rows=OTHER, split="val", storage_options=s3.options)
            start_response("503 Slow Down", head)
            return [body]
        return None

    s3.line.disturb = lose
    manifest = upload_split(here, s3.root, split="train", keys=keys, storage_options=s3.options)
    assert manifest.splits.keys() == {"train", "val"}
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)
    assert np.array_equal(read(s3.root, split="val", storage_options=s3.options), OTHER)
    assert len(s3.names()) == 1 + 2 * 2


def test_an_upload_of_which_every_answer_got_lost_is_called_again(s3, seal, read, keys, tmp_path):
    here = seal(tmp_path / "d")

    def lose(environ, start_response):
        if MANIFEST_NAME not in environ["PATH_INFO"]:
            return None
        if environ["REQUEST_METHOD"] == "PUT":
            s3.line.passed_on(environ)
        elif MANIFEST_NAME not in s3.names():
            return None
        start_response("503 Slow Down", [("Content-Length", "0")])
        return []

    s3.line.disturb = lose
    with pytest.raises(StorageError):
        upload_split(here, s3.root, split="train", keys=keys, storage_options=s3.options)
    s3.line.disturb = None
    s3.line.requests.clear()
    manifest = upload_split(here, s3.root, split="train", keys=keys, storage_options=s3.options)
    assert manifest.generation == read_manifest(here, trusted=keys.trusted_signers).generation
    assert "PUT" not in [method for method, _, _ in s3.line.requests]
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)


def test_a_manifest_that_changes_each_time_is_given_up(s3, seal, keys, monkeypatch):
    monkeypatch.setattr("lightning_secure.data.writing.upload._TRIES", 2)
    seal(s3.root, storage_options=s3.options)
    number = iter(range(100))

    def others(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None
            seal(s3.root, split=f"s{next(number)}", rows=ROWS[:10], storage_options=s3.options)
            s3.line.disturb = others
        return None

    s3.line.disturb = others
    with pytest.raises(StorageError, match="changed by others 2 times"):
        seal(s3.root, split="val", storage_options=s3.options)
    s3.line.disturb = None
    storage = RemoteStorage(s3.root, storage_options=s3.options)
    assert "val" not in read_manifest(storage, trusted=keys.trusted_signers).splits


# ---------------------------------------------------------------- damaged here, or there already


def flip(data, place):
    return bytes(byte ^ (index == place % len(data)) for index, byte in enumerate(data))


DAMAGE = {
    "cut": lambda data: data[:-1],
    "extended": lambda data: data + b"x",
    "empty": lambda data: b"",
    "header": lambda data: flip(data, 20),
    "first tag": lambda data: flip(data, 4096 + 160),
    "last tag": lambda data: flip(data, -1),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "gone", "another"])
def test_a_damaged_shard_replaces_nothing(url, seal, read, keys, tmp_path, damage):
    here = seal(tmp_path / "d")
    upload_split(here, url, split="train", keys=keys)
    before = remote_contents(url)
    rotate_partition(here, "train", keys=keys)  # to send the same shards with another manifest
    first, last = sorted((here / "train").glob("*.lsec"))
    if damage == "gone":
        last.unlink()
    else:
        make = DAMAGE.get(damage, lambda _: first.read_bytes())
        last.write_bytes(make(last.read_bytes()))
    with pytest.raises(ShardCorruptedError, match=rf"{last.name}.* nothing was sent"):
        upload_split(here, url, split="train", keys=keys, replace=True)
    assert remote_contents(url) == before
    with pytest.raises(ShardCorruptedError, match="nothing was sent"):
        upload_split(here, f"{url}/new", split="train", keys=keys)
    assert remote_contents(url) == before
    assert np.array_equal(read(url), ROWS)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_there_is_left_and_a_damaged_one_is_sent(
    url, seal, read, keys, tmp_path, damage, monkeypatch
):
    here = seal(tmp_path / "d")
    upload_split(here, url, split="train", keys=keys)
    rotate_partition(here, "train", keys=keys)
    memory = fsspec.filesystem("memory")
    name = next(name for name in memory.find(url[8:]) if name.endswith(".lsec"))
    memory.pipe_file(name, DAMAGE[damage](memory.cat_file(name)))
    # It does what it did, and tells what was sent.
    sent, put = [], type(memory).put_file
    monkeypatch.setattr(
        type(memory),
        "put_file",
        lambda self, here, there, **rest: (sent.append(there), put(self, here, there, **rest))[1],
    )
    upload_split(here, url, split="train", keys=keys, replace=True)
    assert sent == [name]
    assert np.array_equal(read(url), ROWS)


def test_what_does_not_arrive_whole_is_noticed(url, local, keys, monkeypatch):
    def short(self, lpath, rpath, **_):
        self.pipe_file(rpath, Path(lpath).read_bytes()[:-1])

    # A file system that loses the end of what it is given.
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", short)
    with pytest.raises(StorageError, match="did not arrive whole"):
        upload_split(local, url, split="train", keys=keys)
    assert MANIFEST_NAME not in remote_names(url)


def test_a_writer_that_is_killed_leaves_a_dataset_that_reads_as_before(s3, seal, read, tmp_path):
    seal(s3.root, split="val", storage_options=s3.options)
    code = (
        "import sys, json, numpy as np\n"
        "from lightning_secure import EncryptedShardWriter, LocalKeyProvider\n"
        "root, options, key = sys.argv[1:]\n"
        "writer = EncryptedShardWriter(root, split='train', keys=LocalKeyProvider(key),\n"
        "    segment_bytes=160, shard_bytes=3200, storage_options=json.loads(options))\n"
        "writer.write_batch({'x': np.arange(800).reshape(400, 2)})\n"
        "writer.close()\n"
    )
    held = threading.Event()
    release = threading.Event()

    def hold(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            held.set()
            release.wait(20)
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        return None

    s3.line.disturb = hold
    key = seal.keywords["keys"]._path
    arguments = [sys.executable, "-c", code, s3.root, json.dumps(s3.options), str(key)]
    writer = subprocess.Popen(arguments, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert held.wait(30)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    release.set()
    s3.line.disturb = None
    assert np.array_equal(read(s3.root, split="val", storage_options=s3.options), ROWS)
    with pytest.raises(ConfigError, match="no split 'train'"):
        read(s3.root, storage_options=s3.options)
    assert len(s3.names()) == 1 + 2 * 2  # two are in no manifest
    seal(s3.root, storage_options=s3.options)
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)


# ---------------------------------------------------------------- column keys, subjects, new keys

NOTES = [f"note {i}" for i in range(400)]
WHO = [f"patient {i // 50}" for i in range(400)]
GROUPED = {"column_keys": {"note": "sensitive", "who": "who"}, "subject_column": "who"}


def seal_grouped(root, keys, **options):
    options = {"segment_bytes": 160, "shard_bytes": 3200, **GROUPED, **options}
    with EncryptedShardWriter(root, split="train", keys=keys, **options) as writer:
        writer.write_batch({"x": ROWS, "note": NOTES, "who": WHO})
    return root


def read_grouped(opened, root, **options):
    data = opened(root, **options)
    x, note, who = data.__getitems__(range(len(data))).batch()
    rows = [int(number) // 2 for number in x[:, 0]]
    assert [NOTES[row] for row in rows] == note
    assert [WHO[row] for row in rows] == who
    return sorted(rows)


@pytest.mark.parametrize("how", ["sealed there", "sent"])
def test_all_groups_of_columns_arrive_with_all_keys(url, keys, opened, tmp_path, how):
    if how == "sent":
        upload_split(seal_grouped(tmp_path / "d", keys), url, split="train", keys=keys)
    else:
        seal_grouped(url, keys)
    assert read_grouped(opened, url) == list(range(400))
    manifest = read_manifest(RemoteStorage(url), trusted=keys.trusted_signers)
    assert manifest.partitions.keys() == {"train", "train.sensitive", "train.who"}
    assert len(remote_names(url)) == 1 + len(manifest.files)
    (note,) = opened(url, columns=["note"])[7]
    assert note == NOTES[7]


def test_a_split_whose_keys_or_rows_went_is_sent_again(url, keys, other_keys, opened, tmp_path):
    """Where only keys were exchanged the files have the same names: none may be removed."""
    here = seal_grouped(tmp_path / "d", keys)
    upload_split(here, url, split="train", keys=keys)
    names = remote_names(url)
    for name in ("train", "train.sensitive", "train.who"):
        rotate_partition(here, name, keys=keys)
    with pytest.raises(ConfigError, match="exists, with 400"):
        upload_split(here, url, split="train", keys=keys)
    upload_split(here, url, split="train", keys=keys, replace=True)
    assert remote_names(url) == names
    assert read_grouped(opened, url) == list(range(400))
    rotate_data(here, "train", keys=keys)
    erase_subject(here, "train", "patient 3", keys=keys)
    upload_split(here, url, split="train", keys=keys, replace=True)
    assert len(remote_names(url)) == len(names) - 3
    assert not set(remote_names(url)) & set(names) - {MANIFEST_NAME}
    assert read_grouped(opened, url) == [row for row in range(400) if row // 50 != 3]


@pytest.mark.parametrize("where", ["copy", "origin"])
def test_a_bad_copy_of_any_group_is_fetched_again_once(url, keys, opened, tmp_path, where):
    seal_grouped(url, keys)
    cache = CiphertextCache(tmp_path / "cache", max_bytes=10**8)
    assert read_grouped(opened, url, cache=cache) == list(range(400))
    copies = sorted((tmp_path / "cache").glob("*.shard"))
    memory = fsspec.filesystem("memory")
    manifest = read_manifest(RemoteStorage(url), trusted=keys.trusted_signers)
    assert len(copies) == len(manifest.files)
    for path in copies:
        data = bytearray(path.read_bytes())
        data[4100] ^= 1  # of the first segment
        path.write_bytes(data)
    if where == "copy":
        assert read_grouped(opened, url, cache=cache) == list(range(400))
        return
    name = f"{url[8:]}/{manifest.splits['train'].groups[1].shards[0].file}"
    memory.pipe_file(name, bytes(reversed(memory.cat_file(name))))
    with pytest.raises(ShardCorruptedError):
        read_grouped(opened, url, cache=cache)
    assert read_grouped_note(opened, url) == NOTES


def read_grouped_note(opened, url):
    data = opened(url, columns=["note"])
    return data.__getitems__(range(len(data))).batch()[0]


def test_partitions_of_a_replaced_split_go(url, keys, seal, read):
    seal_grouped(url, keys)
    seal(url, replace=True)
    manifest = read_manifest(RemoteStorage(url), trusted=keys.trusted_signers)
    assert manifest.partitions.keys() == {"train"}
    assert np.array_equal(read(url), ROWS)


def test_a_key_name_of_another_split_is_not_taken(url, keys, seal, read, tmp_path):
    here = seal_grouped(tmp_path / "d", keys)
    upload_split(here, url, split="train", keys=keys)
    with pytest.raises(ConfigError, match="belong to split 'train'"):
        seal(url, split="train.who")
    # Here there is room for it, there not: the spool does not have the other split.
    seal(tmp_path / "e", split="other")
    upload_split(tmp_path / "e", f"{url}2", split="other", keys=keys)
    seal(f"{url}2", split="train.who", spool=tmp_path / "e")
    with pytest.raises(ConfigError, match=r"belong to split 'train\.who'"):
        seal_grouped(f"{url}2", keys, spool=tmp_path / "e")


def test_whoever_was_second_keeps_what_the_first_named(s3, seal, read, keys, tmp_path):
    """Two send the same sealed split: the files have the same names."""
    here = seal(seal(tmp_path / "d"), split="val")

    def other_first(environ, start_response):
        if environ["REQUEST_METHOD"] == "PUT" and MANIFEST_NAME in environ["PATH_INFO"]:
            s3.line.disturb = None
            for split in ("val", "train"):  # another manifest than the one that is being put
                upload_split(here, s3.root, split=split, keys=keys, storage_options=s3.options)
        return None

    s3.line.disturb = other_first
    found = upload_split(here, s3.root, split="train", keys=keys, storage_options=s3.options)
    assert found.splits.keys() == {"train", "val"}  # the other's manifest says all that is to say
    assert np.array_equal(read(s3.root, storage_options=s3.options), ROWS)


@pytest.mark.parametrize(
    "change",
    [
        lambda url, keys: rotate_data(url, "train", keys=keys),
        lambda url, keys: rotate_partition(RemoteStorage(url), "train", keys=keys),
        lambda url, keys: rotate_kek(url, keys=keys, to=keys),
        lambda url, keys: erase_subject(url, "train", 1, keys=keys),
        lambda url, keys: collect_garbage(url, keys=keys),
    ],
)
def test_what_works_in_a_folder_only_makes_none_of_a_url(
    url, seal, keys, tmp_path, monkeypatch, change
):
    seal(url)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no folder of this machine"):
        change(url, keys)
    assert [path.name for path in tmp_path.iterdir()] == ["spools"]


# ---------------------------------------------------------------- from a source, and resumed


def test_splits_of_one_source_share_a_spool(url, keys, read, spools):
    rule = SplitByRatio(ratios={"train": 0.5, "val": 0.5}, seed=1)
    sealed = seal_source({"x": ROWS}, url, keys=keys, split=rule, segment_bytes=160)
    both = np.concatenate([read(url), read(url, split="val")])
    assert sum(sealed.rows.values()) == len(both) == 400
    assert np.array_equal(both[np.argsort(both[:, 0])], ROWS)
    assert list(spools.iterdir()) == []


def test_a_sealing_goes_on_in_a_spool_that_is_kept(url, keys, read, tmp_path):
    options = {"split": "train", "keys": keys, "segment_bytes": 160, "shard_bytes": 1280}
    options |= {"spool": tmp_path / "spool", "source_id": "1"}
    first = EncryptedShardWriter(url, **options)
    first.write_batch({"x": ROWS[:200]})
    first.suspend()
    with EncryptedShardWriter(url, resume=True, **options) as second:
        assert 0 < second.records < 200
        second.write_batch({"x": ROWS[second.records :]})
    assert np.array_equal(read(url), ROWS)


@pytest.mark.parametrize("kept", [True, False])
def test_a_split_that_is_there_is_not_sealed_again(url, keys, read, tmp_path, spools, kept):
    options = {"split": "train", "keys": keys, "source_id": "1", "segment_bytes": 160}
    options |= {"spool": tmp_path / "spool"} if kept else {}
    with EncryptedShardWriter(url, **options) as first:
        first.write_batch({"x": ROWS})
    names = remote_names(url)
    with EncryptedShardWriter(url, resume=True, **options) as second:
        assert second.complete
        with pytest.raises(ConfigError, match="does not grow"):
            second.write_batch({"x": ROWS})
    assert remote_names(url) == names
    with pytest.raises(ConfigError, match="exists, with 400"):
        EncryptedShardWriter(url, resume=True, **{**options, "source_id": "2"})
    assert np.array_equal(read(url), ROWS)
    assert list(spools.iterdir()) == []


def test_a_sealed_split_that_was_not_sent_is_sent(url, keys, read, tmp_path):
    options = {"split": "train", "keys": keys, "source_id": "1", "segment_bytes": 160}

    def refuse(event):
        if event.action == "data.upload":
            raise AuditWriteError("no room")

    events.subscribe("test", refuse)
    first = EncryptedShardWriter(url, spool=tmp_path / "spool", **options)
    first.write_batch({"x": ROWS})
    with pytest.raises(AuditWriteError):
        first.close()
    events.unsubscribe("test")
    with EncryptedShardWriter(url, spool=tmp_path / "spool", resume=True, **options) as second:
        assert second.complete
    assert np.array_equal(read(url), ROWS)


# ---------------------------------------------------------------- what is not accepted


def test_another_dataset_at_the_place_is_left_alone(url, seal, read, keys, local, tmp_path):
    seal(url, rows=OTHER)
    with pytest.raises(ConfigError, match="another dataset lies"):
        upload_split(local, url, split="train", keys=keys, replace=True)
    seal(tmp_path / "spool", split="x")
    with pytest.raises(ConfigError, match="another dataset lies"):
        EncryptedShardWriter(url, split="val", keys=keys, spool=tmp_path / "spool")
    assert np.array_equal(read(url), OTHER)


def test_a_dataset_of_another_key_is_left_alone(url, seal, other_keys, local):
    seal(url)
    with pytest.raises(ManifestMismatchError):
        EncryptedShardWriter(url, split="val", keys=other_keys)


def test_arguments_that_make_no_sense(tmp_path, local, keys, url):
    with pytest.raises(ConfigError, match="no split 'x'"):
        upload_split(local, url, split="x", keys=keys)
    with pytest.raises(ConfigError, match="copy the folder"):
        upload_split(local, str(tmp_path), split="train", keys=keys)
    with pytest.raises(ConfigError, match="needs a URL"):
        EncryptedShardWriter(tmp_path, split="x", keys=keys, spool=tmp_path / "y")
    with pytest.raises(ConfigError, match="need a URL"):
        EncryptedShardWriter(tmp_path, split="x", keys=keys, storage_options={})
