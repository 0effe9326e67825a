"""Every file of a dataset belongs to the storage administrator, who tries each thing once.

The naive reader is the second reader of the format (``tests/vectors/reference.py``) without the
checks that an attack is named with. It takes the attacked dataset, most often with other rows; with
all of its checks it refuses, and so does this package.
"""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import reference

from lightning_secure import EncryptedShardDataset, EncryptedShardWriter
from lightning_secure.errors import IntegrityError, ManifestMismatchError

ROWS = np.arange(400, dtype="int64").reshape(200, 2)
OLD, VAL, OTHER = ROWS + 10_000, ROWS + 20_000, ROWS + 30_000
SEGMENT = 176  # 10 rows and a tag
STRANGER = bytes(range(32))
#: What ties the bytes of a shard to its place. Without them a reader decrypts what it finds.
PLACE = {"header", "fields", "commitment", "merkle", "tag"}


class World(NamedTuple):
    """A dataset, its state before it was last changed, and another one under the same key."""

    root: Path
    old: Path
    other: Path

    def shards(self, split="train", root=None) -> list[Path]:
        """In the order of the manifest."""
        return sorted(((root or self.root) / split).glob("*.lsec"))


def seal(root, keys, rows, split, **options):
    with EncryptedShardWriter(
        root, split=split, keys=keys, segment_bytes=160, shard_bytes=800, **options
    ) as writer:
        writer.write_batch({"x": rows})


@pytest.fixture(scope="module")
def template(tmp_path_factory, keys):
    base = tmp_path_factory.mktemp("template")
    seal(base / "dataset", keys, VAL, "val")
    seal(base / "dataset", keys, OLD, "train")
    shutil.copytree(base / "dataset", base / "old")
    seal(base / "dataset", keys, ROWS, "train", replace=True)
    seal(base / "other", keys, OTHER, "train")
    return base


@pytest.fixture
def world(template, tmp_path):
    base = shutil.copytree(template, tmp_path / "world")
    return World(base / "dataset", base / "old", base / "other")


def ours(world, keys, **options):
    data = EncryptedShardDataset(world.root, split="train", keys=keys, **options)
    (x,) = data.__getitems__(range(len(data))).batch()
    return x.numpy()


def naive(world, keys, skip=()):
    public = reference.read_key_file(keys._path)[1]
    columns = reference.read_dataset(world.root, "train", keys._path, skip=skip)
    manifest = reference.read_manifest(world.root, public, skip)
    schema = manifest["splits"]["train"]["schema"]
    return np.stack(reference.as_arrays(schema, columns)["x"])


def exchange(a: Path, b: Path) -> None:
    left, right = a.read_bytes(), b.read_bytes()
    a.write_bytes(right), b.write_bytes(left)


def edit(world, change, seed=None) -> None:
    """Change the manifest without the key: the old signature stays, or a stranger signs."""
    path = world.root / "manifest.json"
    envelope = json.loads(path.read_bytes())
    manifest = json.loads(base64.b64decode(envelope["payload"]))
    change(manifest)
    payload = reference.canonical(manifest)
    if seed is None:
        envelope["payload"] = reference.b64(payload)
        path.write_bytes(reference.canonical(envelope))
    else:
        path.write_bytes(reference.seal_envelope(payload, seed))


def edit_shards(world, change, seed=None) -> None:
    edit(world, lambda manifest: change(manifest["splits"]["train"]["shards"]), seed)


def patch(path: Path, offset: int, form: str, change) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, change(struct.unpack_from(form, data, offset)[0]))
    path.write_bytes(data)


# ---------------------------------------------------------------- the attacks


def swap_shards(world):
    exchange(*world.shards()[:2])


def swap_splits(world):
    for a, b in zip(world.shards("train"), world.shards("val"), strict=True):
        exchange(a, b)


def take_from_another_dataset(world):
    shutil.copyfile(world.shards(root=world.other)[1], world.shards()[1])


def replay_a_shard(world):
    shutil.copyfile(world.shards(root=world.old)[1], world.shards()[1])


