from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_secure.anonymize import AnonymizationPlan, Keep, Suppress
from lightning_secure.crypto.manifest import read_manifest
from lightning_secure.data.format.columns import Column, Schema
from lightning_secure.data.key_rotation.rotate import rotate_partition
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.sources.arrow import Fill
from lightning_secure.data.writing import ray_sink as ray_module
from lightning_secure.data.writing.ray_sink import EncryptedShardDatasink
from lightning_secure.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    LightningSecureError,
    ManifestMismatchError,
    MissingExtraError,
    ShardCorruptedError,
)

CLUSTER = Path(__file__).with_name("ray_cluster.py")
SMALL = {"segment_bytes": 256, "shard_bytes": 1024}

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
pytest.importorskip("ray", reason="ray is missing: pip install 'lightning-secure[ray]'")
pa = pytest.importorskip("pyarrow")


def sink(root, keys, **options):
    return EncryptedShardDatasink(root, split="train", keys=keys, **{**SMALL, **options})


def table(start, stop):
    return pa.table({"y": list(range(start, stop)), "s": [f"row {i}" for i in range(start, stop)]})


def write(one, parts, *, rows=None, start=True):
    """Do what Ray does, with tasks that are done in the order of ``parts``."""
    from ray.data.datasource.datasink import WriteResult

    if start:
        one.on_write_start()
    try:
        returns = [one.write(blocks, SimpleNamespace(task_idx=task)) for task, blocks in parts]
        count = sum(block.num_rows for _, blocks in parts for block in blocks)
        result = WriteResult(rows if rows is not None else count, 0, returns)
        one.on_write_complete(result)
    except Exception as error:
        one.on_write_failed(error)
        raise


PARTS = [(2, [table(200, 300)]), (0, [table(0, 50), table(50, 100)]), (1, [table(100, 200)])]


def labels(root, keys):
    data = EncryptedShardDataset(root, split="train", keys=keys)
    y, s = data.__getitems__(range(len(data))).batch()
    assert s == [f"row {i}" for i in y.tolist()]
    return y.tolist()


def unchanged(root, keys):
    """Nothing can be seen of it: neither a split nor a file."""
    there = {p.name for p in root.rglob("*") if p.is_file()}
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    return manifest.generation == 1 and there == {"manifest.json", ".lock"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, keys):
    """What a local Ray of two workers did, one scenario after the other; it starts once."""
    root = tmp_path_factory.mktemp("ray")
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "HOME": str(home),  # Ray leaves a token there
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: every port on loopback
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, CLUSTER, str(root), str(keys._path)],
        env=environment, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root, done.stdout


def only_named_files(root, keys):
    manifest = read_manifest(root, trusted=keys.trusted_signers)
    named = {entry.file for split in manifest.splits.values() for entry in split.shards}
    there = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    return there == named | {"manifest.json", ".lock"}


def test_two_workers_seal_one_split_in_order(cluster, keys):
    root, _ = cluster
    data = EncryptedShardDataset(root / "plain", split="train", keys=keys, output="dict")
    batch = data.__getitems__(range(len(data))).batch()
    assert batch["y"].tolist() == list(range(2000))
    assert batch["x"].shape == (2000, 2, 3)
    assert batch["x"][:, 0, 0].tolist() == list(range(2000))
    assert [len(row) for row in batch["r"]][:4] == [1, 2, 3, 1]
    assert batch["s"][1999] == "row 1999"
    assert only_named_files(root / "plain", keys)


def test_a_killed_worker_loses_and_doubles_nothing(cluster, keys):
    root, out = cluster
    assert int(out.split("killed: ")[1].split()[0]) == 2, "the workers died in the middle of a task"
    assert labels(root / "killed", keys) == list(range(2000))
    assert only_named_files(root / "killed", keys)


def test_a_failed_write_leaves_nothing(cluster, keys):
    root, out = cluster
    assert unchanged(root / "failed", keys)
    assert "failed: True" in out


