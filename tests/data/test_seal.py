from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lightning_secure.crypto.manifest import MANIFEST_NAME
from lightning_secure.data.format.columns import Column, Schema
from lightning_secure.data.manifests.rollback_pins import ManifestPin
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.shards import shard
from lightning_secure.data.sources import Source, open_source
from lightning_secure.data.writing import split_layout, writer
from lightning_secure.data.writing.seal import seal
from lightning_secure.data.writing.seal_options import SealOptions
from lightning_secure.data.writing.shard_queue import ShardPool, ShardQueue
from lightning_secure.data.writing.split_rules import SplitByColumn, SplitByRatio
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import AuditWriteError, ConfigError, DataError
from lightning_secure.util import events

ROWS = 3000
X = np.random.default_rng(3).normal(size=(ROWS, 4)).astype("float32")
Y = np.arange(ROWS)
SMALL = {"segment_bytes": 512, "shard_bytes": 4096}


def read(root, keys, split="train"):
    return EncryptedShardDataset(root, split=split, keys=keys)


def rows(root, keys, split="train"):
    data = read(root, keys, split)
    return data.__getitems__(range(len(data))).batch()


def files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


class Squares(IterableDataset):
    def __iter__(self):
        return ((torch.tensor([float(i)]), i * i) for i in range(50))


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (lambda: {"x": X, "y": Y}, {}),
        (lambda: {"x": torch.from_numpy(X), "y": Y.tolist()}, {}),
        (lambda: [{"x": X[i], "y": i} for i in range(ROWS)], {}),
        (lambda: ({"x": X[i], "y": i} for i in range(ROWS)), {}),
        (lambda: TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), {}),
        (lambda: TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), {"names": ("x", "y")}),
    ],
    ids=["arrays", "tensors", "dicts", "iterator", "dataset", "names"],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_of_every_kind_come_back_in_order(tmp_path, keys, source, options, threads):
    done = seal(source(), tmp_path, keys=keys, threads=threads, **SMALL, **options)
    assert done.rows == {"train": ROWS}
    x, y = rows(tmp_path, keys)
    assert np.array_equal(x.numpy(), X)
    assert np.array_equal(y.numpy(), Y)
    assert len(read(tmp_path, keys).entry.shards) > 10


def test_an_iterable_dataset_a_single_tensor_and_one_array(tmp_path, keys):
    seal(Squares(), tmp_path, keys=keys, split="squares")
    assert rows(tmp_path, keys, "squares")[1].tolist() == [i * i for i in range(50)]
    seal(X, tmp_path, keys=keys, split="array")
    assert np.array_equal(rows(tmp_path, keys, "array")[0].numpy(), X)
    seal(TensorDataset(torch.from_numpy(X)), tmp_path, keys=keys, split="one")
    assert np.array_equal(rows(tmp_path, keys, "one")[0].numpy(), X)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (7, "cannot be sealed"),
        ("nothing.csv", "no .csv or .parquet file"),
        ("a\0b", "NUL"),
        ([3], "row 0 is a int"),
        ([{"x": 1.0}, {"y": 1.0}], "row 1 has other columns"),
        (TensorDataset(torch.ones(2), torch.ones(2), torch.ones(2)), "3 parts and there are 2"),
        ({}, "at least one column"),
        ({"x": 3}, "one int"),
        ({"x": "abc"}, "one str"),
        ([], "no rows"),
        ({"x": []}, "no rows"),
    ],
)
def test_what_cannot_be_sealed_is_refused_and_leaves_nothing(tmp_path, keys, source, words):
    with pytest.raises((ConfigError, DataError), match=words):
        seal(source, tmp_path / "d", keys=keys)
    assert not [name for name in files(tmp_path) if name.endswith((".lsec", ".sealing", ".tmp"))]


def test_a_source_of_ones_own(tmp_path, keys):
    class Two(Source):
        def batches(self, start=0):
            yield {"x": [1, 2][start:]}

        def identity(self):
            return "two"

    told = []
    seal(Two(), tmp_path, keys=keys, progress=lambda done, total: told.append((done, total)))
    assert rows(tmp_path, keys)[0].tolist() == [1, 2]
    assert told == [(2, None)]


