"""Columns under keys of their own: who has only one key reads only those columns."""

from __future__ import annotations

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.manifest import PAYLOAD_TYPE, Manifest, read_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.crypto.signing import seal_envelope
from lightning_secure.data.format.columns import Column, Schema
from lightning_secure.data.key_rotation.rotate import add_recipient, remove_recipient
from lightning_secure.data.reading.column_groups import GroupedReader
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    ManifestMismatchError,
    ShardCorruptedError,
    WrongKeyError,
)

ROWS = 120
X = np.random.default_rng(1).normal(size=(ROWS, 4)).astype("float32")
Y = np.arange(ROWS) % 3
NOTES = [f"note {i} " + "z" * (i % 7) for i in range(ROWS)]
CODES = np.arange(ROWS, dtype="int16") * 11
KEYS = {"note": "sensitive", "code": "sensitive", "y": "label"}


def seal(root, keys, split="train", **options):
    options = {"segment_bytes": 256, "shard_bytes": 1024, "column_keys": KEYS, **options}
    with EncryptedShardWriter(root, split=split, keys=keys, **options) as writer:
        for part in (slice(0, 50), slice(50, ROWS)):
            writer.write_batch(
                {"note": NOTES[part], "x": X[part], "y": Y[part], "code": CODES[part]}
            )
    return root


def dataset(root, keys, **options):
    return EncryptedShardDataset(root, **{"split": "train", "keys": keys, **options})


@pytest.fixture
def researcher(other_keys, keys):
    return LocalKeyProvider(other_keys._path, trusted=[keys.signer.public_key])


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("grouped"), keys)


@pytest.fixture
def shared(sealed, keys, researcher, tmp_path):
    """The researcher may open the split's own partition, and no other."""
    root = shutil.copytree(sealed, tmp_path / "shared")
    add_recipient(root, "train", keys=keys, recipient=researcher)
    return root


def test_whoever_has_all_keys_reads_all_columns_in_their_order(sealed, keys, heard):
    data = dataset(sealed, keys)
    order = [7, 119, 0, 7, 64]
    note, x, y, code = data.__getitems__(order).batch()
    assert note == [NOTES[i] for i in order]
    assert np.array_equal(x.numpy(), X[order])
    assert (y.tolist(), code.tolist()) == (Y[order].tolist(), CODES[order].tolist())
    assert data.schema.names == ("note", "x", "y", "code")
    assert len(data.entry.shards) > 3
    assert data.entry.shards[0].segments > 2
    unwraps = [event.details["partition"] for event in heard if event.action == "key.unwrap"]
    assert unwraps == ["train", "train.sensitive", "train.label"]  # one call a partition
    assert pickle.loads(pickle.dumps(data))[3][0] == NOTES[3]


def test_only_the_keys_that_are_needed_are_asked_for(sealed, keys, heard):
    row = dataset(sealed, keys, columns=("y",))[5]
    assert row[0] == Y[5]
    assert [e.details["partition"] for e in heard if e.action == "key.unwrap"] == ["train.label"]


def test_a_role_without_the_sensitive_key_trains_on_the_others(shared, researcher):
    data = dataset(shared, researcher, columns=("x",))
    (x,) = data.__getitems__(range(ROWS)).batch()
    assert np.array_equal(x.numpy(), X)


@pytest.mark.parametrize("columns", [None, ("x", "note"), ("code",)])
def test_a_column_that_the_key_does_not_open_is_refused(shared, researcher, columns):
    with pytest.raises(WrongKeyError, match=r"'train\.sensitive'"):
        dataset(shared, researcher, columns=columns)


def test_the_error_says_what_can_be_read(shared, researcher):
    with pytest.raises(WrongKeyError, match=r"Pass columns=\['x', 'y'\] to read the others"):
        dataset(shared, researcher)
    with pytest.raises(WrongKeyError) as raised:
        dataset(shared, researcher, columns=("code", "note"))
    assert "Pass columns" not in str(raised.value)


def test_the_other_key_alone_opens_only_the_sensitive_columns(sealed, keys, researcher, tmp_path):
    root = shutil.copytree(sealed, tmp_path / "d")
    add_recipient(root, "train.sensitive", keys=keys, recipient=researcher)
    assert dataset(root, researcher, columns=("code",))[9][0] == CODES[9]
    with pytest.raises(WrongKeyError):
        dataset(root, researcher, columns=("x",))


