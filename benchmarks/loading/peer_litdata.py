"""litdata: plaintext, and its Fernet encryption of whole chunks and of single samples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import litdata
import torch
from litdata.utilities.encryption import FernetEncryption
from torch.utils.data import default_collate

from loading.serving import Cell, Epoch, serve

PASSWORD = "benchmark"


class Litdata:
    """``optimize`` with its recommended chunks of 64 MB, ``StreamingDataLoader`` to read.

    Images are stored as tensors, whose deserialisation copies nothing. In fully random access a
    sample is asked for by its index, as the documentation has it.
    """

    packages = ("litdata", "torch", "numpy", "cryptography")

    def prepare(self, cell: Cell) -> None:
        encryption = None
        if cell.variant != "plain":
            encryption = FernetEncryption(PASSWORD, level=cell.variant.removeprefix("fernet_"))
        x, y, _ = cell.rows()
        writer = litdata.streaming.Cache(str(cell.data), chunk_bytes="64MB", encryption=encryption)
        for index in range(cell.size.rows):
            writer[index] = {"x": torch.from_numpy(x[index].copy()), "y": int(y[index])}
        writer.done()
        writer.merge()
        if encryption is not None:
            encryption.save(str(cell.data / "fernet.pem"))

    def open(self, cell: Cell) -> Epoch:
        encryption = None
        if cell.variant != "plain":
            encryption = FernetEncryption.load(str(cell.data / "fernet.pem"), PASSWORD)
        dataset = litdata.StreamingDataset(
            str(cell.data),
            shuffle=cell.mode == "shuffled",
            encryption=encryption,
            batch_decode=cell.option,
        )
        if cell.mode == "random":
            return functools.partial(_by_index, dataset, cell)
        loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=cell.size.batch,
            num_workers=cell.workers,
            persistent_workers=cell.workers > 0,
        )
        return lambda number: ((batch["x"], batch["y"]) for batch in loader)


def _by_index(dataset: Any, cell: Cell, number: int) -> Iterator[tuple[Any, Any]]:
    order = cell.rows()[2].tolist()
    for start in range(0, len(order), cell.size.random_batch):
        indices = order[start : start + cell.size.random_batch]
        batch = default_collate([dataset[index] for index in indices])
        yield batch["x"], batch["y"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Litdata())
