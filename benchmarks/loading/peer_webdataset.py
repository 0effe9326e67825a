"""WebDataset: plaintext tar files (it has no encryption, and no access by index)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import webdataset as wds

from loading.serving import Cell, Epoch, serve


class WebDataset:
    """``ShardWriter`` and ``WebDataset(...).batched()`` under a ``WebLoader``.

    A sample is two members of raw bytes, decoded by one ``numpy.frombuffer`` each, which is less
    than any of the decoders that come with it. Shuffled reading takes the documentation's buffer
    of 1000 samples.
    """

    packages = ("webdataset", "torch", "numpy")

    def prepare(self, cell: Cell) -> None:
        x, y, _ = cell.rows()
        cell.data.mkdir(parents=True, exist_ok=True)
        pattern = str(cell.data / "shard-%05d.tar")
        largest = min(64e6, cell.size.rows * cell.size.row_bytes / 4)  # for two worker processes
        with wds.ShardWriter(pattern, maxsize=largest, maxcount=10**9, verbose=0) as writer:
            for index in range(cell.size.rows):
                sample = {"x.bin": x[index].tobytes(), "y.bin": np.int64(y[index]).tobytes()}
                writer.write({"__key__": f"{index:09d}", **sample})

    def open(self, cell: Cell) -> Epoch:
        shape = cell.size.shape

        def decode(sample: dict[str, bytes]) -> tuple[Any, Any]:
            x = np.frombuffer(sample["x.bin"], np.uint8).reshape(shape)
            return x, np.frombuffer(sample["y.bin"], np.int64)[0]

        shuffled = cell.mode == "shuffled"
        shards = sorted(str(path) for path in cell.data.glob("*.tar"))
        dataset = wds.WebDataset(shards, shardshuffle=len(shards) if shuffled else False)
        if shuffled:
            dataset = dataset.shuffle(1000)
        dataset = dataset.map(decode).batched(cell.size.batch)
        loader = wds.WebLoader(
            dataset,
            batch_size=None,
            num_workers=cell.workers,
            persistent_workers=cell.workers > 0,
        )
        return lambda number: loader


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(WebDataset())
