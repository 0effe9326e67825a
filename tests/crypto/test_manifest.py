from __future__ import annotations

import copy
import hashlib
import json

import pytest

from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.crypto.entries import ShardEntry, SplitEntry
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.manifest import (
    MANIFEST_NAME,
    PAYLOAD_TYPE,
    Manifest,
    read_manifest,
    write_manifest,
)
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.crypto.signing import seal_envelope
from lightning_secure.errors import IntegrityError, ManifestMismatchError, WrongKeyError

DATASET = bytes(range(16))


def entry(number=0, **changes):
    fields = {
        "file": f"train/shard-{number:05d}-00000000.lsec",
        "uuid": bytes([number]) * 16,
        "number": number,
        "records": 10,
        "segments": 2,
        "size": 5000,
        "header_sha256": bytes(32),
        "merkle_root": bytes(32),
        "commitment": bytes(32),
        "wrapped_key": bytes(60),
    }
    return ShardEntry(**{**fields, **changes})


def manifest_of(keys, **changes):
    _, wrapped = PartitionKey.create(DATASET, "train", keys)
    split = SplitEntry(
        partition="train",
        schema=({"name": "x", "kind": "tensor", "dtype": "float32", "shape": [3]},),
        shards=(entry(0), entry(1)),
        attributes={"anonymize.name": "suppress"},
    )
    fields = {
        "dataset_id": DATASET,
        "generation": 2,
        "previous": "ab" * 32,
        "created": "2026-11-23T12:00:00+00:00",
        "splits": {"train": split},
        "partitions": {"train": wrapped},
    }
    return Manifest(**{**fields, **changes})


def test_a_manifest_comes_back(tmp_path, keys):
    manifest = manifest_of(keys)
    write_manifest(tmp_path, manifest, signer=keys.signer)
    again = read_manifest(tmp_path, trusted=keys.trusted_signers)
    assert again == manifest
    assert again.digest == hashlib.sha256(canonical_json(manifest.to_json())).hexdigest()
    assert again.splits["train"].records == 20
    assert [item.name for item in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_the_first_manifest_has_no_predecessor(tmp_path, keys):
    first = manifest_of(keys, generation=1, previous=None)
    write_manifest(tmp_path, first, signer=keys.signer)
    assert read_manifest(tmp_path, trusted=keys.trusted_signers).previous is None


def test_a_strangers_manifest_is_refused(tmp_path, keys, other_keys):
    write_manifest(tmp_path, manifest_of(keys), signer=other_keys.signer)
    with pytest.raises(ManifestMismatchError, match="no valid signature"):
        read_manifest(tmp_path, trusted=keys.trusted_signers)


def test_a_folder_without_a_manifest_is_refused(tmp_path, keys):
    with pytest.raises(ManifestMismatchError, match="not an encrypted dataset"):
        read_manifest(tmp_path, trusted=keys.trusted_signers)
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(ManifestMismatchError, match="cannot be read"):
        read_manifest(tmp_path, trusted=keys.trusted_signers)


def test_a_signed_payload_in_another_form_is_refused(tmp_path, keys):
    """Two forms of one manifest would have two digests, and a pin would mean less."""
    payload = json.dumps(manifest_of(keys).to_json(), indent=1).encode()
    envelope = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=keys.signer)
    (tmp_path / MANIFEST_NAME).write_bytes(envelope)
    with pytest.raises(ManifestMismatchError, match="canonical"):
        read_manifest(tmp_path, trusted=keys.trusted_signers)


def _set(path, value):
    def change(data):
        *parents, last = path
        for step in parents:
            data = data[step]
        data[last] = value

    return change


SHARD = ("splits", "train", "shards", 0)


