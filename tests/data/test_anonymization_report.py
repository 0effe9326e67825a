"""The report of a sealing: in the signed manifest, of all rows, also after an interruption."""

from __future__ import annotations

import base64
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Pseudonymize,
    Redact,
    Suppress,
    Tokenize,
    Tokens,
)
from lightning_secure.crypto.manifest import read_manifest, write_manifest
from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.erasure.erase import erase_shard
from lightning_secure.data.key_rotation.rotate import rotate_data, rotate_partition
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.seal import seal
from lightning_secure.data.writing.split_rules import SplitByRatio
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, DataError, IntegrityError

ROWS = 600
SMALL = {"segment_bytes": 512, "shard_bytes": 4096}
PLAN = AnonymizationPlan(
    {
        "name": Suppress(),
        "record": Pseudonymize(domain="patient"),
        "account": Tokenize(domain="account"),
        "age": Generalize(bins=[18, 40, 65]),
        "zip": Generalize(prefix=1),
        "note": Redact(),
        "dx": Keep(),
    },
    quasi_identifiers=["age", "zip"],
    sensitive=["dx"],
)
DIGEST = "anonymization.report.sha256"


def rows(until=ROWS):
    for i in range(until):
        yield {
            "name": f"Ada {i}",
            "record": f"R{i}",
            "account": f"A{i % 7}",
            "age": i % 90,
            "zip": f"{i % 3}{i:04d}",
            "note": f"seen by jo{i}@clinic.example" if i % 10 == 0 else f"fine {i}",
            "dx": f"dx {i % 5}",
            "x": np.full(4, i, "float32"),
        }


class UnpluggedError(Exception):
    """Stands for whatever interrupts."""


