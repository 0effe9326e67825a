from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_secure.anonymize import AnonymizationPlan, Generalize, Suppress
from lightning_secure.crypto.manifest import MANIFEST_NAME, read_manifest
from lightning_secure.crypto.partitions import PartitionKey
from lightning_secure.data.format.columns import Column, Schema
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.reading.samples import Samples, collate
from lightning_secure.data.shards.shard import seal_shard
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, DataError, ManifestMismatchError, WrongKeyError

ROWS = 500
RNG = np.random.default_rng(7)
X = RNG.normal(size=(ROWS, 6)).astype("float32")
Y = RNG.integers(0, 3, ROWS)
NAMES = [f"person {i} " + "é" * (i % 5) for i in range(ROWS)]


def seal(root, keys, *, split="train", rows=ROWS, **options):
    options = {"segment_bytes": 512, "shard_bytes": 4096, **options}
    with EncryptedShardWriter(root, split=split, keys=keys, **options) as writer:
        writer.write_batch({"x": X[:rows], "y": Y[:rows], "name": NAMES[:rows]})
    return root


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("sealed"), keys)


def dataset(root, keys, **options):
    return EncryptedShardDataset(root, **{"split": "train", "keys": keys, **options})


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


# ---------------------------------------------------------------- what goes in comes out


def test_rows_come_back_in_any_order(sealed, keys):
    data = dataset(sealed, keys)
    assert len(data) == ROWS
    assert len(data.entry.shards) > 3
    assert data.entry.shards[0].segments > 3
    order = [*RNG.permutation(ROWS).tolist(), 0, 0, ROWS - 1, -1]
    x, y, names = data.__getitems__(order).batch()
    assert np.array_equal(x.numpy(), X[order])
    assert np.array_equal(y.numpy(), Y[order])
    assert names == [NAMES[i] for i in order]


def test_one_row_is_a_tuple_or_a_dict(sealed, keys):
    x, y, name = dataset(sealed, keys)[3]
    assert np.array_equal(x.numpy(), X[3])
    assert (int(y), name) == (Y[3], NAMES[3])
    row = dataset(sealed, keys, output="dict", columns=("name", "y"))[-1]
    assert row == {"name": NAMES[-1], "y": torch.tensor(Y[-1])}


def test_the_schema_is_that_of_the_rows(sealed, keys):
    assert dataset(sealed, keys).schema == Schema(
        (
            Column("x", "tensor", "float32", (6,)),
            Column("y", "tensor", "int64"),
            Column("name", "string"),
        )
    )


def test_samples_of_other_datasets_are_collated_as_usual():
    assert collate([(torch.ones(2), 1), (torch.zeros(2), 2)])[1].tolist() == [1, 2]


def test_no_row_is_no_row(sealed, keys):
    data = dataset(sealed, keys)
    x, y, names = data.__getitems__([]).batch()
    assert (len(x), len(y), names) == (0, 0, [])
    for index in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match="rows 0 to 499"):
            data[index]


def test_it_works_with_a_plain_dataloader_and_its_default_collate(sealed, keys):
    data = dataset(sealed, keys)
    seen = torch.cat([y for _, y, _ in DataLoader(data, batch_size=64)])
    assert np.array_equal(seen.numpy(), Y)
    part = Subset(data, [5, 3])
    x, _, names = next(iter(DataLoader(part, batch_size=2)))
    assert np.array_equal(x.numpy(), X[[5, 3]])
    assert list(names) == [NAMES[5], NAMES[3]]


def test_workers_unwrap_for_themselves(sealed, keys):
    loader = DataLoader(
        dataset(sealed, keys), batch_size=100, num_workers=1, multiprocessing_context="spawn",
        collate_fn=collate,
    )  # fmt: skip
    assert np.array_equal(torch.cat([y for _, y, _ in loader]).numpy(), Y)


def test_a_pickled_dataset_has_no_key_and_reads_the_same_bytes(tmp_path, keys):
    data = dataset(seal(tmp_path, keys), keys)
    copy = pickle.loads(pickle.dumps(data))
    assert copy[7][2] == NAMES[7]
    frozen = pickle.dumps(data)
    seal(tmp_path, keys, split="more")
    with pytest.raises(ManifestMismatchError, match="pinned"):
        pickle.loads(frozen)


