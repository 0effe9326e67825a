from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lightning_secure.crypto.manifest import read_manifest, write_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.key_rotation import rotate
from lightning_secure.data.key_rotation.rotate import (
    add_recipient,
    remove_recipient,
    rotate_data,
    rotate_kek,
    rotate_partition,
)
from lightning_secure.data.manifests.garbage import RemovalList, collect_garbage
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.shards.shard import ShardReader, fresh_uuid
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    AuditWriteError,
    ConfigError,
    DataError,
    IntegrityError,
    ManifestMismatchError,
    ShardCorruptedError,
    WrongKeyError,
)
from lightning_secure.util import events
from lightning_secure.util.files import exclusive_lock

X = np.arange(300, dtype="int64").reshape(100, 3)
NAMES = [f"name {i} " + "é" * (i % 5) for i in range(100)]


def seal(root, keys, rows=slice(None), **options):
    options = {"split": "train", "segment_bytes": 128, "shard_bytes": 1024, **options}
    with EncryptedShardWriter(root, keys=keys, **options) as writer:
        writer.write_batch({"x": X[rows], "name": NAMES[rows]})
    return root


def read(root, keys, split="train"):
    data = EncryptedShardDataset(root, split=split, keys=keys)
    x, names = data.__getitems__(range(len(data))).batch()
    data.close()
    return x.numpy(), names


def assert_whole(root, keys):
    x, names = read(root, keys)
    assert np.array_equal(x, X)
    assert names == NAMES


def manifest_of(root, keys):
    return read_manifest(root, trusted=keys.trusted_signers)


def shard_files(root):
    return {f"{path.parent.name}/{path.name}" for path in Path(root).glob("*/*")}


@pytest.fixture(scope="module")
def template(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("rotation"), keys, column_keys={"name": "sensitive"})


@pytest.fixture
def sealed(template, tmp_path):
    return shutil.copytree(template, tmp_path / "dataset")


