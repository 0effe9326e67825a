"""Erased is erased only if an old copy of everything does not open any more: tried, and said."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest

from lightning_secure.anonymize import AnonymizationPlan, Suppress
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.manifest import read_manifest, write_manifest
from lightning_secure.crypto.providers import (
    HpkeKeyProvider,
    HpkePrivateKey,
    LocalKeyProvider,
    SigningKey,
)
from lightning_secure.data.erasure import erase as erasure
from lightning_secure.data.erasure import erasure_report as recovery
from lightning_secure.data.erasure.erase import erase_shard, erase_subject
from lightning_secure.data.erasure.finish import finish_erasure
from lightning_secure.data.key_rotation.rotate import add_recipient, rotate_data, rotate_partition
from lightning_secure.data.manifests.garbage import collect_garbage
from lightning_secure.data.manifests.pending_erasure import RECORD_NAME, UnfinishedErasure
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.subjects import SubjectPseudonyms
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import (
    AuditWriteError,
    ConfigError,
    DataError,
    IntegrityError,
    KeyUnavailableError,
    ManifestMismatchError,
    WrongKeyError,
)
from lightning_secure.util import events

X = np.arange(300, dtype="int64").reshape(100, 3)


@pytest.fixture
def old(tmp_path):
    return LocalKeyProvider.generate(tmp_path / "keys" / "old.kek")


@pytest.fixture
def new(tmp_path):
    return LocalKeyProvider.generate(tmp_path / "keys" / "new.kek")


@pytest.fixture
def sealed(tmp_path, old):
    root = tmp_path / "dataset"
    with EncryptedShardWriter(
        root, split="train", keys=old, segment_bytes=128, shard_bytes=480, column_keys={"y": "s"}
    ) as writer:
        writer.write_batch({"x": X, "y": X[:, 0]})
    with EncryptedShardWriter(root, split="val", keys=old) as writer:
        writer.write_batch({"x": X[:5]})
    assert len(manifest_of(root, old).splits["train"].shards) == 7
    return root


def manifest_of(root, keys):
    return read_manifest(root, trusted=keys.trusted_signers)


def read(root, keys, split="train", **options):
    data = EncryptedShardDataset(root, split=split, keys=keys, **options)
    batch = data.__getitems__(range(len(data))).batch()
    data.close()
    return batch[0].numpy()


def rows_of(entry, *, without):
    ends = np.cumsum([shard.records for shard in entry.shards])
    return np.concatenate(
        [
            X[end - shard.records : end]
            for shard, end in zip(entry.shards, ends, strict=True)
            if shard.number not in without
        ]
    )


# ---------------------------------------------------------------- shards


def test_the_rows_of_an_erased_shard_are_gone_and_others_stay(sealed, old):
    before = manifest_of(sealed, old)
    report = erase_shard(sealed, "train", [1, 4], keys=old)
    after = manifest_of(sealed, old)
    entry = before.splits["train"]
    assert np.array_equal(read(sealed, old), rows_of(entry, without={1, 4}))
    assert (report.shards, report.files_left) == ((1, 4), ())
    assert report.records == len(X) - len(read(sealed, old))
    assert report.generation == after.generation == before.generation + 1
    assert after.previous == before.digest
    assert [shard.number for shard in after.splits["train"].shards] == [0, 2, 3, 5, 6]
    assert after.splits["train"].content_digest != entry.content_digest
    assert {path.name for path in (sealed / "train").iterdir()} == {
        file.split("/")[1] for file in after.splits["train"].files
    }
    rotate_data(sealed, "train", keys=old)
    assert np.array_equal(read(sealed, old), rows_of(entry, without={1, 4}))
    assert np.array_equal(read(sealed, old, "val"), X[:5])


def test_the_new_partition_keys_do_not_open_the_erased_shard(sealed, old):
    before = manifest_of(sealed, old)
    stolen = before.open_partition("train", old)
    erase_shard(sealed, "train", 1, keys=old)
    after = manifest_of(sealed, old)
    gone = before.splits["train"].shards[1]
    for partition in ("train", "train.s"):
        with pytest.raises(Exception, match="rejected"):
            after.open_partition(partition, old).open(gone)
    with pytest.raises(Exception, match="rejected"):
        stolen.open(after.splits["train"].shards[1])


def restored(sealed, tmp_path, copy):
    """The storage administrator puts an old copy back."""
    shutil.rmtree(sealed)
    return shutil.copytree(copy, sealed)


def test_with_a_live_key_an_old_copy_still_opens_and_the_report_says_so(sealed, old, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "copy")
    report = erase_shard(sealed, "train", 1, keys=old)
    assert report.recoverable
    (attempt,) = report.attempts
    assert (attempt.key_id, attempt.outcome) == (old.key_id, "opened")
    assert f"key {old.key_id} (local): opened" in str(report)
    assert "can still read the rows" in str(report)
    assert np.array_equal(read(restored(sealed, tmp_path, copy), old), X)  # it does not exaggerate


def test_a_new_kek_alone_is_not_enough_while_the_old_key_lives(sealed, old, new, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "copy")
    report = erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=new)
    assert report.kek_retired is None
    assert report.recoverable
    outcomes = {attempt.key_id: attempt.outcome for attempt in report.attempts}
    assert outcomes == {old.key_id: "opened", new.key_id: "refused"}
    assert len(read(sealed, new)) < 100
    assert np.array_equal(read(restored(sealed, tmp_path, copy), old), X)


def test_with_the_old_key_destroyed_an_old_copy_does_not_open(sealed, old, new, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "copy")
    entry = manifest_of(sealed, old).splits["train"]
    signer = old.signer.public_key
    report = erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=new, retire_kek=True)
    assert report.kek_retired
    assert not report.recoverable
    assert {attempt.outcome for attempt in report.attempts} == {"refused"}
    assert "No key that was tried opens an old copy" in str(report)
    assert np.array_equal(read(sealed, new), rows_of(entry, without={1}))
    assert np.array_equal(read(sealed, new, "val"), X[:5])  # other splits moved to the new key
    # The attack: everything that was on the storage, and every key that is left.
    root = restored(sealed, tmp_path, copy)
    with pytest.raises(KeyUnavailableError, match="retired"):
        read(root, old)
    with pytest.raises(KeyUnavailableError, match="cannot be opened"):
        LocalKeyProvider(tmp_path / "keys" / "old.kek")
    thief = LocalKeyProvider(tmp_path / "keys" / "new.kek", trusted=[signer])
    with pytest.raises(WrongKeyError):
        read(root, thief)


def test_a_recipient_who_could_not_be_asked_is_named(sealed, old, new, other_keys, tmp_path):
    other = LocalKeyProvider(other_keys._path, trusted=[old.signer.public_key])
    add_recipient(sealed, "train.s", keys=old, recipient=other)
    with pytest.raises(ConfigError, match=other.key_id):
        erase_shard(sealed, "train", 1, keys=old)
    assert len(read(sealed, old)) == 100
    add_recipient(sealed, "train", keys=old, recipient=other)
    report = erase_shard(
        sealed, "train", 1, keys=old, recipients=[other], rotate_kek_to=new, retire_kek=True
    )
    outcomes = {attempt.key_id: attempt.outcome for attempt in report.attempts}
    assert outcomes == {old.key_id: "refused", new.key_id: "refused", other.key_id: "opened"}
    assert report.recoverable


def test_a_recipients_key_that_is_not_here_counts_as_open(sealed, old, new, other_keys):
    """Erasing one partition's shards says nothing of whoever was never given."""
    add_recipient(sealed, "train", keys=old, recipient=other_keys)
    record = UnfinishedErasure(
        split="train",
        numbers=frozenset({1}),
        before=manifest_of(sealed, old),
        key=("local", old.key_id),
        retire=False,
    )
    (absent, _) = sorted(
        recovery._attempts(record, {("local", old.key_id): old}),
        key=lambda attempt: attempt.key_id != other_keys.key_id,
    )
    assert absent.outcome == "unknown"
    assert "not given" in absent.reason