def drop_a_file(world):
    world.shards()[2].unlink()


def drop_from_the_manifest(world):
    def change(shards):
        del shards[2]
        for number, shard in enumerate(shards):
            shard["number"] = number

    edit_shards(world, change)


def drop_and_sign(world):
    edit_shards(world, lambda shards: shards.pop(), STRANGER)


def repeat_a_shard(world):
    edit_shards(world, lambda shards: shards.append({**shards[0], "number": len(shards)}))


def reorder_shards(world):
    def change(shards):
        shards.reverse()
        for number, shard in enumerate(shards):
            shard["number"] = number

    edit_shards(world, change)


def truncate(world):
    path = world.shards()[0]
    path.write_bytes(path.read_bytes()[:-SEGMENT])


def truncate_and_say_so(world):
    """Consistently: in the header and in the manifest."""
    truncate(world)
    path = world.shards()[0]
    patch(path, 52, "<I", lambda n: n - 1)
    patch(path, 56, "<Q", lambda n: n - 10)

    def change(shards):
        shards[0].update(segments=4, records=40, size=path.stat().st_size)

    edit_shards(world, change)


def extend(world):
    """The first segment once more, and a header that counts it."""
    path = world.shards()[0]
    data = path.read_bytes()
    path.write_bytes(data + data[4096 : 4096 + SEGMENT])
    patch(path, 52, "<I", lambda n: n + 1)
    patch(path, 56, "<Q", lambda n: n + 10)


def reorder_segments(world):
    path = world.shards()[0]
    data = path.read_bytes()
    a, b = data[4096 : 4096 + SEGMENT], data[4096 + SEGMENT : 4096 + 2 * SEGMENT]
    path.write_bytes(data[:4096] + b + a + data[4096 + 2 * SEGMENT :])


def flip_a_bit(world):
    """GCM is a stream cipher: a flipped bit of ciphertext is a flipped bit of plaintext."""
    patch(world.shards()[0], 4096, "<B", lambda byte: byte ^ 64)


def lower_the_header_count(world):
    patch(world.shards()[0], 56, "<Q", lambda n: n - 1)


def spread_the_rows(world):
    """Fewer rows a segment, in the header: rows would come from other places."""
    patch(world.shards()[0], 64, "<I", lambda n: n - 1)


def downgrade_the_suite(world):
    patch(world.shards()[0], 10, "<H", lambda _: 0)


def downgrade_the_version(world):
    patch(world.shards()[0], 8, "<H", lambda _: 0)


def exchange_wrapped_keys(world):
    def change(shards):
        a, b = shards[0]["wrapped_key"], shards[1]["wrapped_key"]
        shards[0]["wrapped_key"], shards[1]["wrapped_key"] = b, a

    edit_shards(world, change)


def exchange_splits_in_the_manifest(world):
    def change(manifest):
        splits = manifest["splits"]
        splits["train"], splits["val"] = splits["val"], splits["train"]

    edit(world, change)


def edit_the_schema(world):
    def change(manifest):
        manifest["splits"]["train"]["schema"][0]["dtype"] = "float64"

    edit(world, change)


def edit_the_count(world):
    edit_shards(world, lambda shards: shards[0].update(records=49))


def link_to_another_shard(world):
    a, b = world.shards()[:2]
    a.unlink()
    a.symlink_to(b)


def point_to_another_file(world):
    edit_shards(world, lambda shards: shards[0].update(file=shards[1]["file"]))


class Attack(NamedTuple):
    """What is done, and without which checks it would have worked.

    ``same_rows``: the naive reader is made to believe something that is not in the rows.
    """

    do: Callable[[World], None]
    skip: set[str]
    same_rows: bool = False