@pytest.fixture(scope="module")
def second(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("second") / "second.kek"
    LocalKeyProvider.generate(path)
    return LocalKeyProvider(path, trusted=[keys.signer.public_key])


# ---------------------------------------------------------------- the key-encryption key


def test_after_a_new_kek_only_the_new_one_opens(sealed, keys, second, heard):
    before = manifest_of(sealed, keys)
    after = rotate_kek(sealed, keys=keys, to=second)
    wraps = [event for event in heard if event.action == "key.wrap"]
    assert len(wraps) == 2  # one a partition
    assert_whole(sealed, second)
    assert (after.generation, after.previous) == (before.generation + 1, before.digest)
    with pytest.raises(ManifestMismatchError):  # signed by the new key, which `keys` does not know
        EncryptedShardDataset(sealed, split="train", keys=keys)
    old = LocalKeyProvider(keys._path, trusted=[second.signer.public_key])
    with pytest.raises(WrongKeyError):
        EncryptedShardDataset(sealed, split="train", keys=old)


def test_other_recipients_keep_what_they_have(sealed, keys, second, other_keys):
    other = LocalKeyProvider(other_keys._path, trusted=[second.signer.public_key])
    add_recipient(sealed, "train", keys=keys, recipient=other)
    rotate_kek(sealed, keys=keys, to=second)
    data = EncryptedShardDataset(sealed, split="train", keys=other, columns=("x",))
    assert data[7][0].tolist() == X[7].tolist()


def test_a_kek_that_opens_nothing_is_not_rotated(sealed, keys, second):
    with pytest.raises(ConfigError, match="present key"):
        rotate_kek(sealed, keys=keys, to=keys)
    stranger = LocalKeyProvider(second._path, trusted=[keys.signer.public_key])
    with pytest.raises(ConfigError, match="no partition"):
        rotate_kek(sealed, keys=stranger, to=keys)
    assert manifest_of(sealed, keys).generation == 2


def test_two_keks_of_one_partition_become_one(sealed, keys, second):
    add_recipient(sealed, "train", keys=keys, recipient=second)
    rotate_kek(sealed, keys=keys, to=second)
    wraps = manifest_of(sealed, second).partitions["train"]
    assert [key.key_id for key in wraps] == [second.key_id]
    assert_whole(sealed, second)


# ---------------------------------------------------------------- the partition key


def test_after_a_new_partition_key_the_old_one_opens_nothing(sealed, keys):
    before = manifest_of(sealed, keys)
    old = before.open_partition("train", keys)
    after = rotate_partition(sealed, "train", keys=keys)
    for shard in after.splits["train"].shards:
        with pytest.raises(IntegrityError):
            old.open(shard)
    assert after.splits["train"].groups == before.splits["train"].groups
    assert after.splits["train"].content_digest == before.splits["train"].content_digest
    assert_whole(sealed, keys)
    rotate_partition(sealed, "train.sensitive", keys=keys)
    assert_whole(sealed, keys)


def test_no_recipient_is_forgotten_or_slipped_in(sealed, keys, second, other_keys):
    add_recipient(sealed, "train", keys=keys, recipient=second)
    with pytest.raises(ConfigError, match=second.key_id):
        rotate_partition(sealed, "train", keys=keys)
    with pytest.raises(ConfigError, match="no recipients of it yet"):
        rotate_partition(sealed, "train", keys=keys, recipients=[second, other_keys])
    with pytest.raises(ConfigError, match=r"no partition 'val'"):
        rotate_partition(sealed, "val", keys=keys)
    assert manifest_of(sealed, keys).generation == 3
    rotate_partition(sealed, "train", keys=keys, recipients=[second])
    for reader in (keys, second):
        data = EncryptedShardDataset(sealed, split="train", keys=reader, columns=("x",))
        assert data[1][0].tolist() == X[1].tolist()


def test_whoever_cannot_open_a_partition_cannot_rotate_it(sealed, keys, second):
    with pytest.raises(WrongKeyError):
        rotate_partition(sealed, "train", keys=second)
    with pytest.raises(WrongKeyError):
        add_recipient(sealed, "train", keys=second, recipient=second)
    with pytest.raises(WrongKeyError):
        rotate_data(sealed, "train", keys=second)
    assert_whole(sealed, keys)


def test_a_recipient_is_removed_and_others_stay(sealed, keys, second, other_keys):
    other = LocalKeyProvider(other_keys._path, trusted=[keys.signer.public_key])
    for one in (second, other, other):  # twice is once
        add_recipient(sealed, "train", keys=keys, recipient=one)
    assert len(manifest_of(sealed, keys).partitions["train"]) == 3
    with pytest.raises(ConfigError, match="would lose it"):
        remove_recipient(sealed, "train", keys=keys, key_id=second.key_id)
    for wrong in (keys.key_id, "nobody"):
        with pytest.raises(ConfigError, match="cannot be taken"):
            remove_recipient(sealed, "train", keys=keys, key_id=wrong)
    remove_recipient(sealed, "train", keys=keys, key_id=second.key_id, recipients=[other])
    holders = [key.key_id for key in manifest_of(sealed, keys).partitions["train"]]
    assert holders == [keys.key_id, other.key_id]
    with pytest.raises(WrongKeyError):
        EncryptedShardDataset(sealed, split="train", keys=second, columns=("x",))


# ---------------------------------------------------------------- the data keys


def test_new_data_keys_leave_the_same_rows_in_new_files(sealed, keys):
    before, files = manifest_of(sealed, keys), shard_files(sealed)
    after = rotate_data(sealed, "train", keys=keys)
    assert_whole(sealed, keys)
    assert not shard_files(sealed) & files
    assert shard_files(sealed) == set(after.files)
    old, new = before.splits["train"], after.splits["train"]
    assert {shard.uuid for shard in old.shards}.isdisjoint(shard.uuid for shard in new.shards)
    assert {shard.commitment for shard in old.shards}.isdisjoint(
        shard.commitment for shard in new.shards
    )
    assert new.content_digest == old.content_digest  # a run that trained on it resumes
    rotate_data(sealed, "train", keys=keys)
    assert manifest_of(sealed, keys).splits["train"].content_digest == old.content_digest
    assert_whole(sealed, keys)
    assert not (sealed / ".leftovers").exists()


def test_shards_may_lie_in_any_folder(sealed, keys):
    """Those who seal in parallel use folders of their own."""
    manifest = manifest_of(sealed, keys)
    split = manifest.splits["train"]
    (sealed / "elsewhere").mkdir()

    def moved(shard):
        file = shard.file.replace("train/", "elsewhere/")
        (sealed / shard.file).rename(sealed / file)
        return dataclasses.replace(shard, file=file)

    groups = [
        dataclasses.replace(group, shards=tuple(map(moved, group.shards))) for group in split.groups
    ]
    split = dataclasses.replace(split, shards=tuple(map(moved, split.shards)), groups=tuple(groups))
    after = dataclasses.replace(manifest, splits={"train": split})
    write_manifest(sealed, after, signer=keys.signer)
    rotated = rotate_data(sealed, "train", keys=keys)
    assert_whole(sealed, keys)
    assert shard_files(sealed) == set(rotated.files)


def test_a_copied_data_key_opens_nothing_any_more(sealed, keys):
    before = manifest_of(sealed, keys)
    entry = before.splits["train"].shards[0]
    stolen = before.open_partition("train", keys).open(entry)
    ciphertext = (sealed / entry.file).read_bytes()
    after = rotate_data(sealed, "train", keys=keys)
    new = after.splits["train"].shards[0]
    (sealed / new.file).write_bytes(ciphertext)  # the old bytes put back
    with pytest.raises(ShardCorruptedError):
        read(sealed, keys)
    assert after.open_partition("train", keys).open(new) != stolen


def test_no_two_shards_ever_share_a_file(tmp_path, monkeypatch):
    """Their names hold 4 random bytes, which is too few to rely on."""
    drawn = [bytes(16), bytes(15) + b"\1", b"\1" * 16]
    monkeypatch.setattr("secrets.token_bytes", lambda count: drawn.pop(0))
    (tmp_path / "shard-00003-00000000.lsec").touch()
    assert fresh_uuid(tmp_path, 3) == b"\1" * 16


def test_a_split_that_does_not_exist_is_named(sealed, keys):
    with pytest.raises(ConfigError, match="no split 'val'"):
        rotate_data(sealed, "val", keys=keys)


def test_an_altered_shard_stops_the_rotation(sealed, keys):
    path = sealed / manifest_of(sealed, keys).splits["train"].groups[0].shards[1].file
    files, good = shard_files(sealed), path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ShardCorruptedError):
        rotate_data(sealed, "train", keys=keys)
    assert shard_files(sealed) == files
    path.write_bytes(good)
    assert_whole(sealed, keys)