@pytest.mark.parametrize(
    "change",
    [
        _set(("version",), 2),
        _set(("version",), "1"),
        _set(("more",), 1),
        _set(("dataset_id",), "00"),
        _set(("dataset_id",), 7),
        _set(("generation",), 0),
        _set(("generation",), 1),
        _set(("generation",), True),
        _set(("generation",), "2"),
        _set(("generation",), 2**63),
        _set(("previous",), None),
        _set(("previous",), "xy"),
        _set(("created",), 5),
        _set(("splits",), []),
        _set(("splits", "a/b"), {}),
        _set(("splits", "train"), None),
        _set(("splits", "train", "partition"), "other"),
        _set(("splits", "train", "partition"), "../x"),
        _set(("splits", "train", "partition"), 5),
        _set(("splits", "train", "schema"), {}),
        _set(("splits", "train", "schema"), [1]),
        _set(("splits", "train", "attributes"), []),
        _set(("splits", "train", "attributes"), {"a": 1}),
        _set(("splits", "train", "shards"), []),
        _set(("splits", "train", "shards"), None),
        _set((*SHARD, "number"), 1),
        _set((*SHARD, "file"), "../../etc/passwd"),
        _set((*SHARD, "file"), "/etc/passwd"),
        _set((*SHARD, "file"), "train/a..b"),
        _set((*SHARD, "file"), "train/.hidden"),
        _set((*SHARD, "file"), "a/b/c"),
        _set((*SHARD, "file"), 5),
        _set((*SHARD, "uuid"), "00"),
        _set((*SHARD, "records"), 0),
        _set((*SHARD, "records"), -1),
        _set((*SHARD, "segments"), 1.5),
        _set((*SHARD, "size"), None),
        _set((*SHARD, "header_sha256"), "AA=="),
        _set((*SHARD, "merkle_root"), "!"),
        _set((*SHARD, "commitment"), 1),
        _set((*SHARD, "wrapped_key"), "!"),
        _set((*SHARD, "extra"), 1),
        _set(("partitions",), []),
        _set(("partitions", "train"), {}),
        _set(("partitions", "train"), []),
        _set(("partitions", "train"), [1]),
        _set(("partitions", "a b"), []),
    ],
)
def test_a_malformed_manifest_is_refused(keys, change):
    data = copy.deepcopy(manifest_of(keys).to_json())
    Manifest.from_json(json.loads(json.dumps(data)))  # sound before
    change(data)
    with pytest.raises(IntegrityError):
        Manifest.from_json(json.loads(json.dumps(data)))


def test_keys_go_from_provider_to_partition_to_shard(keys):
    partition, wrapped = PartitionKey.create(DATASET, "train", keys)
    key = DataKey.generate()
    sealed = partition.seal(key, shard_uuid=entry().uuid)
    manifest = manifest_of(keys, partitions={"train": wrapped})
    opened = manifest.open_partition("train", keys)
    assert opened.open(entry(wrapped_key=sealed)) == key


def test_a_shards_key_belongs_to_its_shard_and_partition(keys):
    partition, _ = PartitionKey.create(DATASET, "train", keys)
    sealed = partition.seal(DataKey.generate(), shard_uuid=entry(0).uuid)
    with pytest.raises(IntegrityError):
        partition.open(entry(1, wrapped_key=sealed))


def test_a_partition_key_belongs_to_its_dataset_and_name(keys):
    _, wrapped = PartitionKey.create(DATASET, "train", keys)
    with pytest.raises(IntegrityError):
        manifest_of(keys, dataset_id=bytes(16), partitions={"train": wrapped}).open_partition(
            "train", keys
        )
    with pytest.raises(IntegrityError):
        manifest_of(keys, partitions={"val": wrapped}).open_partition("val", keys)


def test_a_stranger_is_told_whose_key_is_needed(keys, other_keys, heard):
    with pytest.raises(WrongKeyError, match=keys.key_id):
        manifest_of(keys).open_partition("train", other_keys)
    assert (heard[-1].action, heard[-1].outcome) == ("key.unwrap", "failure")


def test_the_right_recipient_is_found_among_several(keys, other_keys):
    _, mine = PartitionKey.create(DATASET, "train", keys)
    _, theirs = PartitionKey.create(DATASET, "train", other_keys)
    manifest = manifest_of(keys, partitions={"train": (*theirs, *mine)})
    assert isinstance(manifest.open_partition("train", keys), PartitionKey)


def test_the_content_digest_follows_rows_and_not_keys(keys):
    split = manifest_of(keys).splits["train"]
    rewrapped = SplitEntry(
        partition="train",
        schema=split.schema,
        shards=(entry(0, wrapped_key=bytes(59) + b"\1"), entry(1)),
    )
    assert rewrapped.content_digest == split.content_digest
    other = SplitEntry(
        partition="train", schema=split.schema, shards=(entry(0, merkle_root=b"\1" * 32), entry(1))
    )
    assert other.content_digest != split.content_digest


@pytest.mark.parametrize(
    "changes", [{"records": 5001}, {"records": 2**62, "size": 2**62}, {"size": 2**63 - 1}]
)
def test_more_rows_than_bytes_are_refused(keys, changes):
    """Nobody makes room for rows that no file can hold, nor adds them up past 64 bits."""
    value = manifest_of(keys).to_json()
    for shard in value["splits"]["train"]["shards"]:
        shard.update(changes)
    with pytest.raises(IntegrityError, match="more rows than bytes"):
        Manifest.from_json(value)