def test_rows_one_by_one_are_rows_in_a_batch(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, shard_bytes=65536) as writer:
        for i in range(40):
            writer.write({"x": X[i], "y": int(Y[i]), "name": NAMES[i]})
        assert writer.records == 40
    x, y, names = dataset(tmp_path, keys).__getitems__(range(40)).batch()
    assert np.array_equal(x.numpy(), X[:40])
    assert (y.tolist(), names) == (Y[:40].tolist(), NAMES[:40])


def test_every_kind_of_column(tmp_path, keys):
    schema = Schema(
        (
            Column("r", "ragged", "int32", (2,)),
            Column("b", "bytes"),
            Column("h", "tensor", "bfloat16", (2,)),
        )
    )
    ragged = [torch.arange(2 * n, dtype=torch.int32).view(n, 2) for n in (0, 3, 1)]
    half = torch.randn(3, 2).bfloat16()
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, schema=schema) as writer:
        writer.write_batch({"h": half[:2], "b": [b"", b"\0\1"], "r": ragged[:2]})
        writer.write({"r": ragged[2], "b": b"z" * 5000, "h": half[2]})
    r, b, h = dataset(tmp_path, keys).__getitems__([2, 0, 1]).batch()
    assert [item.tolist() for item in r] == [ragged[i].tolist() for i in (2, 0, 1)]
    assert b == [b"z" * 5000, b"", b"\0\1"]
    assert torch.equal(h, half[[2, 0, 1]])
    samples = dataset(tmp_path, keys).__getitems__([0, 1])
    assert [len(sample[0]) for sample in samples] == [0, 3]
    assert isinstance(samples[:1], Samples)


def test_a_row_longer_than_a_segment_gets_a_longer_segment(tmp_path, keys):
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, segment_bytes=16, shard_bytes=64
    ) as writer:
        writer.write_batch({"x": X[:5]})
    data = dataset(tmp_path, keys)
    assert np.array_equal(torch.stack([x for (x,) in data]).numpy(), X[:5])
    assert [shard.segments for shard in data.entry.shards] == [2, 2, 1]


def test_a_row_that_no_segment_can_hold_is_refused(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write({"x": b"small"})
        with pytest.raises(DataError, match="Split the row"):
            writer.write_batch({"x": [b"", bytes(2**26), b""]})
        writer.write_batch({"x": [bytes(2**25), bytes(2**25)]})  # not too long one by one
    data = dataset(tmp_path, keys)
    assert [len(x) for (x,) in data] == [5, 2**25, 2**25]


def test_rows_too_many_for_a_shard_go_to_several(tmp_path, keys, monkeypatch):
    monkeypatch.setattr(
        "lightning_secure.data.writing.row_buffer.MAX_SEGMENTS", 7
    )  # 2**20 takes too long
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, segment_bytes=1) as writer:
        writer.write_batch({"x": np.arange(20, dtype="uint8")})
    data = dataset(tmp_path, keys)
    assert [shard.segments for shard in data.entry.shards] == [7, 7, 6]


def test_the_shard_itself_refuses_what_cannot_be_read(tmp_path, keys, monkeypatch):
    monkeypatch.setattr("lightning_secure.data.format.segment_plan.MAX_SEGMENTS", 7)
    partition, _ = PartitionKey.create(bytes(16), "train", keys)
    with pytest.raises(DataError, match="Choose larger"):
        seal_shard(
            tmp_path,
            {"x": torch.zeros(20, dtype=torch.uint8)},
            records=20,
            schema=Schema((Column("x", "tensor", "uint8"),)),
            dataset_id=bytes(16),
            number=0,
            segment_bytes=1,
            partition=partition,
        )
    assert not list(tmp_path.iterdir())


def test_the_overhead_is_small(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write_batch({"x": np.zeros((4096, 4096), "uint8")})
    size = sum(p.stat().st_size for p in (tmp_path / "train").iterdir())
    assert size / 4096**2 - 1 < 0.001


def test_many_open_shards_are_no_problem(tmp_path, keys):
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, segment_bytes=24, shard_bytes=24
    ) as writer:
        writer.write_batch({"x": X[:150]})
    data = dataset(tmp_path, keys)
    assert len(data.entry.shards) == 150
    (x,) = data.__getitems__(RNG.permutation(150).tolist()).batch()
    assert len(x) == 150
    assert len(data.shards._readers) == 64
    data.close()
    assert np.array_equal(data[149][0].numpy(), X[149])


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "columns",
    [
        {"x": X[:2], "y": Y[:2]},
        {"x": X[:2], "y": Y[:2], "name": NAMES[:2], "extra": [1, 2]},
        {"x": X[:2], "y": Y[:2], "label": NAMES[:2]},
        {"x": X[:2], "y": Y[:2], "name": NAMES[:3]},
        {"x": X[:2].astype("float64"), "y": Y[:2], "name": NAMES[:2]},
        {"x": np.full((2, 6), np.nan, "float32"), "y": Y[:2], "name": NAMES[:2]},
    ],
)
def test_a_call_that_does_not_fit_changes_nothing(tmp_path, keys, columns):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write_batch({"x": X[:5], "y": Y[:5], "name": NAMES[:5]})
        with pytest.raises(DataError, match="Nothing of this call was sealed"):
            writer.write_batch(columns)
    assert len(dataset(tmp_path, keys)) == 5