class Sealer(KeyProvider):
    """Can wrap, and cannot unwrap any more: as a public-key provider, or one that is cut off."""

    name = "local"

    def __init__(self, keys, *, works=True):
        self._keys, self.works = keys, works

    key_id = property(lambda self: self._keys.key_id)
    signer = property(lambda self: self._keys.signer)
    trusted_signers = property(lambda self: self._keys.trusted_signers)

    def _wrap(self, key, context):
        return self._keys._wrap(key, context)

    def _unwrap(self, blob, context):
        if not self.works:
            raise KeyUnavailableError("the token is not plugged in. Nothing was decrypted.")
        return self._keys._unwrap(blob, context)

    def _derive(self, purpose):
        return self._keys._derive(purpose)


def test_a_provider_that_cannot_destroy_its_key_says_so(sealed, old, new):
    report = erase_shard(sealed, "train", 1, keys=Sealer(old), rotate_kek_to=new, retire_kek=True)
    assert report.kek_retired is False
    assert report.recoverable


def test_the_old_key_is_not_destroyed_before_the_new_one_was_seen_to_open(
    sealed, old, new, monkeypatch
):
    report = erase_shard(
        sealed, "train", 1, keys=old, rotate_kek_to=Sealer(new, works=False), retire_kek=True
    )
    assert report.kek_retired is False
    assert LocalKeyProvider(old._path).key_id == old.key_id
    newest = LocalKeyProvider.generate(new._path.with_name("newest.kek"))
    # No sound signer writes such a manifest.
    monkeypatch.setattr(recovery, "_is_key", lambda *_: False)
    report = erase_shard(sealed, "train", 2, keys=new, rotate_kek_to=newest, retire_kek=True)
    assert report.kek_retired is False
    assert new._path.exists()