def test_samples_that_are_mappings_name_their_columns(tmp_path, keys):
    class Named(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"label": index}

    seal(Named(), tmp_path, keys=keys)
    assert rows(tmp_path, keys)[0].tolist() == list(range(5))


def test_an_option_of_another_kind_of_source_is_named(tmp_path, keys):
    with pytest.raises(ConfigError, match=r"no option 'nulls'; it has none"):
        seal({"x": X}, tmp_path, keys=keys, nulls={})


# ---------------------------------------------------------------- threads


def test_shards_are_written_side_by_side_and_stay_in_order(tmp_path, keys, monkeypatch):
    active, most = 0, 0
    lock = threading.Lock()

    def slow(*args, **options):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        time.sleep(0.02 if options["number"] % 2 else 0.001)  # the second is done before the first
        entry = shard.seal_shard(*args, **options)
        with lock:
            active -= 1
        return entry

    monkeypatch.setattr(split_layout, "seal_shard", slow)  # the disk is too fast to see it
    seal({"x": X, "y": Y}, tmp_path, keys=keys, threads=3, **SMALL)
    assert most == 3
    assert np.array_equal(rows(tmp_path, keys)[1].numpy(), Y)


def test_an_error_in_a_thread_ends_the_sealing_and_leaves_nothing(tmp_path, keys, monkeypatch):
    seal({"x": X}, tmp_path, keys=keys, split="val")
    before = files(tmp_path)
    begun = []

    def fails(*args, **options):
        begun.append(options["number"])
        if options["number"] == 3:
            raise DataError("the disk says no")
        return shard.seal_shard(*args, **options)

    monkeypatch.setattr(split_layout, "seal_shard", fails)  # a full disk cannot be had
    with pytest.raises(DataError, match="the disk says no"):
        seal({"x": X, "y": Y}, tmp_path, keys=keys, threads=2, **SMALL)
    assert files(tmp_path) == before
    assert max(begun) < 8, "it went on sealing long after the failure"


def test_a_failed_shard_is_seen_though_one_before_it_still_runs():
    release = threading.Event()

    def fails():
        raise DataError("second")

    def handed_in(queue, task):
        queue.add(task)
        queue.finish()

    with ShardPool(3) as pool:
        queue = ShardQueue(pool)
        queue.add(lambda: release.wait(5))
        try:
            with pytest.raises(DataError, match="second"):
                handed_in(queue, fails)
        finally:
            release.set()
        assert queue.stop() == []
        assert queue.entries == [True]


def test_what_is_done_out_of_order_is_handed_back():
    def fails():
        raise DataError("first")

    go = threading.Event()
    told = []
    with ShardPool(3) as pool:
        queue = ShardQueue(pool, on_done=told.append)
        queue.add(lambda: go.wait(5) and fails())
        queue.add(lambda: go.wait(5) and "second")
        go.set()
        assert queue.stop() == ["second"]
    assert told == queue.entries == []

    def full(entry):
        raise OSError("no space left for the journal")

    with ShardPool(2) as pool:
        queue = ShardQueue(pool, on_done=full)
        queue._running.append(pool.submit(lambda: "first"))
        assert queue.stop() == ["first"]


def test_the_number_of_threads_must_be_one():
    for threads in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="threads"):
            ShardPool(threads)