def test_ray_listens_on_loopback_only_and_does_not_phone_home(cluster):
    _, out = cluster
    assert "listening: ['127.0.0.1']" in out
    assert "usage: False" in out


# ---------------------------------------------------------------- without a cluster


def test_tasks_are_put_in_order_whichever_is_done_first(tmp_path, keys):
    one = sink(tmp_path, keys)
    write(one, PARTS)
    assert labels(tmp_path, keys) == list(range(300))
    numbers = [
        e.number for e in EncryptedShardDataset(tmp_path, split="train", keys=keys).entry.shards
    ]
    assert numbers == sorted(numbers)
    assert {number // 4096 for number in numbers} == {0, 1, 2}


def test_what_a_dead_task_left_is_removed(tmp_path, keys):
    one = sink(tmp_path, keys)
    one.on_write_start()
    one.write([table(0, 70)], SimpleNamespace(task_idx=1))  # and nobody heard of it
    write(one, PARTS, start=False)
    assert labels(tmp_path, keys) == list(range(300))
    assert only_named_files(tmp_path, keys)


@pytest.mark.parametrize(
    ("parts", "rows", "error", "words"),
    [
        (PARTS[:2], 300, IntegrityError, "missing or doubled"),
        ([*PARTS, (3, [table(0, 50)])], 300, IntegrityError, "missing or doubled"),
        ([*PARTS, PARTS[0]], None, IntegrityError, "missing or doubled"),
        ([], None, DataError, "no rows"),
        ([(0, [table(0, 0)])], None, DataError, "no rows"),
        (
            [(0, [pa.table({"y": [1], "x": [1]})]), (1, [pa.table({"y": [1.5]})])],
            None,
            DataError,
            "column 'y' is int64 in some, float64 in some; column 'x' is int64 in some, missing",
        ),
        ([(0, [pa.table({"y": [1, None]})])], None, DataError, "null in row 1"),
        ([(2**20, [table(0, 1)])], None, DataError, "write tasks"),
    ],
)
def test_lost_doubled_or_unequal_parts_are_refused(tmp_path, keys, parts, rows, error, words):
    with pytest.raises(error, match=words):
        write(sink(tmp_path, keys), parts, rows=rows)
    assert unchanged(tmp_path, keys)


@pytest.mark.parametrize("harm", ["remove", "change"])
def test_the_driver_opens_every_shard_before_it_signs(tmp_path, keys, monkeypatch, harm):
    one = sink(tmp_path, keys)
    seal = one.write

    def tampered(blocks, ctx):
        result = seal(blocks, ctx)
        victim = next(one._folder.glob("*.lsec"))
        if harm == "remove":
            victim.unlink()
        else:
            data = victim.read_bytes()
            victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return result

    monkeypatch.setattr(one, "write", tampered)  # an administrator at work in between
    with pytest.raises(ShardCorruptedError):
        write(one, [(0, [table(0, 100)])])
    assert unchanged(tmp_path, keys)


def test_no_key_travels_to_the_workers(tmp_path, keys):
    from ray import cloudpickle

    one = sink(tmp_path, keys)
    frozen = cloudpickle.dumps(one)
    assert keys._kek._material not in frozen
    copy = cloudpickle.loads(frozen)
    one.on_write_start()
    part = cloudpickle.dumps(copy.write([table(0, 100)], SimpleNamespace(task_idx=0)))
    assert keys._kek._material not in part
    assert b"row 17" not in part


def test_rows_are_anonymised_on_the_workers(tmp_path, keys):
    plan = AnonymizationPlan({"s": Suppress(), "y": Keep()}, quasi_identifiers=["y"])
    write(sink(tmp_path, keys, anonymize=plan), PARTS)
    entry = EncryptedShardDataset(tmp_path, split="train", keys=keys).entry
    assert [column["name"] for column in entry.schema] == ["y"]
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    report = data.anonymization_report
    assert data.attributes.items() >= {"anonymize.s": "suppress", "anonymize.y": "keep"}.items()
    assert entry.attributes["anonymization.report.sha256"] == report.digest
    # Each worker sees its own rows only: what adds up is known, and k is not.
    assert (report.rows, report.unseen, report.k_anonymity) == (len(data), 0, None)
    assert report.columns["y"].inspected == len(data)
    assert "several workers" in report.unknown
    with pytest.raises(DataError, match="holds text"):
        write(sink(tmp_path / "2", keys, anonymize=AnonymizationPlan({})), PARTS)


def test_nulls_that_are_dropped_are_not_missing(tmp_path, keys):
    block = pa.table({"y": [1, None, 3]})
    write(sink(tmp_path, keys, nulls={"y": "drop"}), [(0, [block])])
    assert EncryptedShardDataset(tmp_path, split="train", keys=keys)[1][0].item() == 3


@pytest.mark.parametrize("nulls", [None, {"y": "drop"}])
def test_rows_that_are_lost_by_a_task_are_missed_whatever_is_dropped(tmp_path, keys, nulls):
    class Losing(EncryptedShardDatasink):
        def _columns(self, blocks, part):
            return super()._columns([block.slice(1) for block in blocks], part)

    y = [1, None, 3, 4] if nulls else [1, 2, 3, 4]
    one = Losing(tmp_path, split="train", keys=keys, nulls=nulls, **SMALL)
    with pytest.raises(IntegrityError, match="missing"):
        write(one, [(0, [pa.table({"y": y})]), (1, [pa.table({"y": [5]})])])
    assert unchanged(tmp_path, keys)


def test_a_task_of_which_nothing_is_left_counts(tmp_path, keys):
    nothing = pa.table({"y": pa.array([None, None], pa.int64())})
    parts = [(0, [nothing]), (1, [pa.table({"y": [5]})])]
    write(sink(tmp_path, keys, nulls={"y": "drop"}), parts)
    assert len(EncryptedShardDataset(tmp_path, split="train", keys=keys)) == 1


@pytest.mark.parametrize(
    ("rule", "rows"), [(Fill(0.0), [1.5, 0.0, 0.0]), ("drop", [1.5])], ids=["fill", "drop"]
)
@pytest.mark.parametrize("declared", [False, True])
def test_a_block_of_nulls_only_is_treated_by_the_rule(tmp_path, keys, rule, rows, declared):
    """Arrow knows no type for it, and another task's rows have one."""
    schema = Schema((Column("y", "tensor", "float64"),)) if declared else None
    parts = [(0, [pa.table({"y": [1.5]})]), (1, [pa.table({"y": pa.nulls(2)})])]
    write(sink(tmp_path, keys, nulls={"y": rule}, schema=schema), parts)
    data = EncryptedShardDataset(tmp_path, split="train", keys=keys)
    assert [data[row][0].item() for row in range(len(data))] == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"types": {"v": "double"}}, "column 'v' has no such type: column type 'double' is none"),
        ({"nulls": {"v": 0.0}}, "rule for column 'v' must be 'drop' or Fill.value., not a float"),
        ({"nulls": {"v": {"fill": 0.0}}}, "'drop' or Fill.value., not a dict"),
    ],
)
def test_rules_that_do_not_exist_are_refused_on_the_driver(tmp_path, keys, options, words):
    with pytest.raises(ConfigError, match=words):
        sink(tmp_path, keys, **options)