def unplugged(until):
    yield from rows(until)
    raise UnpluggedError


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Else all rows would be one batch, and none would be cut where a sealing goes on."""
    monkeypatch.setattr("lightning_secure.data.sources.source._MOST_ROWS", 64)


def run(root, keys, source=None, **options):
    options = {"source_id": "v1", "anonymize": PLAN, "threads": 2, **SMALL, **options}
    return seal(rows() if source is None else source, root, keys=keys, **options)


def plain(report):
    return {**report.to_json(), "salt": ""}


def by_hand():
    """k and l, counted from the rows themselves."""
    classes: dict[tuple[int, str], set[str]] = {}
    sizes: dict[tuple[int, str], int] = {}
    for row in rows():
        place = (sum(edge <= row["age"] for edge in (18, 40, 65)), row["zip"][0])
        classes.setdefault(place, set()).add(row["dx"])
        sizes[place] = sizes.get(place, 0) + 1
    return min(sizes.values()), min(map(len, classes.values()))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, keys):
    root = tmp_path_factory.mktemp("sealed")
    return root, run(root, keys)


def test_the_signed_manifest_has_the_digest_and_readers_the_report(sealed, keys, other_keys):
    root, done = sealed
    report = done.reports["train"]
    k, diversity = by_hand()
    assert (report.rows, report.unseen, report.unknown) == (ROWS, 0, "")
    assert report.k_anonymity.before.least == 1
    assert (report.k_anonymity.after.least, report.k_anonymity.after.exact) == (k, True)
    assert report.l_diversity["dx"].after.least == diversity
    assert report.columns["note"].found == {"e-mail": 60}
    assert report.columns["x"].done == "nothing"
    data = EncryptedShardDataset(root, split="train", keys=keys, output="dict")
    assert data.anonymization_report == report
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    assert manifest.splits["train"].attributes[DIGEST] == report.digest
    assert data[1]["note"] == "fine 1"
    assert data[0]["note"] == "seen by REDACTED"
    assert Tokens(keys, domain="account").value(data[8]["account"]) == "A1"


def test_whoever_cannot_read_the_rows_reads_no_report(sealed):
    root, _ = sealed
    payload = json.loads((root / "manifest.json").read_bytes())["payload"]
    everything = base64.b64decode(payload) + b"".join(p.read_bytes() for p in root.rglob("*.*"))
    for word in (b"e-mail", b"inspected", b"k_anonymity", b"clinic", b"Ada 1"):
        assert word not in everything


def test_it_goes_with_the_split_through_rotation_and_erasure(tmp_path, keys):
    report = run(tmp_path, keys).reports["train"]
    rotate_partition(tmp_path, "train", keys=keys)
    rotate_data(tmp_path, "train", keys=keys)
    erase_shard(tmp_path, "train", 0, keys=keys)
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert len(data) < ROWS
    assert data.anonymization_report == report


def test_a_report_that_is_not_the_one_with_the_digest_is_refused(tmp_path, keys):
    """Where a writer that was changed signs the digest of another one, or of none."""
    other = run(tmp_path / "other", keys).reports["train"]
    run(tmp_path / "o", keys)
    manifest = read_manifest(tmp_path / "o", trusted=keys.trusted_signers)
    entry = manifest.splits["train"]
    for digest in (other.digest, "0" * 64):
        signed = dataclasses.replace(entry, attributes={**entry.attributes, DIGEST: digest})
        write_manifest(
            tmp_path / "o",
            dataclasses.replace(manifest, splits={"train": signed}),
            signer=keys.signer,
        )
        data = EncryptedShardDataset(tmp_path / "o", split="train", keys=keys)
        with pytest.raises(IntegrityError, match="not the one that the manifest names"):
            _ = data.anonymization_report


def test_without_a_plan_there_is_none(tmp_path, keys):
    done = run(tmp_path, keys, anonymize=None)
    assert done.reports == {}
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert data.anonymization_report is None
    assert DIGEST not in data.entry.attributes


@pytest.mark.parametrize("until", [70, 400, 599])
def test_resumed_it_is_the_report_of_all_rows(tmp_path, keys, sealed, until):
    with pytest.raises(UnpluggedError):
        run(tmp_path, keys, unplugged(until), threads=1)
    done = run(tmp_path, keys, resume=True)
    assert 0 < done.resumed["train"] < until
    assert plain(done.reports["train"]) == plain(sealed[1].reports["train"])
    again = run(tmp_path, keys, resume=True)
    assert (again.reports, again.resumed) == ({}, {"train": ROWS})
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert data.anonymization_report == done.reports["train"]


def test_resumed_the_reports_of_several_splits_are_of_all_their_rows(tmp_path, keys):
    rule = SplitByRatio(ratios={"train": 0.7, "val": 0.3}, seed=1)
    with pytest.raises(UnpluggedError):
        run(tmp_path / "a", keys, unplugged(500), split=rule, threads=1)
    resumed = run(tmp_path / "a", keys, split=rule, resume=True)
    assert min(resumed.resumed.values()) > 0
    whole = run(tmp_path / "b", keys, split=rule)
    for split in ("train", "val"):
        assert plain(resumed.reports[split]) == plain(whole.reports[split])
        assert resumed.reports[split].rows == resumed.rows[split]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import test_anonymization_report as t
from lightning_secure import LocalKeyProvider
from lightning_secure.data.sources import source
source._MOST_ROWS = 64
def killed():
    yield from t.rows(450)
    os.kill(os.getpid(), signal.SIGKILL)
t.run({root!r}, LocalKeyProvider({key!r}), killed(), threads=1)
"""


def test_killed_and_resumed_it_is_the_report_of_all_rows(tmp_path, sealed):
    own = LocalKeyProvider.generate(tmp_path / "k")
    here = [str(Path(__file__).parent), *sys.path]
    code = KILLED.format(path=here, root=str(tmp_path / "o"), key=str(tmp_path / "k"))
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    result = run(tmp_path / "o", own, resume=True)
    assert 0 < result.resumed["train"] < 450
    assert plain(result.reports["train"]) == plain(sealed[1].reports["train"])


def batches(start, stop, step=50):
    every = list(rows())
    for first in range(start, stop, step):
        part = every[first : min(stop, first + step)]
        yield {name: [row[name] for row in part] for name in part[0]}