def test_memory_stays_bounded_however_large_the_source_is(tmp_path, keys):
    code = (
        "import sys, resource, itertools, numpy as np, torch\n"
        "from lightning_secure import LocalKeyProvider, EncryptedShardWriter\n"
        "from lightning_secure.data.writing.seal import seal\n"
        "keys = LocalKeyProvider(sys.argv[2])\n"
        "def rows(n):\n"
        "    for i in range(n):\n"
        "        yield {'x': np.full(65536, i % 251, 'uint8')}\n"
        "def run(split, n):\n"
        "    seal(rows(n), sys.argv[1], keys=keys, split=split, threads=2, shard_bytes=2**21)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "small = run('small', 128)\n"  # 8 MiB: every buffer has been in use
        "print(run('large', 4000) - small)\n"  # 250 MiB
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(keys._path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(read(tmp_path, keys, "large")) == 4000
    assert int(done.stdout) < 24 * 2**20, "250 MiB through shards of 2 MiB"


# ---------------------------------------------------------------- splits


def test_rows_are_split_at_random_by_a_seed(tmp_path, keys):
    rule = SplitByRatio(ratios={"train": 0.8, "val": 0.2}, seed=5)
    done = seal({"x": X, "y": Y}, tmp_path, keys=keys, split=rule, threads=2, **SMALL)
    train, val = rows(tmp_path, keys)[1].tolist(), rows(tmp_path, keys, "val")[1].tolist()
    assert sorted(train + val) == Y.tolist()
    assert train == sorted(train)
    assert done.rows == {"train": len(train), "val": len(val)}
    assert 0.17 < len(val) / ROWS < 0.23
    # How rows come in batches makes no difference; the seed does.
    one_by_one = ({"x": X[i], "y": int(Y[i])} for i in range(ROWS))
    seal(one_by_one, tmp_path / "2", keys=keys, split=rule)
    assert rows(tmp_path / "2", keys)[1].tolist() == train
    other = SplitByRatio(ratios={"train": 0.8, "val": 0.2}, seed=6)
    seal({"x": X, "y": Y}, tmp_path / "3", keys=keys, split=other)
    assert rows(tmp_path / "3", keys)[1].tolist() != train


def test_rows_of_one_group_stay_together(tmp_path, keys):
    who = [f"patient {i % 70}" for i in range(ROWS)]
    rule = SplitByRatio(ratios={"train": 0.5, "val": 0.5}, seed=5, group="who")
    seal({"who": who, "y": Y}, tmp_path, keys=keys, split=rule)
    train, val = (set(rows(tmp_path, keys, name)[0]) for name in ("train", "val"))
    assert train | val == set(who)
    assert not train & val
    assert 15 < len(train) < 55


def test_a_column_says_the_split_and_is_not_sealed(tmp_path, keys):
    cohort = ["train" if i % 3 else "test" for i in range(ROWS)]
    seal({"y": Y, "cohort": cohort}, tmp_path, keys=keys, split=SplitByColumn(column="cohort"))
    assert rows(tmp_path, keys, "test")[0].tolist() == Y[::3].tolist()
    assert read(tmp_path, keys).schema == Schema((Column("y", "tensor", "int64"),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SplitByRatio(ratios={"a": 0.5, "b": 0.6}, seed=1),
        lambda: SplitByRatio(ratios={"a": 1.5, "b": -0.5}, seed=1),
        lambda: SplitByRatio(ratios={}, seed=1),
        lambda: SplitByRatio(ratios={"../a": 1.0}, seed=1),
        lambda: SplitByRatio(ratios={"a": 1.0}, seed=-1),
        lambda: SplitByRatio(ratios={1: 1.0}, seed=1),
    ],
)
def test_rules_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        (SplitByColumn(column="z"), {"y": [1]}),
        (SplitByColumn(column="y"), {"y": ["../up"]}),
        (SplitByColumn(column="y"), {"y": [f"s{i}" for i in range(65)]}),
        (SplitByRatio(ratios={"a": 1.0}, seed=1, group="y"), {"y": [1.5]}),
    ],
)
def test_values_that_name_no_split_are_refused(tmp_path, keys, rule, columns):
    with pytest.raises(DataError):
        seal(columns, tmp_path, keys=keys, split=rule)
    assert not list(tmp_path.rglob("*.lsec"))


def test_if_one_split_is_empty_none_is_sealed(tmp_path, keys):
    rule = SplitByRatio(ratios={"train": 0.999999, "val": 0.000001}, seed=1)
    with pytest.raises(DataError, match="no rows for split 'val'"):
        seal({"y": Y[:10]}, tmp_path, keys=keys, split=rule)
    with pytest.raises(ConfigError, match="no split 'train'"):
        read(tmp_path, keys)


