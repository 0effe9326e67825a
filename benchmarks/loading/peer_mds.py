"""MosaicML Streaming: plaintext MDS shards (it has no encryption)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from peers import mosaicml_streaming
from torch.utils.data import default_collate

from loading.serving import Cell, Epoch, serve

streaming = mosaicml_streaming()


class Mds:
    """``MDSWriter`` with static shapes, shards of its default 64 MiB, ``StreamingDataLoader``."""

    packages = ("mosaicml-streaming", "torch", "numpy")

    def prepare(self, cell: Cell) -> None:
        x, y, _ = cell.rows()
        image = f"ndarray:uint8:{','.join(map(str, cell.size.shape))}"
        with streaming.MDSWriter(out=str(cell.data), columns={"x": image, "y": "int"}) as writer:
            for index in range(cell.size.rows):
                writer.write({"x": x[index], "y": int(y[index])})

    def open(self, cell: Cell) -> Epoch:
        dataset = streaming.StreamingDataset(
            local=str(cell.data), batch_size=cell.size.batch, shuffle=cell.mode == "shuffled"
        )
        if cell.mode == "random":
            return functools.partial(_by_index, dataset, cell)
        loader = streaming.StreamingDataLoader(
            dataset,
            batch_size=cell.size.batch,
            num_workers=cell.workers,
            persistent_workers=cell.workers > 0,
        )
        return lambda number: ((batch["x"], batch["y"]) for batch in loader)


def _by_index(dataset: Any, cell: Cell, number: int) -> Iterator[tuple[Any, Any]]:
    order = cell.rows()[2]
    for start in range(0, len(order), cell.size.random_batch):
        batch = default_collate(dataset[order[start : start + cell.size.random_batch]])
        yield batch["x"], batch["y"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Mds())
