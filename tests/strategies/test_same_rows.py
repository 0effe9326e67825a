"""How the rows of two processes are compared, in one process."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_secure.strategies import same_rows
from lightning_secure.strategies.same_rows import (
    describe_rows,
    read_rows,
    rows_apart,
    split_by_rank,
)


class Listed(Dataset):
    def __init__(self, items, make=lambda item: item):
        self.items, self.make = items, make

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.make(self.items[row])


def read(data, **options):
    return read_rows(DataLoader(data, batch_size=4, **options))


def apart(one, other):
    return rows_apart([read(one), read(other)])[0] == [1]


def tensors(count=20, seed=0):
    return TensorDataset(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)))


@dataclass
class Sample:
    x: torch.Tensor
    y: int


FORMS = {
    "tensor": lambda i: torch.full((3,), float(i)),
    "bfloat16": lambda i: torch.full((3,), float(i), dtype=torch.bfloat16),
    "whole": lambda i: torch.tensor([i, 1]),
    "array": lambda i: (np.full(3, i), 1),
    "number": lambda i: {"y": i, "z": 0.5},
    "fraction": lambda i: {"z": i / 7},
    "text": lambda i: [f"row {i}", b"x"],
    "complex": lambda i: (complex(i, 1),),
    "object": lambda i: Sample(torch.zeros(2), i),
    "nested": lambda i: {"a": [{"b": (i,)}]},
    "many": lambda i: [0] * 40 + [i],
    "picture": lambda i: torch.full((3, 16, 16), i, dtype=torch.uint8),
    "not a number": lambda i: torch.tensor([float("nan"), float(i)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_form_are_told_apart(form):
    one, other = list(range(1, 30)), [*range(1, 29), 31]
    assert not apart(Listed(one, FORMS[form]), Listed(one, FORMS[form]))
    assert apart(Listed(one, FORMS[form]), Listed(other, FORMS[form]))


def test_another_rounding_is_no_other_row():
    x = torch.randn(20, 100)
    assert not apart(Listed(x), Listed(x * (1 + 1e-7)))
    assert apart(Listed(x), Listed(x * 1.01))


def drawn(item):
    return item + torch.randn(()) + random.random() + np.random.rand()


def test_seeded_augmentation_is_compared_and_leaves_the_generators_alone():
    x = torch.arange(20.0)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    first = read(Listed(x, drawn))
    found = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(expected[0], found[0])
    assert expected[1:] == found[1:]
    torch.manual_seed(2)
    assert rows_apart([first, read(Listed(x, drawn))]) == ([], 20)
    assert rows_apart([first, read(Listed(x.flip(0), drawn))])[0] == [1]


def test_what_no_seed_reaches_is_not_compared_but_the_rest_of_the_row_is():
    def clock(item):
        return time.perf_counter_ns(), item

    x = list(range(20))
    assert not apart(Listed(x, clock), Listed(x, clock))
    assert apart(Listed(x, clock), Listed(x[::-1], clock))
    only = Listed(x, lambda item: time.perf_counter_ns())
    assert rows_apart([read(only), read(only)]) == ([], 0)


def test_rows_that_cannot_be_read_are_left_out_and_soon_given_up():
    calls = []

    def broken(item):
        calls.append(item)
        raise OSError(f"row {item} is private")

    assert rows_apart([read(Listed(list(range(500)), broken))] * 2) == ([], 0)
    assert len(calls) < 40


def test_reading_takes_seconds_whatever_a_row_takes(monkeypatch):
    monkeypatch.setattr(same_rows, "_SECONDS", (0.0, 60.0))
    assert 64 <= len(read(Listed(list(range(500))))) < 500
    monkeypatch.setattr(same_rows, "_SECONDS", (0.0, 0.5))
    slow = Listed(list(range(500)), lambda item: time.sleep(0.1) or item)
    assert 2 <= len(read(slow)) < 10


def test_workers_read_where_there_are_workers(tmp_path):
    def place(item):
        return torch.utils.data.get_worker_info() is not None, item

    def noted(worker):
        (tmp_path / f"worker{worker}").touch()

    parts = read(Listed(list(range(6)), place), num_workers=2, worker_init_fn=noted)
    assert parts == read(Listed(list(range(6)), lambda item: (True, item)))
    assert [path.name for path in tmp_path.iterdir()] == ["worker0"]


# ---------------------------------------------------------------- descriptions


def same(one, other):
    a, b = describe_rows(one), describe_rows(other)
    return a.statement == b.statement and a.complete and b.complete


def test_torchs_own_datasets_are_compared_whole():
    base, order = tensors(), list(range(20))
    assert same(Subset(base, order), Subset(tensors(), np.array(order)))
    assert same(Subset(base, order), Subset(base, torch.tensor(order)))
    for other in (order[::-1], [*order[:18], 19, 18], order[1:]):
        assert not same(Subset(base, order), Subset(base, other))
        assert not same(
            ConcatDataset([base, Subset(base, order)]), ConcatDataset([base, Subset(base, other)])
        )
    assert not same(tensors(), tensors(seed=1))
    assert not same(tensors(20), tensors(21))


def test_a_dataset_of_ones_own_does_not_pass_for_its_base():
    class Shuffled(TensorDataset):
        pass

    assert not describe_rows(Shuffled(torch.zeros(3))).complete
    assert not describe_rows(Subset(Listed([1]), [0])).complete
    assert not describe_rows(Subset(tensors(), ["a", "b"])).complete


def test_ten_million_indices_take_seconds():
    data = Subset(tensors(), range(10**7))
    start = time.process_time()
    describe_rows(data)
    assert time.process_time() - start < 5


def test_data_that_was_split_is_told_from_another_order():
    whole = range(100)

    def indices(*parts):
        return [describe_rows(Subset(tensors(100), part)).indices for part in parts]

    assert split_by_rank(indices(whole[::2], whole[1::2]), [[], []], [50, 50])
    assert split_by_rank(indices(range(0, 5000), range(5000, 10000)), [[], []], [5000] * 2)
    assert not split_by_rank(indices(whole, whole[::-1]), [[], []], [100, 100])
    assert not split_by_rank(indices(whole[:60], whole[40:]), [[], []], [60, 60])
    rows = [read(Listed(list(part))) for part in (whole[:50], whole[50:])]
    assert split_by_rank([None, None], rows, [50, 50])
    assert not split_by_rank([None, None], rows, [5000, 5000])  # most of them were not read
    assert not split_by_rank([None, None], [rows[0], rows[0][::-1]], [50, 50])
