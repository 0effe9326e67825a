"""A row that several indices name is drawn several times, and epsilon is that of one index."""

from __future__ import annotations

import time

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    random_split,
)

from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.checks.repeated_rows import require_distinct_rows
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.private import PrivateStrategy

X, Y = torch.randn(12, 3), torch.arange(12)


class Rows(Dataset):
    """Rows that only its own ``__getitem__`` knows."""

    def __init__(self, rows=12):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        return X[index]


class Unsized(Dataset):
    def __getitem__(self, index):
        return X[index]


class Augmented(Dataset):
    """A wrapper under a name of its own."""

    def __init__(self, rows):
        self.original = rows
        self.strength = 0.1

    def __len__(self):
        return len(self.original)

    def __getitem__(self, index):
        return self.original[index]


class Chosen(Dataset):
    """A Subset that is none of torch's."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]


class Owned(Augmented):
    """Its rows know it, and so do theirs."""

    def __init__(self):
        super().__init__(Rows())
        self.original.owner = self


class Windows(Dataset):
    """Several rows of each series, which a list of numbers names."""

    def __init__(self):
        self.series, self.of_window = Rows(3), [0, 0, 1, 1, 2, 2]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.series[self.of_window[index]] + index


PLAIN, OTHER = Rows(), Rows()
TENSORS = TensorDataset(X, Y)
HALVES = random_split(PLAIN, [6, 6])
LISTED = [(x, 1) for x in X]

REPEATED = {
    "indices": (lambda: Subset(PLAIN, [0, 1, 1, 2]), 3, 2),
    "a tensor of indices": (lambda: Subset(TENSORS, torch.tensor([4, 4, 4])), 1, 3),
    "counted from the end": (lambda: Subset(PLAIN, [11, -1]), 1, 2),
    "a mask of numbers": (lambda: Subset(PLAIN, np.array([True, True, False])), 2, 2),
    "no length below": (lambda: Subset(Unsized(), [3, 3]), 1, 2),
    "nested": (lambda: Subset(Subset(PLAIN, [5, 6, 5]), [0, 2]), 1, 2),
    "below another": (lambda: Subset(Subset(PLAIN, [5, 5, 6]), range(3)), 2, 2),
    "concatenated": (lambda: ConcatDataset([PLAIN] * 3), 12, 3),
    "of a concatenation": (lambda: Subset(ConcatDataset([PLAIN, PLAIN]), [0, 12]), 1, 2),
    "overlapping": (lambda: ConcatDataset([Subset(PLAIN, range(8)), Subset(PLAIN, [7])]), 8, 2),
    "a part and the whole": (lambda: ConcatDataset([HALVES[0], OTHER, PLAIN]), 24, 2),
    "augmented beside": (lambda: ConcatDataset([PLAIN, Augmented(PLAIN)]), 12, 2),
    "augmented": (lambda: Augmented(Subset(PLAIN, [2, 2])), 1, 2),
    "chosen by another class": (lambda: Chosen(PLAIN, [1, 0, 1]), 2, 2),
    "tensors wrapped twice": (lambda: ConcatDataset([TENSORS, TensorDataset(X, Y)]), 12, 2),
    "tensors that overlap": (
        lambda: ConcatDataset([TensorDataset(X[:8]), TensorDataset(X[6:])]), 12, 2,
    ),
    "expanded": (lambda: TensorDataset(X[:1].expand(9, 3), Y[:1].expand(9)), 1, 9),
    "an expanded tensor": (lambda: X[:1].expand(9, 3), 1, 9),
    "of tensors": (lambda: Subset(TENSORS, [3, 3, 1]), 2, 2),
    "side by side": (
        lambda: StackDataset(a=Subset(PLAIN, [0, 0, 1]), b=Subset(TENSORS, [2, 2, 2])), 2, 2,
    ),
    "a list": (lambda: LISTED * 2, 12, 2),
    "a list made anew": (lambda: [(x, 1) for x, _ in LISTED * 2], 12, 2),
}  # fmt: skip

DISTINCT = {
    "plain": lambda: PLAIN,
    "tensors": lambda: TENSORS,
    "one tensor": lambda: X,
    "a permutation": lambda: Subset(PLAIN, torch.randperm(12)),
    "from the end": lambda: Subset(PLAIN, [-1, 0, -2]),
    "halves together": lambda: ConcatDataset(HALVES),
    "two datasets": lambda: ConcatDataset([PLAIN, OTHER, TENSORS, LISTED]),
    "augmented": lambda: Augmented(TENSORS),
    "known to its rows": Owned,
    "windows": Windows,
    "one input, many targets": lambda: TensorDataset(X[:1].expand(12, 3), Y),
    "pairs": lambda: StackDataset(Subset(PLAIN, [0, 0, 1]), Subset(PLAIN, [1, 2, 2])),
    "numbers that are equal": lambda: [1, 1, 2, 2],
    "pairs of numbers": lambda: [(1, "a"), (1, "a")],
    "one input in a list": lambda: [(X[0], 0), (X[0], 1)],
    "on no device": lambda: TensorDataset(torch.empty(3, 2, device="meta")),
    "sparse": lambda: TensorDataset(torch.eye(3).to_sparse()),
    "nothing in it": lambda: Subset(PLAIN, []),
    "places of other kinds": lambda: Chosen(PLAIN, [(0, 1), (0,), "x"]),
    "by name": lambda: Subset({"a": 1, "b": 2}, ["a", "b"]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_row_under_many_indices_is_refused(name):
    dataset, rows, most = REPEATED[name]
    dataset = dataset()
    words = rf"{len(dataset)} indices for {rows} rows, and lists a row up to {most} times"
    with pytest.raises(UnsupportedTrainerOptionError, match=words) as refused:
        require_distinct_rows(dataset)
    assert "List each row once" in str(refused.value)


@pytest.mark.parametrize("name", DISTINCT)
def test_rows_that_are_listed_once_pass(name):
    require_distinct_rows(DISTINCT[name]())


def test_one_sealed_split_is_one_source(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys) as writer:
        writer.write_batch({"x": np.arange(10.0)})
    with EncryptedShardWriter(tmp_path, split="more", keys=keys) as writer:
        writer.write_batch({"x": np.arange(10.0)})

    def split(name):
        return EncryptedShardDataset(tmp_path, split=name, keys=keys)

    require_distinct_rows(ConcatDataset([split("train"), split("more")]))
    with pytest.raises(UnsupportedTrainerOptionError, match="20 indices for 10 rows"):
        require_distinct_rows(ConcatDataset([split("train"), split("train")]))
    with pytest.raises(UnsupportedTrainerOptionError, match="3 indices for 2 rows"):
        require_distinct_rows(Subset(split("train"), [1, 2, 1]))


def test_a_fit_on_repeats_takes_no_step(tmp_path):
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 12)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    run = L.Trainer(
        strategy=PrivateStrategy(DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0)),
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(UnsupportedTrainerOptionError, match="36 indices for 12 rows"):
        run.fit(Model(), DataLoader(ConcatDataset([TENSORS] * 3), batch_size=4))
    assert run.strategy.ledger is None
    run.fit(Model(), DataLoader(TENSORS, batch_size=4))
    assert run.strategy.ledger.steps == 3


def test_many_indices_take_seconds():
    indices = np.random.default_rng(0).permutation(3_000_000)
    begin = time.process_time()
    require_distinct_rows(Subset(Rows(3_000_000), indices))
    assert time.process_time() - begin < 10