def test_unknown_and_missing_columns_are_named(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write({"x": 1.0, "y": 2})
        with pytest.raises(DataError, match=r"unknown columns 'z'.* lack 'y'"):
            writer.write({"x": 1.0, "z": 2})


def test_an_empty_split_is_refused(tmp_path, keys):
    writer = EncryptedShardWriter(tmp_path, split="train", keys=keys)
    writer.write_batch({"x": X[:0]})
    with pytest.raises(DataError, match="no rows"):
        writer.close()
    with pytest.raises(ConfigError, match="no split 'train'"):
        dataset(tmp_path, keys)


def test_a_split_is_not_overwritten_unless_asked(tmp_path, keys):
    seal(tmp_path, keys, rows=100)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="100 rows"):
        EncryptedShardWriter(tmp_path, split="train", keys=keys)
    assert files(tmp_path) == before
    seal(tmp_path, keys, rows=50, replace=True)
    assert len(dataset(tmp_path, keys)) == 50
    assert not set(files(tmp_path)) & set(before) - {MANIFEST_NAME, ".lock"}


def test_two_writers_of_one_split_cannot_both_win(tmp_path, keys):
    first = EncryptedShardWriter(tmp_path, split="train", keys=keys)
    second = EncryptedShardWriter(tmp_path, split="train", keys=keys)
    first.write({"x": 1.0})
    second.write({"x": 2.0})
    first.close()
    with pytest.raises(ConfigError, match="exists"):
        second.close()
    assert dataset(tmp_path, keys)[0][0].item() == 1.0
    assert len(list((tmp_path / "train").iterdir())) == 1


def test_two_splits_can_be_written_side_by_side(tmp_path, keys):
    with (
        EncryptedShardWriter(tmp_path, split="train", keys=keys) as train,
        EncryptedShardWriter(tmp_path, split="val", keys=keys) as val,
    ):
        for i in range(10):
            (val if i % 5 == 0 else train).write({"x": float(i)})
    assert len(dataset(tmp_path, keys)) == 8
    assert [x.item() for (x,) in dataset(tmp_path, keys, split="val")] == [0.0, 5.0]
    manifest = read_manifest(tmp_path, trusted=keys.trusted_signers)
    assert manifest.generation == 3
    assert manifest.previous is not None


def test_a_closed_writer_takes_nothing(tmp_path, keys):
    writer = EncryptedShardWriter(tmp_path, split="train", keys=keys)
    writer.write({"x": 1.0})
    writer.close()
    writer.close()
    with pytest.raises(ConfigError, match="closed"):
        writer.write({"x": 1.0})


@pytest.mark.parametrize(
    "options",
    [
        {"split": "../x"},
        {"split": ""},
        {"split": "a/b"},
        {"segment_bytes": 0},
        {"segment_bytes": 100, "shard_bytes": 99},
    ],
)
def test_wrong_arguments_are_refused(tmp_path, keys, options):
    with pytest.raises(ConfigError):
        EncryptedShardWriter(tmp_path, **{"split": "train", "keys": keys, **options})


def test_a_split_or_column_that_does_not_exist_is_named(sealed, keys):
    with pytest.raises(ConfigError, match="'train'"):
        dataset(sealed, keys, split="test")
    with pytest.raises(ConfigError, match="'z'"):
        dataset(sealed, keys, columns=("x", "z"))
    with pytest.raises(ConfigError, match="neither"):
        dataset(sealed, keys, output="list")


def test_the_wrong_key_is_refused(sealed, other_keys, keys):
    with pytest.raises(ManifestMismatchError, match="no valid signature"):
        dataset(sealed, other_keys)

    class Reader(type(other_keys)):  # trusts the sealer, and has another key
        trusted_signers = keys.trusted_signers

    reader = object.__new__(Reader)
    reader.__dict__.update(other_keys.__dict__)
    with pytest.raises(WrongKeyError, match=keys.key_id):
        dataset(sealed, reader)