ATTACKS = [
    Attack(swap_shards, PLACE),
    Attack(swap_splits, PLACE),
    Attack(take_from_another_dataset, PLACE),
    Attack(replay_a_shard, PLACE),
    Attack(drop_a_file, {"file"}),
    Attack(drop_from_the_manifest, {"signature", "fields"}),
    Attack(drop_and_sign, {"signature"}),
    Attack(repeat_a_shard, {"signature", "fields"}),
    Attack(reorder_shards, {"signature", "fields"}),
    Attack(truncate, {"size", "numbers", "merkle", "cut"}),
    Attack(truncate_and_say_so, {"signature", "header", "merkle", "tag"}),
    Attack(extend, {"size", *PLACE} - {"commitment"}),
    Attack(reorder_segments, {"merkle", "tag"}),
    Attack(flip_a_bit, {"tag"}),
    Attack(lower_the_header_count, {"header", "fields", "tag", "content"}),
    Attack(spread_the_rows, {"header", "tag", "numbers", "content"}),
    Attack(downgrade_the_suite, {"header", "suite", "tag"}, same_rows=True),
    Attack(downgrade_the_version, {"header", "suite", "tag"}, same_rows=True),
    Attack(exchange_wrapped_keys, {"signature", "wrap", "commitment", "tag"}),
    Attack(exchange_splits_in_the_manifest, {"signature"}),
    Attack(edit_the_schema, {"signature", "fields"}),
    Attack(edit_the_count, {"signature", "fields"}, same_rows=True),
    Attack(link_to_another_shard, PLACE),
    Attack(point_to_another_file, {"signature", *PLACE}),
]


def test_nothing_is_wrong_before(world, keys):
    assert np.array_equal(ours(world, keys), ROWS)
    assert np.array_equal(naive(world, keys), ROWS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.do.__name__)
def test_an_attack_works_on_a_naive_reader_and_not_here(attack, world, keys):
    attack.do(world)
    taken = naive(world, keys, attack.skip)
    assert np.array_equal(taken, ROWS) == attack.same_rows
    with pytest.raises(reference.RefusedError):
        naive(world, keys)
    with pytest.raises(IntegrityError):
        ours(world, keys)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.do.__name__)
def test_no_check_is_left_out_for_nothing(attack, world, keys):
    """Each check that the naive reader leaves out would have stopped the attack by itself."""
    attack.do(world)
    for check in sorted(attack.skip):
        with pytest.raises(reference.RefusedError):
            naive(world, keys, attack.skip - {check})


# ---------------------------------------------------------------- an older, complete state


def roll_back(world):
    shutil.rmtree(world.root)
    shutil.copytree(world.old, world.root)


def test_a_roll_back_is_seen_with_a_pin_and_only_with_one(world, keys):
    data = EncryptedShardDataset(world.root, split="train", keys=keys)
    generation, digest = data.manifest.generation, data.manifest.digest
    roll_back(world)
    assert np.array_equal(ours(world, keys), OLD)  # as docs/threat-model.md says
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        ours(world, keys, min_generation=generation)
    with pytest.raises(ManifestMismatchError, match="pinned"):
        ours(world, keys, manifest_digest=digest)


def test_the_manifest_alone_rolled_back(world, keys):
    """Its shards were removed when they were replaced."""
    shutil.copyfile(world.old / "manifest.json", world.root / "manifest.json")
    with pytest.raises(IntegrityError):
        ours(world, keys)


def test_the_manifest_of_another_dataset(world, keys):
    shutil.copyfile(world.other / "manifest.json", world.root / "manifest.json")
    with pytest.raises(IntegrityError):
        ours(world, keys)


def test_a_whole_dataset_of_a_stranger(world, keys, other_keys):
    """Sealed properly, under keys that are nobody's here."""
    shutil.rmtree(world.root)
    seal(world.root, other_keys, OTHER, "train")
    with pytest.raises(ManifestMismatchError, match="no valid signature"):
        ours(world, keys)


def test_somebody_elses_dataset_under_the_same_key_needs_a_pin(world, keys):
    """A signature says who sealed, not what for: only a pin says which dataset is meant."""
    digest = EncryptedShardDataset(world.root, split="train", keys=keys).manifest.digest
    shutil.rmtree(world.root)
    shutil.copytree(world.other, world.root)
    assert np.array_equal(ours(world, keys), OTHER)
    with pytest.raises(ManifestMismatchError, match="pinned"):
        ours(world, keys, manifest_digest=digest)
