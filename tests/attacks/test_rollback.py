"""A dataset that was put back as a whole, under the hands of whoever writes to it next.

Without a pin, the writer makes a new generation of the old state, and a reader's pin of before
accepts that. With one, nothing is written.
"""

from __future__ import annotations

import shutil

import fsspec
import numpy as np
import pytest

from lightning_secure.crypto.manifest import MANIFEST_NAME, read_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.erasure.erase import erase_shard, erase_subject
from lightning_secure.data.key_rotation.rotate import (
    add_recipient,
    remove_recipient,
    rotate_data,
    rotate_kek,
    rotate_partition,
)
from lightning_secure.data.manifests.garbage import collect_garbage
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.storage import RemoteStorage
from lightning_secure.data.writing.close_writers import close_together
from lightning_secure.data.writing.seal import seal
from lightning_secure.data.writing.split_rules import SplitByRatio
from lightning_secure.data.writing.upload import upload_split
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, ManifestMismatchError
from lightning_secure.util import events

X = np.arange(40, dtype="int64")


def write(root, keys, split="more", rows=X, **options):
    with EncryptedShardWriter(root, split=split, keys=keys, **options) as writer:
        writer.write_batch({"x": rows})


@pytest.fixture(scope="module")
def second(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("second") / "b.kek"
    LocalKeyProvider.generate(path)
    return LocalKeyProvider(path, trusted=[keys.signer.public_key])


@pytest.fixture(scope="module")
def states(tmp_path_factory, keys, second):
    """Two states of one dataset; in the newer one a patient is erased and a split was added."""
    folder = tmp_path_factory.mktemp("states")
    root = folder / "new"
    write(root, keys, "train", subject_column="x", rows=X[:4])
    add_recipient(root, "train", keys=keys, recipient=second)
    shutil.copytree(root, folder / "old")
    erase_subject(root, "train", 1, keys=keys, recipients=[second])
    write(root, keys, "val")
    return folder


@pytest.fixture
def rolled_back(states, tmp_path):
    return shutil.copytree(states / "old", tmp_path / "d")


def manifest_of(root, keys):
    return read_manifest(root, trusted=keys.trusted_signers)


def rows(root, keys, **pins):
    return len(EncryptedShardDataset(root, split="train", keys=keys, **pins))


WRITERS = {
    "writer": lambda root, keys, _, **pins: write(root, keys, **pins),
    "seal": lambda root, keys, _, **pins: seal({"x": X}, root, keys=keys, split="more", **pins),
    "rotate_kek": lambda root, keys, two, **pins: rotate_kek(
        root, keys=keys, to=two, signer=keys.signer, **pins
    ),
    "rotate_partition": lambda root, keys, two, **pins: rotate_partition(
        root, "train", keys=keys, recipients=[two], **pins
    ),
    "rotate_data": lambda root, keys, _, **pins: rotate_data(root, "train", keys=keys, **pins),
    "add_recipient": lambda root, keys, two, **pins: add_recipient(
        root, "train", keys=keys, recipient=two, **pins
    ),
    "remove_recipient": lambda root, keys, two, **pins: remove_recipient(
        root, "train", keys=keys, key_id=two.key_id, **pins
    ),
    "erase_shard": lambda root, keys, two, **pins: erase_shard(
        root, "train", 3, keys=keys, recipients=[two], **pins
    ),
    "erase_subject": lambda root, keys, two, **pins: erase_subject(
        root, "train", 2, keys=keys, recipients=[two], **pins
    ),
}


def contents(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith("lock")
    }


@pytest.mark.parametrize("pin", ["generation", "digest"])
@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_written_to_a_dataset_that_was_rolled_back(
    states, rolled_back, keys, second, writer, pin
):
    newest = manifest_of(states / "new", keys)
    pins = (
        {"min_generation": newest.generation}
        if pin == "generation"
        else {"manifest_digest": newest.digest}
    )
    before = contents(rolled_back)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        WRITERS[writer](rolled_back, keys, second, **pins)
    assert contents(rolled_back) == before


def test_without_a_pin_the_erased_rows_come_back_under_a_new_number(
    states, rolled_back, keys, second
):
    """Why writers take pins: what the threat model says of whoever passes none."""
    pin = manifest_of(states / "new", keys).generation
    assert rows(states / "new", keys, min_generation=pin) == 3
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        rows(rolled_back, keys, min_generation=pin)
    while manifest_of(rolled_back, keys).generation < pin:
        rotate_partition(rolled_back, "train", keys=keys, recipients=[second])
    assert rows(rolled_back, keys, min_generation=pin) == 4


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_pinned_and_in_place_is_written_to(states, tmp_path, keys, second, writer):
    root = shutil.copytree(states / "new", tmp_path / "d")
    before = manifest_of(root, keys)
    WRITERS[writer](
        root, keys, second, min_generation=before.generation, manifest_digest=before.digest
    )
    after = manifest_of(root, keys)
    assert (after.generation, after.previous) == (before.generation + 1, before.digest)


# ---------------------------------------------------------------- while somebody writes


@pytest.fixture
def current(states, tmp_path):
    return shutil.copytree(states / "new", tmp_path / "d")


def put_back(states, root):
    shutil.copyfile(states / "old" / MANIFEST_NAME, root / MANIFEST_NAME)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_roll_back_while_rows_are_sealed_is_seen(states, current, keys, pinned):
    """Also without a pin: the writer has seen a newer one itself."""
    pins = {"min_generation": manifest_of(current, keys).generation} if pinned else {}
    writer = EncryptedShardWriter(current, split="more", keys=keys, **pins)
    writer.write_batch({"x": X})
    put_back(states, current)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        writer.close()
    assert manifest_of(current, keys).digest == manifest_of(states / "old", keys).digest
    assert not list((current / "more").iterdir())


def test_a_roll_back_while_data_is_rotated_is_seen(states, keys, second, tmp_path):
    root = shutil.copytree(states / "old", tmp_path / "d")
    write(root, keys, "val")  # so that the split itself is the same in both

    def attack(event):
        if event.action == "key.unwrap":
            put_back(states, root)

    events.subscribe("attacker", attack)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        rotate_data(root, "train", keys=keys)
    assert manifest_of(root, keys).digest == manifest_of(states / "old", keys).digest
    assert rows(root, keys) == 4


def test_a_roll_back_takes_no_rows_of_a_split_that_was_sealed_before(tmp_path, keys):
    """A sealing that goes on and is refused removes what it wrote, and that is not its to remove.

    The older manifest, put in place, does not name the shards of the split that is complete.
    """
    root, options = tmp_path / "d", {"keys": keys, "source_id": "v1"}
    write(root, keys, "other")
    older = (root / MANIFEST_NAME).read_bytes()
    write(root, keys, "train", source_id="v1")
    newest = (root / MANIFEST_NAME).read_bytes()
    done = EncryptedShardWriter(root, split="train", resume=True, **options)
    late = EncryptedShardWriter(root, split="val", **options)
    late.write_batch({"x": X})
    (root / MANIFEST_NAME).write_bytes(older)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        close_together([done, late])
    (root / MANIFEST_NAME).write_bytes(newest)
    data = EncryptedShardDataset(root, split="train", keys=keys)
    assert np.array_equal(data.__getitems__(range(len(X))).batch()[0], X)


def test_another_dataset_in_its_place_is_seen(current, keys, tmp_path):
    write(tmp_path / "other", keys)
    writer = EncryptedShardWriter(current, split="more", keys=keys)
    writer.write_batch({"x": X})
    for _ in range(5):  # it may well have a higher number
        rotate_partition(tmp_path / "other", "more", keys=keys)
    shutil.copyfile(tmp_path / "other" / MANIFEST_NAME, current / MANIFEST_NAME)
    with pytest.raises(ManifestMismatchError, match="another dataset"):
        writer.close()


@pytest.mark.parametrize("pins", [{"min_generation": 1}, {"manifest_digest": "0" * 64}])
def test_no_dataset_is_begun_where_one_was_pinned(tmp_path, keys, pins):
    with pytest.raises(ManifestMismatchError, match="there is no dataset"):
        EncryptedShardWriter(tmp_path / "d", split="train", keys=keys, **pins)
    assert not (tmp_path / "d").exists()
    write(tmp_path / "d", keys, min_generation=0)


@pytest.mark.parametrize(
    "pins",
    [
        {"min_generation": "3"},
        {"min_generation": True},
        {"min_generation": -1},
        {"manifest_digest": "a3"},
        {"manifest_digest": "A" * 64},
    ],
)
def test_what_pins_nothing_is_refused(current, keys, pins):
    with pytest.raises(ConfigError, match=next(iter(pins))):
        rotate_data(current, "train", keys=keys, **pins)


def test_shards_that_only_the_newest_manifest_names_are_not_garbage(states, current, keys):
    pin = manifest_of(current, keys).generation
    files = manifest_of(current, keys).files
    newest = (current / MANIFEST_NAME).read_bytes()
    put_back(states, current)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        collect_garbage(current, keys=keys, min_age_s=0, min_generation=pin)
    (current / ".leftovers").write_text("".join(f"\n{name}" for name in files) + "\n")
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        rotate_data(current, "train", keys=keys, min_generation=pin)
    (current / MANIFEST_NAME).write_bytes(newest)
    assert rows(current, keys, min_generation=pin) == 3
    assert all((current / name).is_file() for name in files)


# ---------------------------------------------------------------- behind a URL


def test_nothing_is_sent_to_a_remote_dataset_that_was_rolled_back(url, states, keys):
    memory = fsspec.filesystem("memory")
    upload_split(states / "new", url, split="train", keys=keys)
    old = memory.cat_file(f"{url[8:]}/{MANIFEST_NAME}")
    upload_split(states / "new", url, split="val", keys=keys)
    newest = manifest_of(RemoteStorage(url), keys)
    memory.pipe_file(f"{url[8:]}/{MANIFEST_NAME}", old)
    names = memory.find(url[8:])
    pin = {"min_generation": newest.generation}
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        upload_split(states / "new", url, split="train", keys=keys, replace=True, **pin)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        write(url, keys, **pin)
    with pytest.raises(ManifestMismatchError, match="pinned"):
        seal({"x": X}, url, keys=keys, split="more", manifest_digest=newest.digest)
    assert memory.find(url[8:]) == names
    assert memory.cat_file(f"{url[8:]}/{MANIFEST_NAME}") == old


def test_a_remote_roll_back_while_rows_are_sealed_is_seen(url, keys, states):
    memory = fsspec.filesystem("memory")
    upload_split(states / "new", url, split="train", keys=keys)
    old = memory.cat_file(f"{url[8:]}/{MANIFEST_NAME}")
    upload_split(states / "new", url, split="val", keys=keys)
    writer = EncryptedShardWriter(url, split="more", keys=keys)
    writer.write_batch({"x": X})
    memory.pipe_file(f"{url[8:]}/{MANIFEST_NAME}", old)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        writer.close()
    memory.rm_file(f"{url[8:]}/{MANIFEST_NAME}")
    again = EncryptedShardWriter(url, split="more", keys=keys)
    again.abort()
    with pytest.raises(ManifestMismatchError, match="there is no dataset"):
        upload_split(states / "new", url, split="val", keys=keys, min_generation=1)


# ---------------------------------------------------------------- several splits of one call


@pytest.mark.parametrize("where", ["folder", "url"])
def test_splits_of_one_call_appear_in_one_generation(tmp_path, url, keys, heard, where):
    root = url if where == "url" else tmp_path / "d"
    place = RemoteStorage(url) if where == "url" else root
    write(root, keys, "other")
    before = manifest_of(place, keys)
    sealed = seal(
        {"x": X},
        root,
        keys=keys,
        split=SplitByRatio(ratios={"train": 0.5, "val": 0.5}, seed=1),
        manifest_digest=before.digest,
    )
    after = manifest_of(place, keys)
    assert (after.previous, after.splits.keys()) == (before.digest, {"other", "train", "val"})
    assert (sealed.generation, sealed.manifest_digest) == (after.generation, after.digest)
    action = "data.upload" if where == "url" else "data.seal"
    told = [event.details for event in heard if event.action == action][-2:]
    assert {one["split"] for one in told} == {"train", "val"}
    assert {one["manifest"] for one in told} == {after.digest}


def test_splits_of_one_call_appear_all_or_none(tmp_path, keys):
    root = tmp_path / "d"
    rule = SplitByRatio(ratios={"train": 0.5, "val": 0.5}, seed=1)

    def interloper(taken, rows):
        write(root, keys, "val")  # another writer is first with one of them

    with pytest.raises(ConfigError, match="exists"):
        seal({"x": X}, root, keys=keys, split=rule, progress=interloper)
    assert manifest_of(root, keys).splits.keys() == {"val"}
    assert not list((root / "train").iterdir())
