"""Whole batches of columns that lie under keys of their own, also after keys and rows went."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest

from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.erasure.erase import erase_subject
from lightning_secure.data.format.header import HEADER_BYTES
from lightning_secure.data.key_rotation.rotate import add_recipient, rotate_data, rotate_partition
from lightning_secure.data.loader.loader import EncryptedLoader
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ManifestMismatchError, ShardCorruptedError, WrongKeyError

ROWS = 300
ID = np.arange(ROWS)
X = np.random.default_rng(3).integers(0, 256, (ROWS, 3, 8), dtype="uint8")
NOTES = [f"note {i} " + "z" * (i % 9) for i in range(ROWS)]
WHO = np.sort(ID % 7)
COLUMNS = {"note": "sensitive", "id": "id"}


def seal(root, keys, **options):
    options = {"segment_bytes": 640, "shard_bytes": 3000, "column_keys": COLUMNS, **options}
    with EncryptedShardWriter(root, split="train", keys=keys, **options) as writer:
        writer.write_batch({"note": NOTES, "x": X, "id": ID, "who": WHO})
    return root


@pytest.fixture(scope="module")
def template(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("groups") / "sealed", keys)


@pytest.fixture(scope="module")
def by_subject(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("groups") / "subjects", keys, subject_column="who")


@pytest.fixture
def sealed(template, tmp_path):
    return shutil.copytree(template, tmp_path / "sealed")


@pytest.fixture
def subjects(by_subject, tmp_path):
    return shutil.copytree(by_subject, tmp_path / "subjects")


def loader(root, keys, *, columns=None, **options):
    data = EncryptedShardDataset(root, split="train", keys=keys, output="dict", columns=columns)
    options = {"batch_size": 16, "shuffle": True, "window_bytes": 2500, "threads": 2, **options}
    return EncryptedLoader(data, **options)


def ids(batches) -> list[int]:
    return [int(row) for batch in batches for row in batch["id"]]


def matching(batches):
    """Each row with all that belongs to it."""
    found = []
    for batch in batches:
        rows = batch["id"].tolist()
        assert np.array_equal(batch["x"].numpy(), X[rows])
        assert batch["note"] == [NOTES[row] for row in rows]
        found += rows
    return found


@pytest.mark.parametrize("window_bytes", [1, 2500, 10**6])
def test_each_row_comes_once_with_its_columns_of_all_groups(sealed, keys, window_bytes):
    batches = loader(sealed, keys, window_bytes=window_bytes)
    first = matching(batches)
    assert sorted(first) == ID.tolist()
    assert first != ID.tolist()
    batches.set_epoch(1)
    assert sorted(again := matching(batches)) == ID.tolist()
    assert again != first


@pytest.mark.parametrize("columns", [["id"], ["id", "x"], ["note", "id"]])
def test_the_order_does_not_depend_on_which_columns_are_read(sealed, keys, columns):
    part = loader(sealed, keys, columns=columns)
    unread = {"note", "x", "id"} - set(columns)
    assert len(part._dataset._shards._groups.schemas) == 3 - len(unread)
    assert ids(part) == ids(loader(sealed, keys))


@pytest.mark.parametrize("rotate", ["data", "partition", None])
def test_a_run_goes_on_in_the_middle_of_an_epoch(sealed, keys, rotate):
    """With other columns, with two processes, and after every key was exchanged."""
    run = loader(sealed, keys)
    seen = matching(itertools.islice(run, 7))
    state = run.state_dict()
    if rotate == "data":
        rotate_data(sealed, "train", keys=keys)
    elif rotate == "partition":
        for name in ("train", "train.sensitive", "train.id"):
            rotate_partition(sealed, name, keys=keys)
    rest = []
    for rank, columns in enumerate((None, ["id"])):
        other = loader(sealed, keys, columns=columns, rank=rank, world_size=2)
        other.load_state_dict(state)
        rest += ids(other)
    assert sorted(seen + rest) == ID.tolist()


def test_rows_with_segments_of_their_own_are_decrypted_where_they_belong(tmp_path, keys):
    seal(tmp_path, keys, segment_bytes=1)
    for threads in (1, 3):
        batches = loader(tmp_path, keys, threads=threads, window_bytes=6000)
        assert sorted(matching(batches)) == ID.tolist()
    again = loader(tmp_path, keys, columns=["x", "id"])
    assert ids(again) == ids(loader(tmp_path, keys, columns=["id"]))


def test_what_was_altered_in_any_group_is_not_returned(sealed, keys):
    manifest = read_manifest(sealed, trusted=keys.trusted_signers)
    for group in manifest.splits["train"].all_groups:
        path = sealed / group.shards[1].file
        good = path.read_bytes()
        path.write_bytes(good[:HEADER_BYTES] + bytes([good[HEADER_BYTES] ^ 1]) + good[4097:])
        with pytest.raises(ShardCorruptedError, match="segment 0"):
            list(loader(sealed, keys))
        path.write_bytes(good)
    assert sorted(matching(loader(sealed, keys))) == ID.tolist()


def test_whoever_has_one_key_trains_on_its_columns(sealed, keys, other_keys):
    reader = LocalKeyProvider(other_keys._path, trusted=[keys.signer.public_key])
    for name in ("train", "train.id"):
        add_recipient(sealed, name, keys=keys, recipient=reader)
    with pytest.raises(WrongKeyError, match="note"):
        loader(sealed, reader)
    assert ids(loader(sealed, reader, columns=["x", "id"])) == ids(loader(sealed, keys))


def test_rows_of_erased_subjects_are_not_in_the_epoch(subjects, keys):
    run = loader(subjects, keys)
    assert sorted(matching(run)) == ID.tolist()
    run.set_epoch(1)
    matching(itertools.islice(run, 5))
    state = run.state_dict()
    kept = ID[WHO != 3].tolist()
    erase_subject(subjects, "train", 3, keys=keys)
    shards = read_manifest(subjects, trusted=keys.trusted_signers).splits["train"].shards
    assert [shard.number for shard in shards] != list(range(len(shards)))
    rest = loader(subjects, keys)
    with pytest.raises(ManifestMismatchError, match="other rows"):
        rest.load_state_dict(state)
    seen = matching(itertools.islice(rest, 4))
    state = rest.state_dict()
    again = loader(subjects, keys, world_size=1)
    again.load_state_dict(state)
    assert sorted(seen + matching(again)) == kept
    assert sorted(ids(loader(subjects, keys, shuffle=False, columns=["id"]))) == kept