def test_a_key_that_cannot_be_used_now_is_not_taken_for_destroyed(sealed, old, new):
    add_recipient(sealed, "train", keys=old, recipient=new)
    add_recipient(sealed, "train.s", keys=old, recipient=new)
    report = erase_shard(sealed, "train", 1, keys=old, recipients=[Sealer(new, works=False)])
    (away,) = [attempt for attempt in report.attempts if attempt.key_id == new.key_id]
    assert away.outcome == "unknown"
    assert "its holder may open the copy" in away.reason


def test_a_key_file_that_resists_is_reported(sealed, old, new, monkeypatch):
    def refused(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.unlink", refused)  # root may remove everything
    report = erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=new, retire_kek=True)
    monkeypatch.undo()
    assert report.kek_retired is False
    assert report.recoverable


def test_files_that_resist_are_named(sealed, old, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    files = [group.shards[2].file for group in manifest_of(sealed, old).splits["train"].all_groups]
    monkeypatch.setattr("os.unlink", refused)
    report = erase_shard(sealed, "train", 2, keys=old)
    monkeypatch.undo()
    assert report.files_left == tuple(files)
    assert f"{files[0]} could not be removed" in str(report)
    rotate_partition(sealed, "val", keys=old)  # the next rotation finds them
    assert not any((sealed / file).exists() for file in files)


def test_erasing_every_shard_removes_the_split(sealed, old):
    report = erase_shard(sealed, "train", range(7), keys=old)
    assert report.records == 100
    manifest = manifest_of(sealed, old)
    assert (list(manifest.splits), list(manifest.partitions)) == (["val"], ["val"])
    assert not list((sealed / "train").iterdir())


@pytest.mark.parametrize("numbers", [7, -1, [], [0, 9], True, [1.0], 1.0, "1", [None, 1], b"\1\2"])
def test_a_shard_that_does_not_exist_erases_nothing(sealed, old, numbers):
    with pytest.raises(ConfigError, match="nothing was erased"):
        erase_shard(sealed, "train", numbers, keys=old)
    assert len(read(sealed, old)) == 100


def test_what_cannot_be_done_is_refused_before_anything_is(sealed, old, new):
    with pytest.raises(ConfigError, match="rotate_kek_to"):
        erase_shard(sealed, "train", 1, keys=old, retire_kek=True)
    with pytest.raises(ConfigError, match="no split 'test'"):
        erase_shard(sealed, "test", 1, keys=old)
    with pytest.raises(ManifestMismatchError):
        erase_shard(sealed, "train", 1, keys=new)
    stranger = LocalKeyProvider(new._path, trusted=[old.signer.public_key])
    with pytest.raises(WrongKeyError):
        erase_shard(sealed, "train", 1, keys=stranger)

    def refuse(event):
        if event.action == "data.erase":
            raise AuditWriteError("full")

    events.subscribe("refuse", refuse)
    with pytest.raises(AuditWriteError):
        erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=new, retire_kek=True)
    assert len(read(sealed, old)) == 100


