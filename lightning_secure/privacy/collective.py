"""Whom a private step talks to: no other process, or several that take each step together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric

from lightning_secure.errors import LightningSecureError, PrivacyError, UnsupportedModelError
from lightning_secure.privacy.gradients.products import widened

T = TypeVar("T")

Parameters = Mapping[nn.Parameter, nn.Parameter]

#: Smaller tensors travel together up to this many bytes; larger ones are added up where they are.
_BUCKET_BYTES: Final = 32 * 2**20


class Collective(Protocol):
    """The processes that take each step together: all of them, or none.

    Attributes:
        rank: Number of this process, from 0. It draws from every ``size``-th row, from this one on.
        size: Number of processes.

    The methods here are those of one process by itself.
    """

    rank: int = 0
    size: int = 1

    @property
    def adds_noise(self) -> bool:
        """Whether this is the one process that adds the noise to its sums."""
        return True

    def together(self) -> AbstractContextManager[None]:
        """Run a block in every process; if it fails in one, it fails in all."""
        return nullcontext()

    def once(self, action: Callable[[], T]) -> T:
        """Run an action in the first process, and return its result in every one."""
        return action()

    def alone(self, model: nn.Module) -> AbstractContextManager[None]:
        """Run a chunk, in which nothing is exchanged: each process has its own number of chunks."""
        return nullcontext()

    def trial(self, model: nn.Module) -> AbstractContextManager[None]:
        """Run trial rows within :meth:`alone`, with whole weights in the state of the model."""
        return nullcontext()

    def unsharded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Have every weight whole in this process while a block runs."""
        return nullcontext()

    def homes(self) -> Parameters:
        """Return the sharded parameter for each whole one, within :meth:`unsharded`."""
        return {}

    def until_summed(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Run a part of a step before :meth:`sum`; if it fails in one process, that fails in all.

        Args:
            parameters: Those of the sums, in the same order in every process.
        """
        return nullcontext()

    def sum(
        self, sums: dict[nn.Parameter, Tensor], homes: Parameters, *, noised: bool, noises: int
    ) -> None:
        """Add up the sums of all processes, in the dict.

        Args:
            sums: Of this process, by parameter.
            homes: The parameters, in the same order in every process, and where each sum goes.
            noised: Whether this process has added noise to its sums.
            noises: How many processes must have: one, or none without noise.

        Raises:
            PrivacyError: if another process has failed, or the noise is in the sums otherwise.
        """
        self._require_noised(noises, 0, int(noised))

    def _require_noised(self, noises: int, failed: int, found: int) -> None:
        if failed:
            self.fail(_failed_elsewhere())
        if found != noises:
            self.fail(
                PrivacyError(
                    f"{found} processes added noise in this step, and exactly one has to. The "
                    "step was not taken."
                )
            )

    def fail(self, error: LightningSecureError) -> NoReturn:
        """Raise an error that every process raises.

        Raises:
            LightningSecureError: if called: always.
        """
        raise error


class Single(Collective):
    """One process: it has all rows and weights, and waits for no other."""


class Processes(Collective):
    """Several processes, each with all weights and its own part of the rows.

    The first process adds the noise to its sums. Then the sums of all are added up, and all have
    the same noised gradient.

    Guarantees:
        The noise is in the sums exactly once: in every step the processes count who added it. If
        a block of :meth:`together` or :meth:`until_summed` fails in one process, it fails in all,
        and nothing is released.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._device = torch.device("cpu")
        self._alone = False
        # That every process knows of.
        self._failure: BaseException | None = None

    def connect(self, device: torch.device) -> None:
        """Begin a run, once ``torch.distributed`` has connected the processes.

        Args:
            device: Of the sums.
        """
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._device, self._failure = device, None

    @property
    def adds_noise(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in every process; if it fails in one, it fails in all.

        Raises:
            PrivacyError: if the block has failed in another process.
        """
        with self._telling(lambda: self._added([1])):
            yield
        if self._added([0])[0]:
            self.fail(_failed_elsewhere())

    def once(self, action: Callable[[], T]) -> T:
        """Run an action in the first process, and return its result in every one.

        Raises:
            PrivacyError: if the action has failed in the first process.
        """
        self._require_not_alone()
        shared: list[Any] = [None]
        with self.together():
            if self.rank == 0:
                shared = [action()]
        self.exchange(lambda: distributed.broadcast_object_list(shared, 0))
        result: T = shared[0]
        return result

    def exchange(self, action: Callable[[], T]) -> T:
        """Run an action that waits for the other processes.

        Raises:
            UnsupportedModelError: if it is within a training step.
            PrivacyError: if a process has gone, or did not answer in time.
        """
        self._require_not_alone()
        return answered(action)

    def _require_not_alone(self) -> None:
        if self._alone:
            raise UnsupportedModelError(
                "training_step exchanges something with other processes (all_gather, reduce, "
                "broadcast or barrier). Clipping bounds a row only if its gradient depends on "
                "nothing else, and each process has its own number of chunks, so the others would "
                "wait in vain. Exchange in hooks outside of the step. This step was not taken."
            )

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Run a chunk, in which :meth:`exchange` is refused and metrics wait for no process."""
        self._alone = True
        try:
            with _metrics_of_this_process(model):
                yield
        finally:
            self._alone = False

    @contextlib.contextmanager
    def until_summed(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Run a part of a step; if it fails, the others learn so where they add up their sums."""
        with self._telling(lambda: self._tell_where_sums_are_due(parameters)):
            yield

    def _tell_where_sums_are_due(self, parameters: Iterable[nn.Parameter]) -> None:
        self._added([1, 0], [torch.zeros_like(p, dtype=widened(p.dtype)) for p in parameters])

    def sum(
        self, sums: dict[nn.Parameter, Tensor], homes: Parameters, *, noised: bool, noises: int
    ) -> None:
        """Add up the sums of all processes, in place.

        Raises:
            PrivacyError: if another process has failed, or not as many added noise as must.
        """
        counts = self._added([0, int(noised)], [sums[parameter] for parameter in homes])
        self._require_noised(noises, *counts)

    @contextlib.contextmanager
    def _telling(self, tell: Callable[[], Any]) -> Iterator[None]:
        """Tell the others if the block fails, where they will next look for it."""
        try:
            yield
        except Exception as error:
            self._failure = error
            with contextlib.suppress(PrivacyError):  # a process that has gone need not be told
                tell()
            raise

    def _added(self, counts: Sequence[int], tensors: Sequence[Tensor] = ()) -> list[int]:
        """Add up tensors over all processes, in place, and return the sums of counts.

        Every process has the same sums, to the bit: each element is added up once, and the result
        is sent to all.
        """
        total = torch.tensor(counts, dtype=torch.int64, device=self._device)

        def exchange() -> list[int]:
            pending = distributed.all_reduce(total, async_op=True)
            for bucket in _buckets(tensors):
                alone = len(bucket) == 1 and bucket[0].is_contiguous()
                flat = bucket[0] if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
                distributed.all_reduce(flat)
                if not alone:
                    start = 0
                    for tensor in bucket:
                        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
                        start += tensor.numel()
            if pending is not None:
                pending.wait()
            sums: list[int] = total.tolist()
            return sums

        return answered(exchange)

    def fail(self, error: LightningSecureError) -> NoReturn:
        """Raise an error that every process raises."""
        self._failure = error
        raise error

    def leave(self, exception: BaseException) -> None:
        """End the connection if the others do not know of a failure: then they fail as well."""
        known, self._failure = self._failure, None
        if exception is not known and distributed.is_initialized():
            with contextlib.suppress(Exception):
                _disconnect()


def answered(exchange: Callable[[], T]) -> T:
    """Exchange something with the other processes.

    Raises:
        PrivacyError: if a process has gone, or did not answer in time.
        OutOfMemoryError: if this process has no memory for what is exchanged.
    """
    try:
        return exchange()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        failure = type(error).__name__
    # Raised out here: the text of the other one names machines.
    raise PrivacyError(
        f"another process of this run has gone or did not answer in time ({failure}). The step was "
        "not taken; the last checkpoint holds the weights and the account."
    )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(item.nbytes for item in bucket) + tensor.nbytes
        if bucket and (size > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _failed_elsewhere() -> PrivacyError:
    return PrivacyError(
        "another process of this run has failed, so nothing was released here either; its own "
        "message says why. The last checkpoint holds the weights and the account."
    )


@contextlib.contextmanager
def _metrics_of_this_process(model: nn.Module) -> Iterator[None]:
    """Have metrics not wait for those of other processes, which have their own number of chunks."""
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    names = ("dist_sync_on_step", "sync_on_compute", "_to_sync")  # the last is what it goes by
    settings = [{name: getattr(metric, name) for name in names} for metric in metrics]
    try:
        for metric in metrics:
            metric.dist_sync_on_step = metric.sync_on_compute = metric._to_sync = False
        yield
    finally:
        for metric, setting in zip(metrics, settings, strict=True):
            vars(metric).update(setting)


def _disconnect() -> None:
    """End the connections to the other processes, without waiting for them."""
    if distributed.get_backend() == "nccl":
        distributed.distributed_c10d._abort_process_group()
    else:
        distributed.destroy_process_group()
