"""Whole batches of a split: shuffled, decrypted ahead, dealt out to processes, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import torch
from torch.utils.data import DataLoader

from lightning_secure.crypto.entries import ShardEntry
from lightning_secure.crypto.segments import TAG_BYTES
from lightning_secure.data.format.header import HEADER_BYTES
from lightning_secure.data.loader.device import CudaCopyStream, on_device
from lightning_secure.data.loader.epoch_order import (
    EpochLine,
    Interval,
    deal,
    digest,
    left_after,
    steps_for,
)
from lightning_secure.data.loader.position import MAX_WINDOW_BYTES, Position
from lightning_secure.data.loader.prefetch import Pipeline
from lightning_secure.data.reading.batch_buffers import Buffers
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.reading.samples import assemble, collate
from lightning_secure.data.reading.threads import threads_to_use
from lightning_secure.errors import ConfigError, ManifestMismatchError

WINDOW_BYTES: Final = 8 * 1024 * 1024
#: The window that a checkpoint may ask of any loader, in bytes: four are in memory.
_TRUSTED_WINDOW_BYTES: Final = 2**30

Transform = Callable[[Any], Any]


class LoadOptions(TypedDict):
    """The arguments of :class:`EncryptedLoader` that all splits of a dataset share."""

    batch_size: int
    window_bytes: int
    threads: int | None
    num_workers: int


class EncryptedLoader:
    """Iterates over batches of an encrypted split.

    Args:
        dataset: The split.
        batch_size: Rows of a batch, per process.
        shuffle: Whether each epoch has an order of its own, which depends on ``seed`` and the
            epoch alone. Rows are mixed within a window of segments, and segments within a group of
            16 shards.
        seed: From 0 to 2**64 - 1; the same in each process.
        drop_last: Whether rows that fill no whole batch in each process are left out.
        window_bytes: Plaintext in which rows are mixed, in bytes; rounded up to whole batches where
            each row has a segment of its own. Up to four windows and three batches are in memory,
            whatever the size of the split.
        threads: How many decrypt; by default one a core, 8 at most.
        rank: Number of this process.
        world_size: How many processes read.
        transform: Applied to each batch, by the thread that iterates, and on the device.
        device: A CUDA device to copy batches to ahead of time. Others mean nothing here.
        num_workers: Worker processes of :meth:`random_access`; nothing else has any.
        trained_batches: Returns how many batches of the epoch were trained on. By default, all
            that were handed out count as trained on.

    Raises:
        ConfigError: if an argument is wrong.

    To Lightning it is an iterable and not a DataLoader, so it is given no sampler.

    Guarantees:
        In an epoch, all processes together return each row once, in the same number of batches in
        each process. Two exceptions: ``drop_last`` leaves some out; and without it, where
        ``batch_size`` is 1 and the rows do not divide by the number of processes, or there are
        fewer rows than processes, each process that would have no row for its last batch returns
        one that another process has too. The same holds for what is left of a resumed epoch. A
        batch that is still referred to is not overwritten.
    """

    def __init__(
        self,
        dataset: EncryptedShardDataset,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        window_bytes: int = WINDOW_BYTES,
        threads: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        transform: Transform | None = None,
        device: torch.device | None = None,
        num_workers: int = 0,
        trained_batches: Callable[[], int] | None = None,
    ) -> None:
        if batch_size < 1 or window_bytes < 1:
            raise ConfigError(
                f"batch_size and window_bytes must be positive, not {batch_size} and "
                f"{window_bytes}."
            )
        if window_bytes > MAX_WINDOW_BYTES:
            raise ConfigError(
                f"window_bytes must be at most {MAX_WINDOW_BYTES}, not {window_bytes}."
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be from 0 to {world_size - 1}, not {rank}.")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed must be from 0 to 2**64 - 1, not {seed}.")
        self._dataset = dataset
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._shuffle = shuffle
        self._seed = seed
        self._window_bytes = _whole_batches(dataset.shards.entries, batch_size, window_bytes)
        self._threads = threads_to_use(threads)
        self._rank = rank
        self._world_size = world_size
        self._transform = transform
        self._device = device if device is not None and device.type == "cuda" else None
        self._num_workers = num_workers
        self._trained_batches = trained_batches
        pin = self._device is not None
        self._windows, self._joined = Buffers(pin=pin), Buffers(pin=pin, spare=1)
        self._epoch = 0
        self._resumed: Position | None = None
        self._pass: _Pass | None = None

    def __len__(self) -> int:
        """Return the batches of a whole epoch, also while the rest of one is read."""
        return self._steps(len(self._dataset))

    def _steps(self, rows: int) -> int:
        return steps_for(rows, **self._dealing)

    @property
    def sampler(self) -> EncryptedLoader:
        """The loader itself, so that Lightning tells it the epoch; absent if rows are in order."""
        if not self._shuffle:
            raise AttributeError("rows are read in order, by no sampler")
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the passes that begin after this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass. Nothing is opened before the first batch is asked for."""
        # Lightning asks for an iterator before it tells the epoch.
        return _Batches(self)

    def _begin(self) -> _Pass:
        """Return the pass over the current epoch, or over what is left of a resumed one."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed.epoch == self._epoch:
            left = resumed.left
        else:
            left = (Interval(0, len(self._dataset)),)
        self._pass = _Pass(self._epoch, left)
        return self._pass

    def _run(self, current: _Pass) -> Iterator[Any]:
        """Return the batches of a pass."""
        batches: Iterator[dict[str, Any]] = Pipeline(
            self._dataset.shards,
            self._dataset.filler,
            self._windows,
            self._joined,
            line=self._line(current.epoch),
            share=deal(current.left, rank=self._rank, **self._dealing),
            threads=self._threads,
        ).batches()
        if self._device is not None:
            batches = on_device(batches, CudaCopyStream(self._device))
        for columns in batches:
            batch = assemble(columns, self._dataset.output)
            del columns
            current.handed_out += 1
            yield batch if self._transform is None else self._transform(batch)
            del batch
        # Unless the Trainer tells the epoch, the next pass is the next one.
        self._epoch = current.epoch + 1

    @property
    def _dealing(self) -> dict[str, Any]:
        """The rule by which rows are dealt out to all processes."""
        return {
            "world_size": self._world_size,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
        }

    def _line(self, epoch: int) -> EpochLine:
        """Return the order of an epoch."""
        entries = self._dataset.shards.entries
        return EpochLine(
            [entry.records for entry in entries],
            [entry.segments for entry in entries],
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            window_bytes=self._window_bytes,
        )

    # Resuming

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands, for every process and any number of them."""
        epoch, left = self._stand()
        return Position(
            epoch=epoch,
            seed=self._seed,
            window_bytes=self._window_bytes,
            shuffle=self._shuffle,
            order=digest(self._line(epoch)),
            content=self._dataset.entry.content_digest,
            left=left,
        ).to_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called, with what is left of that epoch.

        Seed and window of that run are taken over; batch size and number of processes need not be
        the same.

        Raises:
            ManifestMismatchError: if the split holds other rows now, or the order of that epoch
                cannot be found again.
            ConfigError: if the window of that run is above 1 GiB, and this loader's own is smaller.
        """
        if not state_dict:
            return  # of a private strategy's loader, which has none
        position = Position.from_state(
            state_dict, rows=len(self._dataset), content=self._dataset.entry.content_digest
        )
        if position.window_bytes > max(self._window_bytes, _TRUSTED_WINDOW_BYTES):
            raise ConfigError(
                f"the checkpoint asks for windows of {position.window_bytes} bytes, several of "
                f"which would be in memory, and this loader was made for {self._window_bytes}. "
                "Nothing was read. If the run was made with such windows, pass the same "
                "window_bytes= again."
            )
        self._seed, self._shuffle = position.seed, position.shuffle
        self._window_bytes = position.window_bytes
        if digest(self._line(position.epoch)) != position.order:
            raise ManifestMismatchError(
                "the order of the epoch in which the checkpoint was saved cannot be found again, "
                "so it cannot say which rows were seen. Nothing was read."
            )
        self._epoch, self._resumed, self._pass = position.epoch, position, None

    @property
    def begun(self) -> bool:
        """Whether a pass has begun, or is to go on."""
        return self._pass is not None or self._resumed is not None

    @property
    def batches_done(self) -> int:
        """Batches of the epoch that lie behind, in batches of as many processes as there are now.

        After another number of processes began the epoch, this is not what they counted.
        """
        return len(self) - self._steps(_rows(self._stand()[1]))

    def _stand(self) -> tuple[int, tuple[Interval, ...]]:
        """Return the epoch, and what is left of it."""
        if self._resumed is not None:
            return self._resumed.epoch, self._resumed.left
        if self._pass is None:
            return self._epoch, (Interval(0, len(self._dataset)),)
        left = self._pass.left
        steps = self._steps(_rows(left))
        done = self._pass.handed_out
        if self._trained_batches is not None:
            done = min(done, max(0, self._trained_batches() - (len(self) - steps)))
        return self._pass.epoch, tuple(left_after(left, min(done, steps), **self._dealing))

    def random_access(self) -> DataLoader[Any]:
        """Return a DataLoader over the same rows and columns, for samplers of any kind."""
        return DataLoader(
            self._dataset,
            batch_size=self.batch_size,
            shuffle=self._shuffle,
            drop_last=self.drop_last,
            num_workers=self._num_workers,
            collate_fn=collate if self._transform is None else _Collate(self._transform),
            pin_memory=self._device is not None,
        )


@dataclass
class _Pass:
    """A pass over an epoch, or over the rest of it."""

    epoch: int
    left: tuple[Interval, ...]
    handed_out: int = 0


def _whole_batches(shards: Sequence[ShardEntry], batch_size: int, window_bytes: int) -> int:
    """Return a window that ends with a batch, where each row has a segment of its own.

    Such rows are long: a batch that is put together from two windows would cost much.
    """
    if any(shard.records != shard.segments for shard in shards):
        return window_bytes
    segment = (shards[0].size - HEADER_BYTES) // shards[0].segments - TAG_BYTES
    batch = batch_size * segment
    return -(-window_bytes // batch) * batch


def _rows(intervals: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


class _Batches:
    """An iterator that begins when it is first asked."""

    def __init__(self, loader: EncryptedLoader) -> None:
        self._loader: EncryptedLoader | None = loader
        self._batches: Iterator[Any] = iter(())

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        loader, self._loader = self._loader, None
        if loader is not None:
            self._batches = loader._run(loader._begin())
        return next(self._batches)


class _Collate:
    """Applies a transform to collated batches; it pickles, for worker processes."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def __call__(self, samples: Any) -> Any:
        return self._transform(collate(samples))
