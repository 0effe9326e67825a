from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_secure.crypto.providers import LocalKeyProvider
from lightning_secure.data.format.header import HEADER_BYTES
from lightning_secure.data.loader.loader import EncryptedLoader
from lightning_secure.data.reading.batch_buffers import Buffers, Rows
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.shards.scratch import Scratch
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import ConfigError, ShardCorruptedError

ROWS = 500
X = np.random.default_rng(5).integers(0, 256, (ROWS, 3, 8), dtype="uint8")


def seal(root, keys, *, rows=ROWS, text=False, **options):
    options = {"segment_bytes": 320, "shard_bytes": 4000, **options}
    with EncryptedShardWriter(root, split="train", keys=keys, **options) as writer:
        columns = {"x": X[:rows], "y": np.arange(rows)}
        if text:
            columns["name"] = [f"row {i}" * (i % 4) for i in range(rows)]
        writer.write_batch(columns)
    return root


@pytest.fixture(scope="module")
def sealed(tmp_path_factory, keys):
    return seal(tmp_path_factory.mktemp("sealed"), keys)


@pytest.fixture(autouse=True)
def _threads_for_small_segments(monkeypatch):
    """Segments that are worth a thread would make each of these tests read megabytes."""
    monkeypatch.setattr("lightning_secure.data.reading.dataset._WORTH_A_THREAD_BYTES", 0)


def dataset(root, keys, **options):
    return EncryptedShardDataset(root, **{"split": "train", "keys": keys, **options})


def loader(root, keys, *, output="tuple", columns=None, **options):
    options = {"batch_size": 32, "shuffle": True, "window_bytes": 1500, "threads": 2, **options}
    return EncryptedLoader(dataset(root, keys, output=output, columns=columns), **options)


def numbers(batches) -> list[int]:
    return [int(row) for batch in batches for row in batch[1]]


def test_each_row_comes_once_with_what_belongs_to_it(sealed, keys):
    batches = list(loader(sealed, keys))
    assert [len(y) for _, y in batches] == [32] * 15 + [20]
    for x, y in batches:
        assert np.array_equal(x.numpy(), X[y.numpy()])
    assert sorted(numbers(batches)) == list(range(ROWS))
    assert numbers(batches) != list(range(ROWS))