def test_a_plaintext_folder_is_refused(tmp_path, keys):
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ManifestMismatchError, match="not an encrypted dataset"):
        dataset(tmp_path, keys)
    with pytest.raises(ManifestMismatchError, match="not an encrypted dataset"):
        dataset(tmp_path / "nothing", keys)


# ---------------------------------------------------------------- interruption


def test_an_error_while_sealing_leaves_nothing(tmp_path, keys):
    seal(tmp_path, keys, split="val", rows=20)
    before = files(tmp_path)

    def fail():
        with EncryptedShardWriter(
            tmp_path, split="train", keys=keys, shard_bytes=1000, segment_bytes=500
        ) as writer:
            writer.write_batch({"x": X})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files(tmp_path) == before
    with pytest.raises(ConfigError, match="no split 'train'"):
        dataset(tmp_path, keys)
    assert len(dataset(tmp_path, keys, split="val")) == 20


def test_a_killed_sealing_is_never_read_as_whole(tmp_path, keys):
    code = (
        "import sys, os, signal, numpy as np\n"
        "from lightning_secure import EncryptedShardWriter, LocalKeyProvider\n"
        "keys = LocalKeyProvider(sys.argv[2])\n"
        "writer = EncryptedShardWriter(sys.argv[1], split='train', keys=keys, shard_bytes=4096,\n"
        "                              segment_bytes=512)\n"
        "writer.write_batch({'x': np.zeros((5000, 8), 'float32')})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(keys._path)], check=False
    )
    assert process.returncode == -9
    assert len(list((tmp_path / "train").glob("*.lsec"))) > 10
    with pytest.raises(ConfigError, match="sealing ends without an error"):
        dataset(tmp_path, keys)
    seal(tmp_path, keys)
    assert len(dataset(tmp_path, keys)) == ROWS


def test_a_failed_commit_leaves_the_dataset_as_it_was(tmp_path, keys, heard):
    from lightning_secure.errors import AuditWriteError
    from lightning_secure.util import events

    seal(tmp_path, keys, split="val", rows=20)
    before = files(tmp_path)

    def refuse(event):
        if event.action == "data.seal":
            raise AuditWriteError("full")

    events.subscribe("refuse", refuse)
    with pytest.raises(AuditWriteError):
        seal(tmp_path, keys)
    assert files(tmp_path) == before


# ---------------------------------------------------------------- what is recorded


def test_sealing_and_opening_are_announced(tmp_path, keys, heard):
    seal(tmp_path, keys, rows=30)
    dataset(tmp_path, keys)
    # Whoever seals makes sure at the end, with one call, that the key is still there.
    sealing, opening = ["key.wrap", "key.unwrap", "data.seal"], ["key.unwrap", "data.open"]
    assert [event.action for event in heard] == sealing + opening
    assert heard[2].details["records"] == heard[4].details["records"] == 30
    assert heard[2].details["manifest"] == heard[4].details["manifest"]


def test_one_call_to_the_provider_a_split(sealed, keys, heard):
    data = dataset(sealed, keys)
    data.__getitems__(range(ROWS))
    assert [event.action for event in heard].count("key.unwrap") == 1


def test_identities_are_changed_before_they_are_sealed(tmp_path, keys):
    plan = AnonymizationPlan({"name": Suppress(), "year": Generalize(width=10)})
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, anonymize=plan) as writer:
        writer.write({"name": "Ada", "year": 1987, "x": X[0]})
        writer.write_batch({"name": ["Bob"], "year": np.array([1991]), "x": X[1:2]})
    data = dataset(tmp_path, keys, output="dict")
    assert [int(row["year"]) for row in data] == [1980, 1990]
    assert "name" not in data[0]
    remarks = {"anonymize.name": "suppress", "anonymize.year": "generalize(width=10)"}
    assert data.entry.attributes.items() >= remarks.items()


def test_nothing_in_the_clear_reaches_the_disk(tmp_path, keys):
    seal(tmp_path, keys)
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for row in range(0, ROWS, 7):
        assert X[row].tobytes()[:8] not in written
        assert NAMES[row].encode() not in written
    assert json.loads((tmp_path / MANIFEST_NAME).read_text())["signatures"]


def test_half_a_character_leaves_the_rows_before_it(tmp_path, keys):
    """It comes from broken JSON; the error of encoding it would carry the text along."""
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write({"note": "fine"})
        with pytest.raises(DataError, match="lone surrogate") as caught:
            writer.write({"note": "Mary \ud800 Quant"})
        assert "Mary" not in str(caught.value)
        assert caught.value.__context__ is None
    assert dataset(tmp_path, keys).__getitems__([0]).batch() == (["fine"],)