def test_a_split_that_is_sealed_anew_meanwhile_stands(sealed, old, monkeypatch):
    real = erasure.commit

    def meanwhile(*args, **options):
        with EncryptedShardWriter(sealed, split="train", keys=old, replace=True) as writer:
            writer.write_batch({"x": X[:3]})
        return real(*args, **options)

    monkeypatch.setattr(erasure, "commit", meanwhile)
    with pytest.raises(ConfigError, match="sealed anew"):
        erase_shard(sealed, "train", 0, keys=old)
    assert np.array_equal(read(sealed, old), X[:3])


# ---------------------------------------------------------------- subjects


PATIENTS = [f"patient {row % 9}" for row in range(100)]


def seal_subjects(root, keys, patients=PATIENTS, **options):
    options = {"segment_bytes": 128, "shard_bytes": 2000, **options}
    with EncryptedShardWriter(
        root, split="train", keys=keys, subject_column="patient", **options
    ) as writer:
        for part in (slice(0, 40), slice(40, 100)):
            writer.write_batch({"x": X[part], "patient": patients[part]})
    return root


def by_patient(root, keys):
    data = EncryptedShardDataset(root, split="train", keys=keys, output="dict")
    rows = {}
    for row in data:
        rows.setdefault(row["patient"], []).append(row["x"].tolist())
    return rows


def test_rows_sealed_by_subject_all_come_back(tmp_path, old):
    root = seal_subjects(tmp_path / "d", old)
    rows = by_patient(root, old)
    assert rows == {
        name: [X[i].tolist() for i in range(100) if PATIENTS[i] == name] for name in set(PATIENTS)
    }
    shards = manifest_of(root, old).splits["train"].shards
    data = EncryptedShardDataset(root, split="train", keys=old)
    start = 0
    for shard in shards:  # no shard holds two subjects
        patients = {data[row][1] for row in range(start, start + shard.records)}
        assert len(patients) == 1
        start += shard.records
    assert start == 100


def test_an_erased_subject_is_gone_and_others_stay(tmp_path, old):
    root = seal_subjects(tmp_path / "d", old)
    before, rows = manifest_of(root, old), by_patient(root, old)
    report = erase_subject(root, "train", "patient 4", keys=old)
    gone = rows.pop("patient 4")
    assert by_patient(root, old) == rows
    assert report.records == len(gone)
    after = manifest_of(root, old)
    left = {shard.uuid for shard in after.splits["train"].shards}
    old_partition = before.open_partition("train", old)
    destroyed = [s for s in before.splits["train"].shards if s.uuid not in left]
    assert sum(shard.records for shard in destroyed) == len(gone)
    kept = {old_partition.open(shard).key_id for shard in before.splits["train"].shards} - {
        old_partition.open(shard).key_id for shard in destroyed
    }
    new_partition = after.open_partition("train", old)
    assert {new_partition.open(shard).key_id for shard in after.splits["train"].shards} == kept
    assert after.splits["train"].content_digest != before.splits["train"].content_digest
    with pytest.raises(DataError, match="no rows of this subject"):
        erase_subject(root, "train", "patient 4", keys=old)
    erase_subject(root, "train", "patient 5", keys=old)  # the pseudonyms outlived the rotation
    assert "patient 5" not in by_patient(root, old)


