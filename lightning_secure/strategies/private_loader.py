"""The training loader of a private run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.randomness import FreshRandomness, WorkerInit
from lightning_secure.privacy.sampling import LogicalCollate, PoissonBatchSampler, seed_of_rank


@runtime_checkable
class RandomAccess(Protocol):
    """A loader that batches in a way of its own, over rows that can be drawn as well."""

    def random_access(self) -> DataLoader[Any]:
        """Return a plain DataLoader over the same rows."""


class PrivateDataLoader(DataLoader[Any]):
    """Draws rows by Poisson sampling, from the dataset and with the workers of another loader.

    Args:
        loader: Whose dataset, collate function and workers are used.
        sample_rate: Probability of each row in each step.
        steps: Steps an epoch.
        max_physical_batch_size: Most rows of a chunk.
        seed: Makes the draws repeatable, and so not private.
        secure: Whether a cryptographic keystream draws; see :class:`PoissonBatchSampler`.
        rank: Number of this process among those that train together.
        world_size: How many they are.
        order: Takes the place of Poisson sampling, with batches in an order of its own.

    What dataset and collate function draw at random, for example to augment rows, comes from
    generators that the operating system has seeded, in this process and in workers.

    Draws do not depend on those before them, so a run that resumes in the middle of an epoch just
    goes on drawing: there is no state to restore.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        sample_rate: float,
        steps: int,
        max_physical_batch_size: int,
        seed: int | None,
        secure: bool = False,
        rank: int = 0,
        world_size: int = 1,
        order: Sampler[list[int]] | None = None,
    ) -> None:
        workers: dict[str, Any] = {}
        if loader.num_workers:
            workers = {
                "timeout": loader.timeout,
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
        self._user_collate = loader.collate_fn
        seed = seed_of_rank(seed, rank)
        self._randomness = FreshRandomness(seed, stream=2)
        user_init = loader.worker_init_fn
        super().__init__(
            loader.dataset,
            batch_sampler=order
            if order is not None
            else PoissonBatchSampler(
                len(loader.dataset),  # type: ignore[arg-type] # require_plain_loader saw to it
                sample_rate=sample_rate,
                steps=steps,
                seed=seed,
                secure=secure,
                rank=rank,
                world_size=world_size,
            ),
            collate_fn=LogicalCollate(
                loader.collate_fn, max_physical_batch_size=max_physical_batch_size
            ),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=WorkerInit(user_init) if seed is None else user_init,
            **workers,
        )

    def __iter__(self) -> Any:
        """Begin an epoch."""
        batches = super().__iter__()
        # Workers have generators of their own.
        return batches if self.num_workers else _Apart(batches, self._randomness)

    def trial_batch(
        self, rows: Sequence[int], before_collating: Callable[[], None] = lambda: None
    ) -> Any:
        """Fetch some rows, and return the batch that a collate function of the user's own makes.

        Args:
            rows: Their numbers, modulo the number of rows.
            before_collating: Is called once the rows are fetched.

        Returns:
            The batch; None if torch's own collate function is used, which keeps rows apart.

        Fetching may change what the dataset keeps, which a checkpoint could hold. With workers and
        torch's own collate function nothing is fetched: only copies of the dataset change there.
        """
        own = self._user_collate is not default_collate
        if self.num_workers and not own:
            return None
        rows = [row % len(self.dataset) for row in rows]  # type: ignore[arg-type]
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(rows)
        else:
            samples = [self.dataset[row] for row in rows]
        before_collating()
        return self._user_collate(samples) if own else None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; with it Lightning knows that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class _Apart:
    """Fetches each batch with fresh generators, and leaves those of the process alone."""

    def __init__(self, batches: Iterator[Any], randomness: FreshRandomness) -> None:
        self._batches = batches
        self._randomness = randomness

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._randomness.apart():
            return next(self._batches)


def require_plain_loader(dataloader: object) -> DataLoader[Any]:
    """Return a loader whose sampling may be replaced by Poisson sampling.

    Raises:
        UnsupportedTrainerOptionError: if the loader iterates, weighs or batches in a way of its
            own, so that replacing it would train on other data than the user meant.
    """
    if isinstance(dataloader, RandomAccess):
        dataloader = dataloader.random_access()
    if not isinstance(dataloader, DataLoader):
        reason = f"it is a {type(dataloader).__name__} and not a torch DataLoader"
    elif isinstance(dataloader.dataset, IterableDataset) or not hasattr(
        dataloader.dataset, "__len__"
    ):
        reason = "its dataset is iterable, and rows that come in an order cannot be drawn"
    elif dataloader.batch_size is None:
        reason = "it does no batching (batch_size=None)"
    elif type(dataloader.batch_sampler) is not BatchSampler:
        reason = f"its batches come from a {type(dataloader.batch_sampler).__name__}"
    elif type(dataloader.sampler) not in (RandomSampler, SequentialSampler) or (
        isinstance(dataloader.sampler, RandomSampler)
        and (dataloader.sampler.replacement or len(dataloader.sampler) != len(dataloader.dataset))
    ):
        reason = (
            f"it has a {type(dataloader.sampler).__name__} that draws rows unequally or only some"
        )
    else:
        return dataloader
    raise UnsupportedTrainerOptionError(
        f"the training DataLoader cannot be used privately: {reason}. The epsilon is true only if "
        "each row is drawn by its own coin toss, which this strategy does by itself. Pass a plain "
        "DataLoader(dataset, batch_size=..., shuffle=True). No step was taken."
    )