def test_other_rows_than_before_are_never_put_in_place(sealed, keys, monkeypatch):
    """The storage, or this package, could err: what was written is read back and compared."""
    real, calls = ShardReader.decrypt, []

    def forgetful(self, index, scratch):
        calls.append(index)
        plain = real(self, index, scratch)
        # The first shard is read for sealing, and one of its segments comes out wrong.
        return bytearray(len(plain)) if len(calls) == 2 else plain

    files = shard_files(sealed)
    monkeypatch.setattr(ShardReader, "decrypt", forgetful)
    with pytest.raises(ShardCorruptedError, match="rows that it was made of"):
        rotate_data(sealed, "train", keys=keys)
    monkeypatch.undo()
    assert shard_files(sealed) == files
    assert_whole(sealed, keys)


def test_memory_holds_one_segment_and_not_the_shard(tmp_path, keys):
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, segment_bytes=65536, shard_bytes=2**24
    ) as writer:
        writer.write_batch({"x": np.zeros((2**14, 1024), "uint8")})
    tracemalloc.start()
    rotate_data(tmp_path, "train", keys=keys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**21  # the shard has 2**24


# ---------------------------------------------------------------- side by side


def test_an_open_dataset_goes_on_or_fails_closed(sealed, keys):
    data = EncryptedShardDataset(sealed, split="train", keys=keys)
    first = data[0]
    rotate_partition(sealed, "train", keys=keys)
    assert data[99][1] == NAMES[99]  # opened after the rotation, by the generation it verified
    rotate_data(sealed, "train", keys=keys)
    assert data[0][1] == first[1]  # this shard is open
    data.close()
    with pytest.raises(ShardCorruptedError, match="open it again"):
        data[50]
    assert_whole(sealed, keys)


def test_readers_beside_rotations_never_get_other_rows(sealed, keys):
    stop, wrong, seen = threading.Event(), [], [0, 0]

    def reader():
        draw = random.Random(4)
        while not stop.is_set():
            try:
                data = EncryptedShardDataset(sealed, split="train", keys=keys)
                for _ in range(20):
                    rows = [draw.randrange(100) for _ in range(5)]
                    x, names = data.__getitems__(rows).batch()
                    if not np.array_equal(x.numpy(), X[rows]) or names != [NAMES[i] for i in rows]:
                        wrong.append(rows)
                    seen[0] += 1
            except ShardCorruptedError:
                seen[1] += 1

    thread = threading.Thread(target=reader)
    thread.start()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        rotate_data(sealed, "train", keys=keys)
        rotate_partition(sealed, "train.sensitive", keys=keys)
    stop.set()
    thread.join()
    assert not wrong
    assert seen[0] > 20


def test_two_rotations_at_once_wait_for_each_other(sealed, keys):
    def rotate(_):
        rotate_data(sealed, "train", keys=keys)
        rotate_partition(sealed, "train", keys=keys)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(rotate, range(4)))
    assert manifest_of(sealed, keys).generation == 2 + 8
    assert shard_files(sealed) == set(manifest_of(sealed, keys).files)
    assert_whole(sealed, keys)