def test_the_split_may_be_taken_meanwhile_and_then_stands(tmp_path, keys):
    one, two = sink(tmp_path, keys), sink(tmp_path, keys)
    write(one, PARTS)
    with pytest.raises(ConfigError, match="exists"):
        write(two, PARTS)
    assert labels(tmp_path, keys) == list(range(300))
    assert only_named_files(tmp_path, keys)
    with pytest.raises(ConfigError, match="exists"):
        sink(tmp_path, keys)
    write(sink(tmp_path, keys, replace=True), PARTS[1:])
    assert labels(tmp_path, keys) == list(range(200))


def test_wrong_arguments_are_refused_on_the_driver(tmp_path, keys):
    for options in ({"segment_bytes": 0}, {"shard_bytes": 1}):
        with pytest.raises(ConfigError):
            sink(tmp_path, keys, **options)
    with pytest.raises(LightningSecureError):
        sink("/dev/null", keys)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # of its own options
def test_rays_own_tensors_become_arrows(tmp_path, keys):
    from ray.data.block import BlockAccessor

    block = BlockAccessor.batch_to_block({"x": np.arange(24.0).reshape(4, 2, 3), "y": np.arange(4)})
    write(sink(tmp_path, keys), [(0, [block])])
    (x, _) = EncryptedShardDataset(tmp_path, split="train", keys=keys)[1]
    assert x.tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    uneven = np.empty(2, dtype=object)
    uneven[:] = [np.zeros((2, 2)), np.zeros((3, 3))]
    block = BlockAccessor.batch_to_block({"x": uneven})
    with pytest.raises(DataError, match="different shapes"):
        write(sink(tmp_path / "2", keys), [(0, [block])])