def test_a_readers_key_opens_no_shard_of_another_group(shared, keys, researcher):
    """Past the dataset class: what the researcher can unwrap does not open sensitive shards."""
    manifest = read_manifest(shared, trusted=researcher.trusted_signers)
    mine = manifest.open_partition("train", researcher)
    for group in manifest.splits["train"].groups:
        for shard in group.shards:
            with pytest.raises(IntegrityError):
                mine.open(shard)


def test_a_removed_recipient_reads_nothing_any_more(shared, keys, researcher):
    old = read_manifest(shared, trusted=keys.trusted_signers)
    remove_recipient(shared, "train", keys=keys, key_id=researcher.key_id)
    with pytest.raises(WrongKeyError):
        dataset(shared, researcher, columns=("x",))
    new = read_manifest(shared, trusted=keys.trusted_signers)
    stolen = old.open_partition("train", researcher)  # what it may have kept
    with pytest.raises(IntegrityError):
        stolen.open(new.splits["train"].shards[0])
    assert dataset(shared, keys)[3][0] == NOTES[3]


# ---------------------------------------------------------------- tampering


def test_a_group_whose_shard_is_exchanged_with_another_groups(sealed, keys, tmp_path):
    root = shutil.copytree(sealed, tmp_path / "d")
    split = read_manifest(root, trusted=keys.trusted_signers).splits["train"]
    shutil.copyfile(root / split.shards[0].file, root / split.groups[0].shards[0].file)
    data = dataset(root, keys)
    with pytest.raises(ShardCorruptedError):
        data[0]
    assert np.array_equal(dataset(root, keys, columns=("x",))[0][0].numpy(), X[0])


def test_two_shards_of_a_group_exchanged(sealed, keys, tmp_path):
    root = shutil.copytree(sealed, tmp_path / "d")
    first, second, *_ = (
        read_manifest(root, trusted=keys.trusted_signers).splits["train"].groups[0].shards
    )
    a, b = (root / first.file).read_bytes(), (root / second.file).read_bytes()
    (root / first.file).write_bytes(b), (root / second.file).write_bytes(a)
    with pytest.raises(ShardCorruptedError):
        dataset(root, keys)[0]


def test_rows_of_different_groups_cannot_be_shifted_by_who_signs(sealed, keys, tmp_path):
    """Groups whose segments hold other rows are refused when a shard is opened."""
    other = seal(tmp_path / "other", keys, segment_bytes=128)
    mine, theirs = (
        dataset(root, keys, columns=("x",)).shards.reader(0) for root in (sealed, other)
    )
    with pytest.raises(ShardCorruptedError, match="same rows"):
        GroupedReader([mine, theirs])


def test_a_manifest_whose_groups_do_not_fit_is_refused(sealed, keys, tmp_path):
    good = read_manifest(sealed, trusted=keys.trusted_signers)

    def refused(change):
        value = pickle.loads(pickle.dumps(good.to_json()))
        change(value["splits"]["train"], value)
        with pytest.raises(IntegrityError):
            Manifest.from_json(value)

    Manifest.from_json(good.to_json())
    refused(lambda split, _: split["groups"][0]["shards"].pop())
    refused(lambda split, _: split["groups"][0]["shards"][0].update(records=1))
    refused(lambda split, _: split["groups"][0].update(partition="train"))
    refused(lambda split, _: split["groups"][0].update(partition="nobody"))
    refused(lambda split, _: split["groups"][0].update(more=1))
    refused(lambda split, _: split.update(order=["x"]))
    refused(lambda split, _: split.update(order=["x", 5]))
    refused(lambda split, _: split.pop("order"))
    refused(lambda split, _: split.update(groups={}))
    refused(lambda split, _: split.update(content="00"))
    refused(lambda split, _: split.update(subject_key="!"))
    refused(lambda split, _: split["shards"][0].update(subject="00"))
    refused(lambda split, _: split["schema"].append(split["groups"][0]["schema"][0]))
    refused(lambda _, value: value["partitions"].update({"train.label": []}))


# ---------------------------------------------------------------- sealing