def test_a_subject_is_found_after_every_other_rotation(tmp_path, old):
    root = seal_subjects(tmp_path / "d", old)
    rotate_partition(root, "train", keys=old)
    rotate_data(root, "train", keys=old)
    assert erase_subject(root, "train", "patient 0", keys=old).records == 12


def test_with_the_key_destroyed_no_copy_of_a_subject_opens(tmp_path, old, new):
    root = seal_subjects(tmp_path / "d", old)
    copy = shutil.copytree(root, tmp_path / "copy")
    report = erase_subject(root, "train", "patient 4", keys=old, rotate_kek_to=new, retire_kek=True)
    assert not report.recoverable
    assert "patient 4" not in by_patient(root, new)
    with pytest.raises(KeyUnavailableError):
        by_patient(copy, old)


def test_nothing_on_the_disk_says_who_the_subjects_are(tmp_path, old):
    root = seal_subjects(tmp_path / "d", old)
    written = b"".join(p.read_bytes() for p in root.rglob("*") if p.is_file())
    assert b"patient 4" not in written
    other = seal_subjects(tmp_path / "other", old)
    one, two = (
        {shard.subject for shard in manifest_of(r, old).splits["train"].shards}
        for r in (root, other)
    )
    assert len(one) == len(two) == 9
    assert not one & two  # and datasets cannot be joined by them
    assert not {shard.subject for shard in manifest_of(root, old).splits["train"].shards} & {
        SubjectPseudonyms(old.derive("subjects"))(name) for name in PATIENTS
    }


def test_the_subject_column_itself_need_not_be_sealed(tmp_path, old):
    plan = AnonymizationPlan({"patient": Suppress()})
    root = seal_subjects(tmp_path / "d", old, anonymize=plan)
    assert manifest_of(root, old).splits["train"].records == 100
    assert erase_subject(root, "train", "patient 4", keys=old).records == 11
    assert len(read(root, old)) == 89


def test_numbers_and_text_are_different_subjects(tmp_path, old):
    with EncryptedShardWriter(
        tmp_path / "d", split="train", keys=old, subject_column="who", column_keys={"x": "s"}
    ) as writer:
        writer.write_batch({"who": np.array([7, 7, 8]), "x": X[:3]})
        writer.write({"who": np.int64(9), "x": X[3]})
    with pytest.raises(DataError, match="no rows"):
        erase_subject(tmp_path / "d", "train", "7", keys=old)
    assert erase_subject(tmp_path / "d", "train", 7, keys=old).records == 2
    assert read(tmp_path / "d", old).tolist() == [8, 9]


@pytest.mark.parametrize("value", [1.5, None, True, b"x"])
def test_what_does_not_name_a_subject_is_refused(tmp_path, old, value):
    writer = EncryptedShardWriter(tmp_path / "d", split="train", keys=old, subject_column="who")
    with pytest.raises(DataError, match="does not name a subject"):
        writer.write_batch({"who": [value], "x": X[:1]})
    with pytest.raises(DataError, match="lone surrogate"):
        writer.write_batch({"who": ["Jo\ud800"], "x": X[:1]})
    with pytest.raises(DataError, match="no column 'who'"):
        writer.write_batch({"x": X[:1]})
    assert writer.records == 0
    writer.abort()


def test_a_split_without_subjects_says_so(sealed, old):
    with pytest.raises(ConfigError, match="subject_column"):
        erase_subject(sealed, "train", "patient 4", keys=old)
    assert len(read(sealed, old)) == 100


def test_a_key_is_kept_where_the_new_one_is_no_recipient(tmp_path):
    """A provider can wrap for others and hold a private key that opens none of it."""
    old = LocalKeyProvider.generate(tmp_path / "keys" / "old.kek")
    root = tmp_path / "dataset"
    with EncryptedShardWriter(root, split="train", keys=old, shard_bytes=64, segment_bytes=64) as w:
        w.write_batch({"x": np.arange(40)})
    other = HpkePrivateKey.generate(tmp_path / "keys" / "other")
    HpkePrivateKey.generate(tmp_path / "keys" / "own")
    SigningKey.generate(tmp_path / "keys" / "signing")
    new = HpkeKeyProvider(
        recipients=[other.public.text],
        private_key=tmp_path / "keys" / "own",
        signing_key=tmp_path / "keys" / "signing",
    )
    report = erase_shard(root, "train", 1, keys=old, rotate_kek_to=new, retire_kek=True)
    assert report.kek_retired is False
    assert (tmp_path / "keys" / "old.kek").exists()
    assert report.recoverable