def test_if_one_split_cannot_be_recorded_none_is_sealed(tmp_path, keys):
    def refuse(event):
        if event.action == "data.seal" and event.details["split"] == "val":
            raise AuditWriteError("full")

    events.subscribe("refuse", refuse)
    rule = SplitByRatio(ratios={"train": 0.5, "val": 0.5}, seed=1)
    with pytest.raises(AuditWriteError):
        seal({"y": Y}, tmp_path, keys=keys, split=rule)
    with pytest.raises(ConfigError, match="none yet"):
        read(tmp_path, keys)
    assert not list(tmp_path.rglob("*.lsec"))
    events.unsubscribe("refuse")


def test_a_closed_writer_takes_nothing_back(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="one", keys=keys) as one:
        one.write({"y": 1})
        one.close()
        one.abort()
        one.suspend()
    assert rows(tmp_path, keys, "one")[0].tolist() == [1]


# ---------------------------------------------------------------- bad paths and values


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/x", "/proc/nothing", "a\0b", "", 7])
def test_bad_folders_are_errors_of_our_own(keys, root):
    for open_it in (
        lambda: EncryptedShardWriter(root, split="train", keys=keys),
        lambda: EncryptedShardDataset(root, split="train", keys=keys),
    ):
        with pytest.raises((ConfigError, writer.LightningSecureError)) as caught:
            open_it()
        assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_scalar_that_is_an_array_stays_a_scalar(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as one:
        one.write({"a": np.array(3), "t": torch.tensor(2.5), "f": np.float32(1)})
        one.write({"a": np.array(4), "t": torch.tensor(3.5), "f": np.float32(2)})
    data = read(tmp_path, keys)
    assert [column.shape for column in data.schema.columns] == [(), (), ()]
    a, t, f = data[1]
    assert (a.shape, a.item(), t.item(), f.item()) == ((), 4, 3.5, 2.0)


def test_a_row_that_is_no_mapping_is_refused(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as one:
        for row in ([1, 2], {3: 4}, None):
            with pytest.raises(DataError):
                one.write(row)
        one.write({"x": 1})


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ({"s": ["a", "bc"]}, {"s": ["a", "bc"]}, True),
        ({"s": ["a", "bc"]}, {"s": ["ab", "c"]}, False),
        ({"s": np.array(["a", "b"])}, {"s": np.array(["a", "b"], dtype=object)}, True),
        ({"s": [1, 2]}, {"s": [1, 2.0]}, False),
        ({"s": [b"a"]}, {"s": [b"b"]}, False),
        ({"s": [[1, 2], [3]]}, {"s": [[1], [2, 3]]}, False),
        ({"s": [X[0], X[1]]}, {"s": [X[0], X[1]]}, True),
        (TensorDataset(torch.ones(3)), TensorDataset(torch.ones(3)), True),
        (TensorDataset(torch.ones(3)), TensorDataset(torch.zeros(3)), False),
        ({"s": ["\ud800"]}, {"s": ["\ud801"]}, False),
    ],
)
def test_sources_are_told_apart_by_their_values(first, second, same):
    assert (open_source(first).identity() == open_source(second).identity()) is same


@pytest.mark.parametrize(
    "given", [{"s": [object()]}, {"s": {1, 2}}, [{"x": 1}], Squares(), iter([])]
)
def test_what_cannot_tell_what_it_is_says_so(given):
    assert open_source(given).identity() is None


def test_progress_is_told(tmp_path, keys):
    told = []
    seal({"y": Y}, tmp_path, keys=keys, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (ROWS, ROWS)
    assert (tmp_path / MANIFEST_NAME).exists()


def test_the_password_of_a_storage_is_in_no_text(tmp_path, keys):
    given = {"anonymize": None, "allow_nonfinite": False, "replace": False, "pin": ManifestPin()}
    given |= {"segment_bytes": 64, "shard_bytes": 64, "schema": None}
    options = SealOptions(**given, storage_options={"password": "left ear"})
    assert "left ear" not in f"{options!r} {options}"