@pytest.mark.parametrize("batch_size", [1, 7, 200, 1000])
@pytest.mark.parametrize("window_bytes", [1, 2000, 10**6])
def test_batches_are_cut_from_windows_of_any_size(sealed, keys, batch_size, window_bytes):
    options = {"batch_size": batch_size, "window_bytes": window_bytes}
    batches = loader(sealed, keys, **options)
    assert len(batches) == -(-ROWS // batch_size)
    rows = [(x, y) for x, y in batches]
    assert len(rows) == len(batches)
    assert sorted(numbers(rows)) == list(range(ROWS))
    assert all(np.array_equal(x.numpy(), X[y.numpy()]) for x, y in rows)


def test_rows_come_in_order_if_asked(sealed, keys):
    plain = loader(sealed, keys, shuffle=False)
    assert numbers(plain) == list(range(ROWS))
    assert not hasattr(plain, "sampler")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("window_bytes", [1, 40 * 5, 1500, 10**6])
def test_rows_in_segments_of_their_own(tmp_path, keys, window_bytes, world_size):
    seal(tmp_path, keys, segment_bytes=1, shard_bytes=1300)
    seen = []
    for rank in range(world_size):
        ranks = {"rank": rank, "world_size": world_size}
        for x, y in loader(tmp_path, keys, window_bytes=window_bytes, threads=3, **ranks):
            assert np.array_equal(x.numpy(), X[y.numpy()])
            seen += y.tolist()
    assert sorted(seen) == list(range(ROWS))
    assert seen != sorted(seen)


def test_a_segment_is_not_decrypted_over_rows_of_another_thread(sealed, keys):
    data = opened(sealed, keys)
    rows = Rows(data.filler.columns, 20, Buffers())
    for segment in (1, 0):  # the later one first, as by a faster thread
        places = np.arange(segment * 10, segment * 10 + 10)
        reader = data.shards.reader(0)
        data.filler.fill(rows, reader, segment, Scratch(), places, until=segment * 10 + 10)
    assert np.array_equal(rows.values["x"].numpy(), X[:20])
    assert rows.values["y"].tolist() == list(range(20))


def test_rows_of_one_segment_are_spread(sealed, keys):
    """Otherwise neighbours in the file would be neighbours in training."""
    first = numbers(itertools.islice(loader(sealed, keys, window_bytes=10**6), 2))
    assert len({row // 10 for row in first}) > 25


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_rows(sealed, keys, world_size, drop_last):
    all_ = [
        loader(sealed, keys, rank=rank, world_size=world_size, drop_last=drop_last)
        for rank in range(world_size)
    ]
    shares = [list(each) for each in all_]
    assert {len(share) for share in shares} == {len(all_[0])}
    rows = sorted(itertools.chain(*map(numbers, shares)))
    if drop_last:
        assert len(set(rows)) == len(rows) == len(all_[0]) * 32 * world_size
    else:
        assert rows == list(range(ROWS))


def test_a_process_opens_only_what_it_reads(tmp_path, keys):
    seal(tmp_path, keys, segment_bytes=64, shard_bytes=64)  # 250 shards, in 16 groups
    part = loader(tmp_path, keys, rank=1, world_size=16, batch_size=4)
    numbers(part)
    assert len(part._dataset.shards._readers) <= 48


def test_epochs_differ_and_can_be_repeated(sealed, keys):
    data = loader(sealed, keys)
    first, second = numbers(data), numbers(data)
    assert first != second
    data.set_epoch(0)
    assert numbers(data) == first
    assert data.sampler is data
    assert numbers(loader(sealed, keys, seed=1)) != first


def test_several_passes_at_once(sealed, keys):
    data = loader(sealed, keys)
    pairs = list(zip(data, data, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in pairs)
    assert sorted(numbers(a for a, _ in pairs)) == list(range(ROWS))


def test_kept_batches_stay_what_they_were(sealed, keys):
    data = loader(sealed, keys)
    kept = [(x[3:9], x[3:9].clone()) for x, _ in data]
    for _ in range(3):
        numbers(data)
    assert all(torch.equal(x, copy) for x, copy in kept)


def test_memory_is_bounded_whatever_the_size_of_the_split(tmp_path, keys):
    rows = np.zeros((4000, 4096), "uint8")
    with EncryptedShardWriter(
        tmp_path, split="train", keys=keys, segment_bytes=32768, shard_bytes=2**21
    ) as writer:
        writer.write_batch({"x": rows, "y": np.arange(4000)})
    del rows
    data = loader(tmp_path, keys, window_bytes=2**18)
    tracemalloc.start()
    try:
        assert sorted(numbers(data)) == list(range(4000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Three windows, spare memory and one batch, of 16 MB.
    assert peak < 3 * 2**20


def test_dicts_columns_and_transforms(sealed, keys):
    def flipped(batch):
        return {**batch, "z": -batch["y"]}

    data = loader(sealed, keys, output="dict", columns=("y",), transform=flipped)
    batch = next(iter(data))
    assert list(batch) == ["y", "z"]
    assert torch.equal(batch["z"], -batch["y"])
    (drawn,) = itertools.islice(data.random_access(), 1)
    assert torch.equal(drawn["z"], -drawn["y"])


def test_columns_of_any_length(tmp_path, keys):
    seal(tmp_path, keys, text=True)
    batches = list(loader(tmp_path, keys, batch_size=100))
    assert sorted(numbers(batches)) == list(range(ROWS))
    for x, y, names in batches:
        assert names == [f"row {i}" * (i % 4) for i in y.tolist()]
        assert np.array_equal(x.numpy(), X[y.numpy()])


def test_random_access_is_a_plain_loader(sealed, keys):
    data = loader(sealed, keys).random_access()
    assert type(data) is DataLoader
    assert sorted(numbers(data)) == list(range(ROWS))


def test_one_call_to_the_provider(sealed, keys, monkeypatch):
    calls = []
    unwrap = LocalKeyProvider.unwrap
    monkeypatch.setattr(  # counts, and does what it did
        LocalKeyProvider, "unwrap", lambda *a, **k: calls.append(1) or unwrap(*a, **k)
    )
    data = loader(sealed, keys)
    numbers(data)
    numbers(data)
    data._dataset.close()
    numbers(data)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"window_bytes": 0},
        {"threads": 0},
        {"rank": 1},
        {"rank": -1, "world_size": 2},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_wrong_arguments_are_refused(sealed, keys, options):
    with pytest.raises(ConfigError):
        loader(sealed, keys, **options)


# ---------------------------------------------------------------- threads and errors


def threads() -> int:
    return sum(t.name.startswith("lightning-secure") for t in threading.enumerate())


def opened(root, keys, **options):
    """Shards that are read for the first time are read one after another."""
    data = dataset(root, keys, **options)
    for shard in range(len(data.entry.shards)):
        data.shards.reader(shard)
    return data


def damaged(root, keys):
    path = root / dataset(root, keys).entry.shards[2].file
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 3 * (320 + 16) + 40] ^= 1  # in segment 3
    path.write_bytes(raw)
    return path.name


def test_no_thread_outlives_its_iterator(sealed, keys):
    before = threads()
    data = loader(sealed, keys)
    batches = iter(data)
    assert threads() == before
    next(batches)
    assert threads() > before
    del batches
    gc.collect()
    assert threads() == before
    numbers(data)
    assert threads() == before
    with pytest.raises(ZeroDivisionError):
        [1 // 0 for _ in data]
    gc.collect()
    assert threads() == before


def test_a_pass_may_be_ended_by_one_of_its_own_threads(sealed, keys, monkeypatch):
    """As the garbage collector does it, which runs in any thread."""
    data = loader(sealed, keys, threads=1, window_bytes=1, batch_size=5)
    batches = data._run(data._begin())
    fill, calls, gate, ended = data._dataset.filler.fill, [], threading.Event(), []

    # The second segment is decrypted while the first is consumed.
    def meddling(*arguments, **options):
        calls.append(1)
        if len(calls) == 2 and gate.wait(10):
            ended.append(batches.close())
        fill(*arguments, **options)

    monkeypatch.setattr(data._dataset.filler, "fill", meddling)
    before = threads()
    next(batches)
    (worker,) = [t for t in threading.enumerate() if t.name.startswith("lightning-secure")][before:]
    gate.set()
    worker.join(10)
    assert ended == [None]
    assert threads() == before


def test_an_altered_segment_reaches_the_consumer(tmp_path, keys):
    name = damaged(seal(tmp_path, keys), keys)
    before = threads()
    batches, seen = iter(loader(tmp_path, keys, batch_size=8)), []
    with pytest.raises(ShardCorruptedError, match=rf"{name}.*segment 3; nothing"):
        seen.extend(row for batch in batches for row in batch[1].tolist())
    assert len(seen) < ROWS
    assert list(batches) == []
    del batches
    gc.collect()
    assert threads() == before


@pytest.mark.parametrize("count", [1, 400])
def test_an_altered_segment_yields_no_sample(tmp_path, keys, count):
    name = damaged(seal(tmp_path, keys), keys)
    data = opened(tmp_path, keys, threads=2)
    first = sum(shard.records for shard in data.entry.shards[:2])
    rows = [first + 3 * 10 + 1, *range(count - 1)]
    with pytest.raises(ShardCorruptedError, match=rf"{name}.*segment 3"):
        data.__getitems__(rows)


def test_a_shard_that_is_gone_is_named(tmp_path, keys):
    seal(tmp_path, keys)
    (tmp_path / dataset(tmp_path, keys).entry.shards[1].file).unlink()
    with pytest.raises(ShardCorruptedError, match="shard-00001"):
        list(loader(tmp_path, keys))


def test_the_interpreter_ends_in_the_middle_of_a_pass(sealed, keys):
    code = (
        "import sys\n"
        "from lightning_secure import EncryptedShardDataset, LocalKeyProvider\n"
        "from lightning_secure.data.loader.loader import EncryptedLoader\n"
        "import lightning_secure.data.reading.dataset\n"
        "lightning_secure.data.reading.dataset._WORTH_A_THREAD_BYTES = 0\n"
        "keys = LocalKeyProvider(sys.argv[2])\n"
        "data = EncryptedShardDataset(sys.argv[1], split='train', keys=keys)\n"
        "batches = iter(EncryptedLoader(data, batch_size=8, threads=2, window_bytes=500))\n"
        "data.__getitems__(range(400)), data.__getitems__(range(400))\n"
        "print(len(next(batches)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sealed), str(keys._path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_many_segments_are_decrypted_by_several_threads(sealed, keys):
    data = opened(sealed, keys, threads=3)
    order = np.random.default_rng(0).permutation(ROWS).tolist()
    x, y = data.__getitems__(order).batch()
    assert y.tolist() == order
    assert np.array_equal(x.numpy(), X[order])
    assert threads() >= 1
    data.close()
    assert data.__getitems__(order).batch()[1].tolist() == order
    data.close()


def test_a_forked_worker_has_threads_of_its_own(sealed, keys):
    data = opened(sealed, keys, threads=2)
    data.__getitems__(range(ROWS))
    assert threads() >= 1
    workers = DataLoader(data, batch_size=250, num_workers=1, multiprocessing_context="fork")
    assert numbers(workers) == list(range(ROWS))
    data.close()


def test_a_segment_that_was_sealed_wrongly_is_refused(tmp_path, keys, monkeypatch):
    """Signed and authentic, and yet not what its schema says."""
    from lightning_secure.data.shards import shard

    right = shard.encode_segment
    monkeypatch.setattr(shard, "encode_segment", lambda *rows: right(*rows)[:-8])
    seal(tmp_path, keys, rows=10)
    monkeypatch.undo()
    with pytest.raises(ShardCorruptedError, match=r"segment 0 does not fit the schema"):
        dataset(tmp_path, keys).__getitems__([3])
    with pytest.raises(ShardCorruptedError, match=r"does not fit the schema, in segment 0"):
        dataset(tmp_path, keys)[3]
