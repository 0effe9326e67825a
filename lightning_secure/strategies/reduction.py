"""Sums over several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, distributed

from lightning_secure.errors import PrivacyError

T = TypeVar("T")

#: Smaller tensors travel together up to this many bytes; larger ones are added up where they are.
_BUCKET_BYTES: Final = 32 * 2**20


def add_over_processes(
    tensors: Sequence[Tensor], counts: Sequence[int], *, device: torch.device
) -> list[int]:
    """Add up tensors over all processes, in place, and small counts with them.

    Args:
        tensors: In each process as many, of the same shapes and types.
        counts: Whole numbers, as many in each process.
        device: Of the tensors.

    Returns:
        The sums of the counts.

    Raises:
        PrivacyError: if another process has gone, or did not answer in time.

    Guarantees:
        Every process has the same sums, to the bit: each element is added up once, and what comes
        of it is sent to all.
    """
    total = torch.tensor(counts, dtype=torch.int64, device=device)

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
        _finished(pending)
        sums: list[int] = total.tolist()
        return sums

    return answered(exchange)


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


def _finished(work: Any) -> None:
    if work is not None:
        work.wait()