def test_a_writer_that_is_given_the_rest_only_says_that_it_cannot_know(tmp_path, keys, sealed):
    options = {"split": "train", "keys": keys, "source_id": "v", "anonymize": PLAN, **SMALL}

    def begun(root):
        writer = EncryptedShardWriter(root, **options)
        for columns in batches(0, 400):
            writer.write_batch(columns)
        writer.suspend()
        return EncryptedShardWriter(root, resume=True, **options)

    with begun(tmp_path / "a") as writer:
        start = writer.records
        assert 0 < writer.unseen == start < 400
        for columns in batches(start, ROWS):
            writer.write_batch(columns)
    report = EncryptedShardDataset(tmp_path / "a", split="train", keys=keys).anonymization_report
    assert (report.rows, report.unseen) == (ROWS - start, start)
    assert report.k_anonymity is None
    assert "not looked at again" in report.unknown

    with begun(tmp_path / "b") as writer:
        for columns in batches(0, writer.unseen):
            writer.recount(columns)
        with pytest.raises(DataError, match="0 are left"):
            writer.recount(next(batches(0, 1)))
        for columns in batches(writer.records, ROWS):
            writer.write_batch(columns)
    data = EncryptedShardDataset(tmp_path / "b", split="train", keys=keys)
    assert plain(data.anonymization_report) == plain(sealed[1].reports["train"])


def test_rows_that_were_refused_do_not_count(tmp_path, keys):
    plan = AnonymizationPlan({"note": Redact()}, quasi_identifiers=["y"])
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, anonymize=plan) as writer:
        writer.write({"note": "jo@x.org", "y": 1.0})
        for wrong in ({"note": "jo@x.org", "y": float("nan")}, {"note": 7, "y": 1.0}):
            with pytest.raises(DataError):
                writer.write(wrong)
        writer.write({"note": "fine", "y": 1.0})
        report = writer.report
    assert (report.rows, report.columns["note"].found) == (2, {"e-mail": 1})
    assert (report.k_anonymity.after.least, report.columns["note"].inspected) == (2, 2)


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("given", "single"),
    [
        ([True, 1], False),
        ([1.0, 1], True),
        ([2.0**53, 2**53 + 1], True),
        (["a", Name("a")], False),
    ],
    ids=["bool and int", "float and int", "beyond float64", "kinds of text"],
)
def test_what_shards_hold_as_one_number_or_text_is_one_value(tmp_path, keys, given, single):
    """Else a class with one diagnosis would have two by the report."""
    plan = AnonymizationPlan({"dx": Keep()}, quasi_identifiers=["age"], sensitive=["dx"])
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, anonymize=plan) as writer:
        for value in given if single else ():
            writer.write({"age": 30, "dx": value})
        if not single:
            writer.write_batch({"age": [30, 30], "dx": given})
    dataset = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    (_, first), (_, second) = dataset[0], dataset[1]
    report = dataset.anonymization_report
    assert first == second
    assert report.k_anonymity.after.least == 2
    assert report.l_diversity["dx"].after.least == 1


def test_own_rules_that_changed_do_not_go_on(tmp_path, keys):
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nid = "ward"\nregex = "ward-[0-9]+"\n')
    options = {"keys": keys, "split": "train", "source_id": "v", "anonymize": None, **SMALL}

    def plan(pattern):
        return AnonymizationPlan(
            {"note": Redact(extra_patterns=(pattern,), extra_rules=str(rules))}
        )

    first = EncryptedShardWriter(tmp_path / "o", **{**options, "anonymize": plan("MRN")})
    for _ in range(4):
        first.write_batch({"note": ["MRN 7, ward-9"] * 500})
    first.suspend()
    with pytest.raises(ConfigError, match="another source"):
        EncryptedShardWriter(tmp_path / "o", resume=True, **{**options, "anonymize": plan("PID")})
    text = rules.read_text()
    rules.write_text(text.replace("ward", "room"))
    with pytest.raises(ConfigError, match="another source"):
        EncryptedShardWriter(tmp_path / "o", resume=True, **{**options, "anonymize": plan("MRN")})
    rules.write_text(text)
    again = EncryptedShardWriter(
        tmp_path / "o", resume=True, **{**options, "anonymize": plan("MRN")}
    )
    again.abort()


def test_a_rotation_of_the_pseudonyms_is_another_dataset_to_resume(tmp_path, keys):
    def plan(generation):
        return AnonymizationPlan({"id": Pseudonymize(domain="p", generation=generation)})

    options = {"keys": keys, "split": "train", "source_id": "v", **SMALL}
    first = EncryptedShardWriter(tmp_path, anonymize=plan(1), **options)
    for _ in range(4):
        first.write_batch({"id": [f"R{i}" for i in range(500)]})
    first.suspend()
    with pytest.raises(ConfigError, match="another anonymize"):
        EncryptedShardWriter(tmp_path, anonymize=plan(2), resume=True, **options)
    EncryptedShardWriter(tmp_path, anonymize=plan(1), resume=True, **options).abort()
