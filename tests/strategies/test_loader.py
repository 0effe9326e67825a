from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset

from lightning_secure.data.datamodule import EncryptedDataModule
from lightning_secure.data.writing.writer import EncryptedShardWriter
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.strategies.private_loader import PrivateDataLoader, require_plain_loader


def test_rows_of_a_batching_loader_are_drawn_instead(tmp_path, keys):
    with EncryptedShardWriter(tmp_path, split="train", keys=keys, segment_bytes=64) as writer:
        writer.write_batch({"x": np.arange(100.0), "y": np.arange(100)})
    data = EncryptedDataModule(
        tmp_path, keys=keys, batch_size=10, transform=lambda batch: (batch[0] + 1, batch[1])
    )
    data.setup("fit")
    loader = data.train_dataloader()
    plain = require_plain_loader(loader)
    assert len(plain.dataset) == 100
    drawn = PrivateDataLoader(plain, sample_rate=0.5, steps=3, max_physical_batch_size=64, seed=1)
    for batch in drawn:
        for chunk in batch.chunks:
            x, y = chunk.data
            assert (x == y + 1).all()
    # Draws have no place in an epoch, so there is none to resume at.
    assert "position" not in data.state_dict()["train"]


def test_what_a_loader_calls_random_access_is_looked_at_as_well():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    class Loader:
        def random_access(self):
            return DataLoader(Stream(), batch_size=2)

    with pytest.raises(UnsupportedTrainerOptionError, match="iterable"):
        require_plain_loader(Loader())