def test_without_ray_the_extra_is_named(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(
        "lightning_secure.data.writing.ray_sink._Base", None
    )  # what a missing package leaves
    with pytest.raises(MissingExtraError, match=r"lightning-secure\[ray\]"):
        sink(tmp_path, keys)


def test_an_error_after_the_commit_does_not_take_the_rows_with_it(folder, keys, monkeypatch):
    """Ray tells a sink of any error of its own hook, also of one that came too late."""
    write(sink(folder, keys), PARTS)
    one = sink(folder, keys, replace=True)
    commit = ray_module.commit_split

    def late(*args, **options):
        commit(*args, **options)
        raise OSError("the folder could not be flushed")

    # No disk fails on demand between the commit and its return.
    monkeypatch.setattr(ray_module, "commit_split", late)
    with pytest.raises(OSError, match="flushed"):
        write(one, [(0, [table(0, 50)])])
    data = EncryptedShardDataset(folder, split="train", keys=keys)
    assert [int(y) for y, _ in data.__getitems__(range(len(data)))] == list(range(50))


@pytest.mark.parametrize("pinned", [True, False])
def test_nothing_is_signed_over_a_dataset_that_was_rolled_back(folder, keys, pinned):
    """Before the tasks begin, and while they run; that the driver sees without a pin too."""
    write(sink(folder, keys), PARTS)
    old = (folder / "manifest.json").read_bytes()
    rotate_partition(folder, "train", keys=keys)
    newest = read_manifest(folder, trusted=keys.trusted_signers)
    pin = {"min_generation": newest.generation} if pinned else {}
    one = sink(folder, keys, replace=True, **pin)
    one.on_write_start()
    (folder / "manifest.json").write_bytes(old)
    with pytest.raises(ManifestMismatchError, match="rolled back"):
        write(one, [(0, [table(0, 50)])], start=False)
    assert (folder / "manifest.json").read_bytes() == old
    assert len(EncryptedShardDataset(folder, split="train", keys=keys)) == 300
    if pinned:
        for pins in (pin, {"manifest_digest": newest.digest}):
            with pytest.raises(ManifestMismatchError, match="rolled back"):
                sink(folder, keys, replace=True, **pins)


def test_what_cannot_be_removed_does_not_undo_the_commit(folder, keys):
    one = sink(folder, keys)
    one.on_write_start()
    (one._folder / ".nfs0001").mkdir()
    write(one, PARTS, start=False)
    assert len(EncryptedShardDataset(folder, split="train", keys=keys)) == 300
