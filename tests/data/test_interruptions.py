"""Once a manifest is in place, nothing that it names is removed, whatever interrupts the writer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.manifests.garbage import collect_garbage
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import DataError, KeyUnavailableError

OLD = np.arange(40, dtype="int64")
NEW = OLD + 1000


def writer(root, keys, **options):
    return EncryptedShardWriter(
        root, split="train", keys=keys, segment_bytes=64, shard_bytes=64, **options
    )


def read(root, keys):
    data = EncryptedShardDataset(root, split="train", keys=keys)
    (x,) = data.__getitems__(range(len(data))).batch()
    return x.numpy()


def replace(root, keys):
    with writer(root, keys, replace=True) as again:
        again.write_batch({"x": NEW})


@pytest.fixture
def sealed(tmp_path, keys):
    with writer(tmp_path, keys) as first:
        first.write_batch({"x": OLD})
    return tmp_path


@pytest.mark.parametrize("after", [0, 2])
def test_an_interruption_while_old_shards_are_removed_leaves_the_new_ones(
    sealed, keys, monkeypatch, after
):
    unlink, removed = os.unlink, []

    def interrupted(path, **options):
        if len(removed) == after:
            monkeypatch.undo()
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    # The interruption has to fall between two system calls.
    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(sealed, keys)
    assert np.array_equal(read(sealed, keys), NEW)


def test_old_shards_that_cannot_be_removed_are_only_left_over(sealed, keys, monkeypatch):
    def refused(path, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", refused)  # root may remove everything
    replace(sealed, keys)
    monkeypatch.undo()
    assert np.array_equal(read(sealed, keys), NEW)
    assert len(list(sealed.rglob("*.lsec"))) == 10
    assert len(collect_garbage(sealed, keys=keys, min_age_s=0)) == 5
    assert np.array_equal(read(sealed, keys), NEW)


def test_an_interruption_right_after_the_manifest_is_in_place(sealed, keys, monkeypatch):
    real = os.replace

    def interrupted(source, target):
        real(source, target)
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(sealed, keys)
    monkeypatch.undo()
    assert np.array_equal(read(sealed, keys), NEW)


def test_an_interruption_right_before_the_manifest_leaves_the_old_rows(sealed, keys, monkeypatch):
    real = os.replace

    def interrupted(source, target):
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt
        real(source, target)

    before = sorted(sealed.rglob("*"))
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(sealed, keys)
    monkeypatch.undo()
    assert np.array_equal(read(sealed, keys), OLD)
    assert sorted(sealed.rglob("*")) == before


def test_giving_up_after_closing_gives_up_nothing(sealed, keys):
    again = writer(sealed, keys, replace=True)
    again.write_batch({"x": NEW})
    again.close()
    again.abort()
    assert np.array_equal(read(sealed, keys), NEW)


def test_a_manifest_that_cannot_be_read_keeps_every_shard(sealed, keys):
    again = writer(sealed, keys, replace=True)
    again.write_batch({"x": NEW})
    manifest = sealed / "manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    before = len(list(sealed.rglob("*.lsec")))
    again.abort()
    assert len(list(sealed.rglob("*.lsec"))) == before
    manifest.write_bytes(good)
    assert np.array_equal(read(sealed, keys), OLD)


def test_a_manifest_never_names_a_shard_that_is_gone(sealed, keys):
    old = set(sealed.rglob("*.lsec"))
    again = writer(sealed, keys, replace=True)
    again.write_batch({"x": NEW})
    min(set(sealed.rglob("*.lsec")) - old).unlink()
    with pytest.raises(DataError, match="is gone"):
        again.close()
    assert np.array_equal(read(sealed, keys), OLD)


def test_a_sealing_that_waits_to_be_resumed_is_no_garbage(sealed, keys):
    options = {"split": "val", "keys": keys, "source_id": "1", "segment_bytes": 64}
    one = EncryptedShardWriter(sealed, shard_bytes=64, **options)
    one.write_batch({"x": NEW})
    one.suspend()
    stray = sealed / "train" / "shard-00099-00000000.lsec"
    stray.write_bytes(b"x")
    assert collect_garbage(sealed, keys=keys, min_age_s=0) == [f"train/{stray.name}"]
    with EncryptedShardWriter(sealed, shard_bytes=64, resume=True, **options) as again:
        assert again.records > 0
        again.write_batch({"x": NEW[again.records :]})
    data = EncryptedShardDataset(sealed, split="val", keys=keys)
    assert data.__getitems__(range(len(data))).batch()[0].tolist() == NEW.tolist()


@pytest.fixture
def own(tmp_path):
    return LocalKeyProvider.generate(tmp_path / "keys" / "own.kek")


def test_a_split_whose_key_is_destroyed_while_it_is_sealed_does_not_appear(sealed, keys, own):
    other = LocalKeyProvider(own._path, trusted=[keys.signer.public_key])
    before = (sealed / "manifest.json").read_bytes()
    with pytest.raises(KeyUnavailableError, match="keep its source"):  # noqa: PT012, SIM117
        with EncryptedShardWriter(sealed, split="val", keys=other) as late:
            late.write_batch({"x": NEW})
            # What another process does, for example at the end of an erasure.
            assert own.retire()
    assert (sealed / "manifest.json").read_bytes() == before
    assert not list((sealed / "val").glob("*.lsec"))


def test_a_key_that_is_only_away_loses_no_work(tmp_path, own):
    options = {"split": "train", "keys": own, "source_id": "v1", "shard_bytes": 64}
    root, away = tmp_path / "d", tmp_path / "away.kek"
    late = EncryptedShardWriter(root, segment_bytes=64, **options)
    late.write_batch({"x": OLD})
    own._path.rename(away)
    with pytest.raises(KeyUnavailableError, match="resume=True"):
        late.close()
    away.rename(own._path)
    with EncryptedShardWriter(root, segment_bytes=64, resume=True, **options) as again:
        assert again.records == len(OLD)
    assert np.array_equal(read(root, own), OLD)