def test_the_lock_is_what_they_wait_for(sealed, keys):
    thread = threading.Thread(
        target=rotate_partition, args=(sealed, "train"), kwargs={"keys": keys}
    )
    with exclusive_lock(sealed / ".rotate.lock"):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert manifest_of(sealed, keys).generation == 2
    thread.join()
    assert manifest_of(sealed, keys).generation == 3


def test_sealing_goes_on_beside_a_rotation_and_a_replaced_split_stands(sealed, keys, monkeypatch):
    real = rotate.reseal_shard
    sealed_anew = []

    def meanwhile(*args, **options):
        if not sealed_anew:
            sealed_anew.append(seal(sealed, keys, slice(0, 10), replace=True))
        return real(*args, **options)

    # The other writer has to come in the middle of the rotation.
    monkeypatch.setattr(rotate, "reseal_shard", meanwhile)
    with pytest.raises((ConfigError, ShardCorruptedError)):
        rotate_data(sealed, "train", keys=keys)
    assert len(read(sealed, keys)[0]) == 10
    assert shard_files(sealed) == set(manifest_of(sealed, keys).files)


def test_a_split_replaced_at_the_last_moment_stands(sealed, keys, monkeypatch):
    real = rotate.commit

    def meanwhile(*args, **options):
        seal(sealed, keys, slice(0, 10), replace=True)
        return real(*args, **options)

    monkeypatch.setattr(rotate, "commit", meanwhile)
    with pytest.raises(ConfigError, match="What was sealed stands"):
        rotate_data(sealed, "train", keys=keys)
    assert len(read(sealed, keys)[0]) == 10
    assert shard_files(sealed) == set(manifest_of(sealed, keys).files)


# ---------------------------------------------------------------- records and folders


def test_what_cannot_be_recorded_does_not_happen(sealed, keys, second):
    def refuse(event):
        if event.action.startswith("data."):
            raise AuditWriteError("full")

    before, files = (sealed / "manifest.json").read_bytes(), shard_files(sealed)
    events.subscribe("refuse", refuse)
    for call in (
        lambda: rotate_data(sealed, "train", keys=keys),
        lambda: rotate_partition(sealed, "train", keys=keys),
        lambda: rotate_kek(sealed, keys=keys, to=second),
        lambda: add_recipient(sealed, "train", keys=keys, recipient=second),
    ):
        with pytest.raises(AuditWriteError):
            call()
    events.unsubscribe("refuse")
    assert (sealed / "manifest.json").read_bytes() == before
    assert shard_files(sealed) == files
    assert_whole(sealed, keys)


def test_each_rotation_is_announced(sealed, keys, second, heard):
    add_recipient(sealed, "train", keys=keys, recipient=second)
    remove_recipient(sealed, "train", keys=keys, key_id=second.key_id)
    rotate_partition(sealed, "train", keys=keys)
    rotate_data(sealed, "train", keys=keys)
    after = rotate_kek(sealed, keys=keys, to=second)
    told = [event for event in heard if event.action.startswith("data.")]
    assert [event.action for event in told] == [
        "data.recipient.add",
        "data.recipient.remove",
        "data.rotate.partition",
        "data.rotate.data",
        "data.rotate.kek",
    ]
    assert told[-1].details["manifest"] == after.digest