# ---------------------------------------------------------------- broken off


def refusing(action):
    def listener(event):
        if event.action == action:
            raise AuditWriteError("the log is full")

    return listener


def broken_off(root, action, **options):
    events.subscribe("refuse", refusing(action))
    with pytest.raises(AuditWriteError):
        erase_shard(root, "train", 1, **options)
    events.unsubscribe("refuse")


@pytest.fixture
def heir(new, old):
    return LocalKeyProvider(new._path, trusted=[old.signer.public_key])


def test_an_erasure_that_broke_off_before_the_old_key_went_is_finished(sealed, old, new, tmp_path):
    copy = shutil.copytree(sealed, tmp_path / "copy")
    broken_off(sealed, "key.retire", keys=old, rotate_kek_to=new, retire_kek=True)
    assert len(read(sealed, new)) < 100
    with pytest.raises(ConfigError, match="finish_erasure"):  # nothing is lost sight of
        erase_shard(sealed, "train", 2, keys=new)
    rotate_partition(sealed, "train", keys=new)
    rotate_data(sealed, "train", keys=new)
    assert np.array_equal(read(copy, old), X), "the attack that is to end"
    report = finish_erasure(sealed, keys=new, old=LocalKeyProvider(old._path))
    assert (report.shards, report.kek_retired, report.recoverable) == ((1,), True, False)
    assert not old._path.exists()
    assert {path.name for path in sealed.iterdir() if path.is_file()} == {
        "manifest.json", ".lock", ".rotate.lock"
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no unfinished erasure"):
        finish_erasure(sealed, keys=new)


def test_an_erasure_that_broke_off_behind_the_old_key_is_finished_without_it(sealed, old, heir):
    def late(event):  # when the key is gone and the proof begins
        if event.action == "key.unwrap" and not old._path.exists():
            raise AuditWriteError("the log is full")

    events.subscribe("refuse", late)
    with pytest.raises(AuditWriteError):
        erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=heir, retire_kek=True)
    events.unsubscribe("refuse")
    assert not old._path.exists()
    report = finish_erasure(sealed, keys=heir)
    assert (report.kek_retired, report.recoverable) == (True, False)


@pytest.mark.parametrize("then", [None, rotate_data])
def test_an_erasure_that_broke_off_before_its_manifest_erased_nothing(sealed, old, then):
    with pytest.MonkeyPatch.context() as patch:
        # As a kill would: nothing is tidied up on the way out.
        patch.setattr(UnfinishedErasure, "settle", lambda *_: None)
        broken_off(sealed, "data.erase", keys=old)
    assert (sealed / RECORD_NAME).exists()
    if then is not None:  # whose shards have other names than those of the record
        then(sealed, "train", keys=old)
    with pytest.raises(ConfigError, match="no unfinished erasure"):
        finish_erasure(sealed, keys=old)
    assert len(read(sealed, old)) == 100
    assert erase_shard(sealed, "train", 1, keys=old).records == 15


def test_a_report_that_got_lost_can_be_had_again(sealed, old):
    broken_off(sealed, "key.unwrap", keys=Sealer(old))  # before anything
    assert len(read(sealed, old)) == 100

    def late(event):
        if (
            event.action == "key.unwrap"
            and len(manifest_of(sealed, old).splits["train"].shards) < 7
        ):
            raise AuditWriteError("the log is full")

    events.subscribe("refuse", late)
    with pytest.raises(AuditWriteError):
        erase_shard(sealed, "train", 1, keys=old)
    events.unsubscribe("refuse")
    report = finish_erasure(sealed, keys=old)
    assert (report.kek_retired, report.recoverable) == (None, True)