def test_the_content_digest_covers_every_group(sealed, keys):
    split = read_manifest(sealed, trusted=keys.trusted_signers).splits["train"]
    first, *rest = split.groups[0].shards
    changed = dataclasses.replace(first, merkle_root=bytes(32))
    group = dataclasses.replace(split.groups[0], shards=(changed, *rest))
    other = dataclasses.replace(split, groups=(group, *split.groups[1:]))
    assert other.content_digest != split.content_digest


def test_splits_without_column_keys_are_written_as_ever(tmp_path, keys):
    seal(tmp_path, keys, column_keys=None)
    manifest = read_manifest(tmp_path, trusted=keys.trusted_signers).to_json()
    assert manifest["splits"]["train"].keys() == {"partition", "schema", "shards", "attributes"}
    assert list(manifest["partitions"]) == ["train"]


def test_replacing_a_split_replaces_its_partitions(tmp_path, keys):
    seal(tmp_path, keys)
    seal(tmp_path, keys, split="val")
    seal(tmp_path, keys, column_keys=None, replace=True)
    manifest = read_manifest(tmp_path, trusted=keys.trusted_signers)
    assert set(manifest.partitions) == {"train", "val", "val.sensitive", "val.label"}
    assert len(list((tmp_path / "train").iterdir())) == len(manifest.splits["train"].shards)
    assert len(dataset(tmp_path, keys, split="val")) == ROWS


def test_a_partition_of_another_split_is_not_taken_over(tmp_path, keys):
    seal(tmp_path, keys)
    with pytest.raises(ConfigError, match=r"'train\.label'.* belong to split 'train'"):
        EncryptedShardWriter(tmp_path, split="train.label", keys=keys)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "s" * 60])
def test_a_key_name_that_cannot_be_one_is_refused(tmp_path, keys, name):
    with pytest.raises(ConfigError, match="column_keys"):
        EncryptedShardWriter(tmp_path, split="train", keys=keys, column_keys={"x": name})


def test_a_sensitive_column_that_is_absent_is_not_overlooked(tmp_path, keys):
    writer = EncryptedShardWriter(tmp_path, split="train", keys=keys, column_keys={"diag": "s"})
    with pytest.raises(DataError, match=r"\['diag'\].*the split's key"):
        writer.write_batch({"x": X, "diagnosis": Y})
    with pytest.raises(DataError, match="one column at least"):
        writer.write_batch({"diag": Y})
    writer.abort()


def test_a_failed_sealing_leaves_nothing_of_any_group(tmp_path, keys):
    def fail():
        with EncryptedShardWriter(
            tmp_path, split="train", keys=keys, column_keys={"y": "s"}, segment_bytes=64,
            shard_bytes=256,
        ) as writer:  # fmt: skip
            writer.write_batch({"x": X, "y": Y})
            assert writer.records == ROWS
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list((tmp_path / "train").iterdir())


def test_rows_longer_than_a_segment_and_every_kind_of_column(tmp_path, keys):
    schema = Schema(
        (
            Column("long", "bytes"),
            Column("ragged", "ragged", "int32", (2,)),
            Column("half", "tensor", "bfloat16", (2,)),
        )
    )
    long = [b"q" * (40 * (i % 3)) for i in range(9)]
    ragged = [torch.arange(2 * (i % 4), dtype=torch.int32).view(-1, 2) for i in range(9)]
    half = torch.randn(9, 2).bfloat16()
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, schema=schema, segment_bytes=50, shard_bytes=200,
        column_keys={"ragged": "a", "half": "b"},
    ) as writer:  # fmt: skip
        writer.write_batch({"long": long, "ragged": ragged, "half": half})
    a, b, c = dataset(tmp_path, keys).__getitems__(range(9)).batch()
    assert a == long
    assert [item.tolist() for item in b] == [item.tolist() for item in ragged]
    assert torch.equal(c, half)


def test_a_manifest_with_a_field_out_of_place_is_not_canonical(sealed, keys, tmp_path):
    """`order` without `groups` says nothing and would be a second form of one manifest."""
    root = seal(tmp_path / "d", keys, column_keys=None)
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    value = manifest.to_json()
    for extra in ({"groups": []}, {"order": ["x"]}):
        changed = {**value, "splits": {"train": {**value["splits"]["train"], **extra}}}
        payload = canonical_json(changed)
        envelope = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=keys.signer)
        (root / "manifest.json").write_bytes(envelope)
        with pytest.raises((ManifestMismatchError, IntegrityError)):
            dataset(root, keys)