def test_a_folder_that_is_no_dataset_is_left_alone(tmp_path, keys, second):
    for call in (
        lambda: rotate_data(tmp_path, "train", keys=keys),
        lambda: rotate_kek(tmp_path, keys=keys, to=second),
        lambda: collect_garbage(tmp_path, keys=keys),
    ):
        with pytest.raises(ManifestMismatchError):
            call()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- leftovers


def test_leftovers_are_found_and_nothing_else(sealed, keys, tmp_path):
    files = shard_files(sealed)
    old = time.time() - 30 * 86400
    made = {
        "train/shard-00000-00000000.lsec": old,
        "train/.shard-00001-00000000.lsec.0123456789abcdef.tmp": old,
        ".manifest.json.0123456789abcdef.tmp": old,
        "train/shard-00002-00000000.lsec": time.time(),  # of a sealing that runs
        "train/notes.txt": old,
        "notes/readme.lsec": old,
    }
    (sealed / "notes").mkdir()
    for name, when in made.items():
        (sealed / name).write_bytes(b"x")
        os.utime(sealed / name, (when, when))
    for name in files:
        os.utime(sealed / name, (old, old))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "shard-00000-00000000.lsec").write_bytes(b"x")
    os.utime(outside / "shard-00000-00000000.lsec", (old, old))
    (sealed / "link").symlink_to(outside)
    removed = collect_garbage(sealed, keys=keys)
    assert removed == sorted(list(made)[:3])
    assert_whole(sealed, keys)
    assert (outside / "shard-00000-00000000.lsec").exists()
    with pytest.raises(ConfigError):
        collect_garbage(sealed, keys=keys, min_age_s=-1.0)


def test_a_journal_that_somebody_wrote_removes_nothing_of_worth(sealed, keys, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "shard-00000-00000000.lsec"
    victim.write_bytes(b"x")
    (sealed / "evil").symlink_to(outside)
    names = [*shard_files(sealed), "manifest.json", "../outside/x", "evil/" + victim.name, "\xff"]
    (sealed / ".leftovers").write_text("\n".join(names), encoding="utf-8")
    rotate_partition(sealed, "train", keys=keys)
    assert victim.exists()
    assert_whole(sealed, keys)


def test_a_journal_is_never_written_through_a_link(sealed, keys, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"before")
    (sealed / ".leftovers").symlink_to(victim)
    with pytest.raises(DataError, match="symbolic link"):
        RemovalList(sealed).note(["train/shard-00000-00000000.lsec"])
    rotate_data(sealed, "train", keys=keys)
    assert victim.read_bytes() == b"before"
    assert_whole(sealed, keys)


def test_a_sweep_without_a_trusted_manifest_removes_nothing(sealed, keys, other_keys):
    RemovalList(sealed).note(shard_files(sealed))
    with pytest.raises(ManifestMismatchError):
        rotate_partition(sealed, "train", keys=other_keys)
    assert_whole(sealed, keys)


# ---------------------------------------------------------------- crashes


def test_killed_at_any_moment_the_dataset_holds_the_same_rows(tmp_path, keys, other_keys):
    root = seal(tmp_path / "dataset", keys, shard_bytes=2048)
    trusted = [keys.signer.public_key, other_keys.signer.public_key]
    both = [LocalKeyProvider(one._path, trusted=trusted) for one in (keys, other_keys)]
    script = Path(__file__).with_name("rotate_forever.py")
    command = [sys.executable, str(script), str(root), str(keys._path), str(other_keys._path)]
    draw, generations, left_over = random.Random(12), set(), 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for round_ in range(60):
            process.stdin.write(f"{round_}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            manifest = read_manifest(root, trusted=both[0].trusted_signers)
            generations.add(manifest.generation)
            holders = {key.key_id for key in manifest.partitions["train"]}
            left_over += bool(shard_files(root) - manifest.files)
            for one in both:
                if one.key_id in holders:
                    assert_whole(root, one)
                else:
                    with pytest.raises(WrongKeyError):
                        read(root, one)
        process.stdin.close()
    assert len(generations) > 20  # it did rotate
    assert left_over > 3  # and was killed in the middle of it
    collect_garbage(root, keys=both[0], min_age_s=0)
    named = read_manifest(root, trusted=both[0].trusted_signers).files
    assert shard_files(root) == named