def test_what_is_wrong_about_a_record_is_refused(sealed, old, new, other_keys):
    broken_off(sealed, "key.retire", keys=old, rotate_kek_to=new, retire_kek=True)
    other = LocalKeyProvider(other_keys._path, trusted=[old.signer.public_key])
    with pytest.raises(ConfigError, match="was given as the old one"):
        finish_erasure(sealed, keys=new, old=other)
    with pytest.raises(IntegrityError, match="no valid signature"):  # begun under another signer
        finish_erasure(sealed, keys=new)
    record = sealed / RECORD_NAME
    good = record.read_bytes()
    for bad in (b"", b"{}", good.replace(b"erasure.v1", b"erasure.v2"), good[:-9]):
        record.write_bytes(bad)
        with pytest.raises(IntegrityError):
            finish_erasure(sealed, keys=new, old=old)
    record.unlink()
    record.mkdir()
    with pytest.raises(IntegrityError, match="cannot be read"):
        finish_erasure(sealed, keys=new, old=old)
    assert old._path.exists()


def test_a_record_of_another_dataset_destroys_no_key(sealed, old, heir, tmp_path):
    """Not even one whose erasure did not happen yet: its dataset has the old key only."""
    with pytest.MonkeyPatch.context() as patch:
        # As a kill would: nothing is tidied up on the way out.
        patch.setattr(UnfinishedErasure, "settle", lambda *_: None)
        broken_off(sealed, "data.erase", keys=old, rotate_kek_to=heir, retire_kek=True)
    other = tmp_path / "other"
    with EncryptedShardWriter(other, split="train", keys=heir) as writer:
        writer.write_batch({"x": X[:5]})
    shutil.copy(sealed / RECORD_NAME, other / RECORD_NAME)
    with pytest.raises(ConfigError, match="no unfinished erasure"):
        finish_erasure(other, keys=heir, old=old)
    assert old._path.exists()
    assert len(read(sealed, old)) == 100


def test_half_a_record_is_a_copy_of_the_manifest_and_does_not_stay(sealed, old):
    half = sealed / f".{RECORD_NAME}.{'0' * 16}.tmp"  # as a kill leaves it
    shutil.copy(sealed / "manifest.json", half)
    assert collect_garbage(sealed, keys=old, min_age_s=0) == [half.name]
    shutil.copy(sealed / "manifest.json", half)
    erase_shard(sealed, "train", np.int64(1), keys=old)
    assert not half.exists()


def test_an_old_key_that_is_not_there_to_be_tried_counts_as_alive(sealed, old, heir):
    broken_off(sealed, "key.retire", keys=old, rotate_kek_to=heir, retire_kek=True)
    with pytest.raises(ConfigError, match="was to destroy key"):
        finish_erasure(sealed, keys=heir)
    assert (sealed / RECORD_NAME).exists()  # or the order to destroy it would be lost
    report = finish_erasure(sealed, keys=heir, old_is_gone=True)
    assert (report.kek_retired, report.recoverable) == (False, True)
    assert old._path.exists()


def test_a_key_is_not_destroyed_that_a_split_was_sealed_under_meanwhile(
    sealed, old, heir, monkeypatch
):
    real = recovery.read_manifest

    def meanwhile(root, **options):  # another process, in the moment before the look
        monkeypatch.setattr(recovery, "read_manifest", real)
        current = manifest_of(sealed, heir)
        late = dataclasses.replace(
            current,
            generation=current.generation + 1,
            previous=current.digest,
            partitions={**current.partitions, "late": manifest_of(copy, old).partitions["val"]},
        )
        write_manifest(sealed, late, signer=heir.signer)
        return real(root, **options)

    copy = shutil.copytree(sealed, sealed.with_name("copy"))
    # Another writer comes just when all is read; two processes would seldom meet so.
    monkeypatch.setattr(recovery, "read_manifest", meanwhile)
    report = erase_shard(sealed, "train", 1, keys=old, rotate_kek_to=heir, retire_kek=True)
    assert (report.kek_retired, report.recoverable) == (False, True)
    assert old._path.exists()