@pytest.mark.parametrize("index", [1.9, True, [True, False], [0, 1.0], torch.tensor([True, False])])
def test_rows_are_chosen_by_whole_numbers(folder, keys, index):
    with EncryptedShardWriter(folder, split="train", keys=keys) as writer:
        writer.write_batch({"x": np.arange(4)})
    data = EncryptedShardDataset(folder, split="train", keys=keys)
    with pytest.raises(ConfigError, match="whole numbers"):
        data[index] if isinstance(index, float | bool) else data.__getitems__(index)
    for far in (2**63, 2**64 - 1, 2**64, -(2**64), -5):
        with pytest.raises(IndexError):
            data[far]
    assert int(data[torch.tensor(2)][0]) == 2
    assert len(data.__getitems__([])) == 0


@pytest.mark.parametrize("columns", [(), ("x", "x"), "xy"])
def test_columns_are_different_names(folder, keys, columns):
    with EncryptedShardWriter(folder, split="train", keys=keys) as writer:
        writer.write_batch({"x": np.arange(4), "y": np.arange(4)})
    with pytest.raises(ConfigError, match="different names"):
        EncryptedShardDataset(folder, split="train", keys=keys, columns=columns)


# ---------------------------------------------------------------- forks


def _read_in_child(data, results):
    results.put(data[0][0].tolist())


def test_a_fork_while_a_shard_is_looked_up_leaves_the_child_no_closed_lock(tmp_path, keys):
    seal(tmp_path, keys, rows=30)
    data = dataset(tmp_path, keys)
    expected = data[0][0].tolist()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_read_in_child, args=(data, results))
    with data._shards._lock:
        child.start()
    child.join(10)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert results.get(timeout=10) == expected


#: How a forked process leaves the block of its parent's writer, and by which error.
_LEAVING = {
    "exit": "SystemExit",
    "error": "ValueError",
    "close": "ConfigError",
    "write": "ConfigError",
    "through": "ConfigError",
    "abort": None,
}
_forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def _leave(how, writer):
    if how == "exit":
        sys.exit(0)
    elif how == "error":
        raise ValueError
    elif how == "close":
        writer.close()
    elif how == "write":
        writer.write({"x": np.zeros(8, "float32"), "y": 1})
    elif how == "abort":
        writer.abort()
        writer.suspend()


@_forks
@pytest.mark.parametrize(("threads", "source_id"), [(1, None), (2, "v1")])
@pytest.mark.parametrize("how", _LEAVING)
def test_a_forked_process_leaves_its_parents_shards(tmp_path, keys, how, threads, source_id):
    pid, said, root = os.getpid(), None, tmp_path / "shards"
    options = {"shard_bytes": 1024, "segment_bytes": 512, "threads": threads}
    try:
        with EncryptedShardWriter(
            root, split="train", keys=keys, source_id=source_id, **options
        ) as writer:
            for i in range(100):
                writer.write({"x": np.full(8, i, "float32"), "y": i})
                if i == 60 and (child := os.fork()):
                    status = os.waitpid(child, 0)[1]
                elif i == 60:
                    _leave(how, writer)
                    break
    except BaseException as error:  # noqa: BLE001 # of the child, which must not go on
        said = type(error).__name__
    if os.getpid() != pid:
        os._exit(0 if said == _LEAVING[how] else 1)
    assert said is None
    assert status == 0
    rows = EncryptedShardDataset(root, split="train", keys=keys)
    assert sorted(int(y) for _, y in rows) == list(range(100))


@_forks
def test_a_forked_process_keeps_its_parents_temporary_folder(tmp_path, keys, url):
    pid = os.getpid()
    try:
        with EncryptedShardWriter(url, split="train", keys=keys) as writer:
            writer.write({"x": np.zeros(2), "y": 1})
            if child := os.fork():
                assert os.waitpid(child, 0)[1] == 0
            else:
                sys.exit(0)
            writer.write({"x": np.zeros(2), "y": 2})
    except SystemExit:
        gone = not writer._root.exists()
        if os.getpid() != pid:
            weakref.finalize._exitfunc()  # as the end of the interpreter would
            os._exit(1 if gone or not writer._root.exists() else 0)
    assert len(EncryptedShardDataset(url, split="train", keys=keys)) == 2
