"""The check that all processes of a private run hold the same rows in the same order.

A process draws from every n-th row *by its number*. If the processes hold other rows under one
number, a row is drawn by several of them or by none, and no account of a run covers that.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.collective import Collective, answered
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.randomness import FreshRandomness
from lightning_secure.strategies.statements import loader_statement, require_same, type_name
from lightning_secure.util.agreement import DescribesRows, Statement, compared, gathered, ranks

log = logging.getLogger(__name__)

#: Tensors of a dataset are compared byte by byte up to this many, about a second of SHA-256.
_MOST_BYTES: Final = 2**30
_MOST_ROWS: Final = 1024
_MOST_FAILURES: Final = 8
_MOST_PARTS: Final = 16
#: So long rows are read; longer, until there are enough, but never beyond the second number.
_SECONDS: Final = (1.0, 5.0)
_ENOUGH: Final = 64
_SAMPLE: Final = 256
#: Two machines may round the same transform in other ways, or decode one picture in two.
_TOLERANCE: Final = 1e-5
_COARSE: Final = 1e-2
_PICTURE: Final = 256
_WEIGHTS: Final = np.random.default_rng(0).standard_normal(1021)
_SEED: Final = 7

Ints = npt.NDArray[np.int64]


class Description(NamedTuple):
    """A dataset's description of its rows.

    Attributes:
        statement: To be compared.
        complete: Whether the rows and their order follow from it.
        indices: A sample of the row numbers that a ``Subset`` holds, drawn by the numbers alone;
            None if there is no ``Subset``.
    """

    statement: Statement
    complete: bool
    indices: frozenset[int] | None


class RowValue(NamedTuple):
    """A value of a row: what must be equal, and a number that may differ a little.

    Attributes:
        tag: Digest of form and exact content.
        sketch: A fixed combination of the numbers in it.
        allowance: By how much that may differ.
    """

    tag: int
    sketch: float
    allowance: float


#: The rows that could be read, in the order of the places; each with None in place of a part that
#: is another one each time. None in place of a row that could not be read.
Rows = list[tuple[RowValue | None, ...] | None]


def require_same_rows(
    collective: Collective, loader: DataLoader[Any], *, begins: bool, config: DPConfig
) -> None:
    """Make sure that all processes hold the same rows in the same order.

    Args:
        collective: Is asked nothing if it is a single process.
        loader: The user's.
        begins: Whether the run's public numbers are yet to be fixed.
        config: May fix them without the loader.

    Raises:
        UnsupportedTrainerOptionError: if the rows, or how the loader batches them, differ.
    """
    if collective.size == 1:
        return
    require_same(collective, lambda: loader_statement(loader, begins=begins, config=config))
    with collective.together():
        described = describe_rows(loader.dataset)
    found = answered(lambda: compared(described.statement))
    if described.complete and not found:
        return
    with collective.together():
        read = read_rows(loader)
    rows = len(loader.dataset)  # type: ignore[arg-type] # require_plain_loader saw to it
    by_rank = answered(lambda: gathered((described.indices, read, rows)))
    indices, reads, counts = zip(*by_rank, strict=True)
    if not found:
        apart, places = rows_apart(reads)
        if apart:
            found = [f"rows of the training dataset ({ranks(apart)} read others than rank 0)"]
        elif not places:
            log.warning(
                "no row of the training dataset could be read twice alike, so the processes "
                "could not compare their rows. The epsilon holds only if each process has the "
                "same rows in the same order."
            )
    if found:
        collective.fail(different_rows(found, split_by_rank(indices, reads, counts)))


def describe_rows(dataset: Dataset[Any], where: str = "the training dataset") -> Description:
    """Return what follows about the rows from the dataset's own description of them.

    Args:
        dataset: Of known length.
        where: Its name in the statement.
    """
    stated: dict[str, str | bytes] = {
        f"number of rows of {where}": str(len(dataset)),  # type: ignore[arg-type]
        f"the class of {where}": type_name(dataset),
    }
    parts: list[tuple[str, Dataset[Any]]] = []
    complete, indices = False, None
    if isinstance(dataset, DescribesRows):
        stated |= {f"{name} of {where}": value for name, value in dataset.rows_statement().items()}
        # A class of the user's own may read them in another order.
        complete = type(dataset).__module__.startswith("lightning_secure.")
    elif isinstance(dataset, Subset):
        numbers = _numbers(dataset.indices)
        complete = numbers is not None and type(dataset) is Subset
        if numbers is not None:
            stated[f"the indices of {where}"] = hashlib.sha256(numbers.tobytes()).digest()
            indices = _sample(numbers)
        parts = [(f"the dataset below {where}", dataset.dataset)]
    elif isinstance(dataset, ConcatDataset):
        complete = type(dataset) is ConcatDataset
        parts = [(f"dataset {i} in {where}", part) for i, part in enumerate(dataset.datasets)]
    elif isinstance(dataset, TensorDataset):
        digest = _of_tensors(dataset.tensors)
        complete = digest is not None and type(dataset) is TensorDataset
        stated[f"the tensors of {where}"] = digest or ", ".join(
            f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in dataset.tensors
        )
    for name, part in parts:
        below = describe_rows(part, name)
        stated |= below.statement
        complete = complete and below.complete
        indices = indices if indices is not None else below.indices
    return Description(stated, complete, indices)


def read_rows(loader: DataLoader[Any]) -> Rows:
    """Read rows at places that follow from their number alone, for a second, at most for five.

    Each row is read twice under the same seed. What differs then comes from a clock or from a
    generator that no seed reaches, and is not compared.

    Args:
        loader: The user's. Rows are read as it reads them, in a worker if it has workers: what a
            dataset opens when it is first read must not be shared with workers that start later.
    """
    begun, failures, rows = time.monotonic(), 0, Rows()
    places = _places(len(loader.dataset))  # type: ignore[arg-type]
    with FreshRandomness(_SEED, stream=3).apart():
        reads = iter(_reader(loader, places))
        for _ in places:
            once, again = (_next(reads) for _ in range(2))
            rows.append(_steady(once, again))
            failures += rows[-1] is None
            limit = _SECONDS[len(rows) < _ENOUGH]
            if failures > _MOST_FAILURES or (len(rows) > 1 and time.monotonic() - begun > limit):
                break
        del reads  # ends the worker
    return rows


def rows_apart(read: Sequence[Rows]) -> tuple[list[int], int]:
    """Return the ranks that read another row than the first one, and how many places count.

    Args:
        read: By each process, at the same places.
    """
    count = min(map(len, read))
    apart = [rank for rank, rows in enumerate(read) if any(map(_differ, read[0][:count], rows))]
    places = zip(*(rows[:count] for rows in read), strict=True)
    compared = sum(any(_steady_parts(rows)) for rows in places)
    return apart, compared


def split_by_rank(
    indices: Sequence[frozenset[int] | None], read: Sequence[Rows], counts: Sequence[int]
) -> bool:
    """Return whether no row of one process is among those of another, as far as can be seen.

    Args:
        indices: Of each process's ``Subset``.
        read: By each process.
        counts: How many rows each process has.
    """
    known = [sample for sample in indices if sample is not None]
    if len(known) == len(indices):
        return _disjoint(known)
    # Only where all rows were read is it known that a row is not among them.
    whole = [len(rows) for rows in read] == list(counts)
    return whole and _disjoint([frozenset(filter(None, rows)) for rows in read])


def different_rows(found: Sequence[str], split: bool) -> UnsupportedTrainerOptionError:
    """Return the error for processes that hold other rows.

    Args:
        found: The differences.
        split: Whether no row of one process is among those of another.
    """
    reason = (
        "No row of one process was found in another, as where data is split by rank beforehand. "
        if split
        else ""
    )
    return UnsupportedTrainerOptionError(
        f"the processes of this run were not given the same rows: {'; '.join(found)}. {reason}"
        "Each process draws from every n-th row by its number, so one row would count several "
        "times in a step, or never. Pass the whole dataset on every rank, in the same order; the "
        "strategy splits it. A random split takes the same seed on every rank, such as "
        "random_split(..., generator=torch.Generator().manual_seed(0)). No step was taken."
    )


def _disjoint(sets: Sequence[frozenset[Any]]) -> bool:
    return sum(map(len, sets)) == len(frozenset().union(*sets))


def _numbers(indices: Any) -> Ints | None:
    try:
        numbers = np.asarray(indices)
    except (TypeError, ValueError, RuntimeError):
        return None
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        return None
    return np.ascontiguousarray(numbers, dtype="<i8")


def _sample(numbers: Ints) -> frozenset[int]:
    """Return the numbers with the smallest hashes, so that two samples of the same set agree."""
    hashes = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    least = min(_SAMPLE, len(hashes))
    return frozenset(np.partition(hashes, least - 1)[:least].tolist() if least else ())


def _of_tensors(tensors: Sequence[Tensor]) -> bytes | None:
    if sum(tensor.nbytes for tensor in tensors) > _MOST_BYTES:
        return None
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized:
            return None
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return sha.digest()


def _places(rows: int) -> list[int]:
    """Return the first and last row and some between, the same in every process."""
    generator = np.random.default_rng(rows)
    if rows <= _MOST_ROWS:
        between = generator.permutation(rows)
    else:
        between = generator.integers(0, rows, _MOST_ROWS)
    return list(dict.fromkeys([0, rows - 1, *between.tolist()])) if rows else []


def _reader(loader: DataLoader[Any], places: Sequence[int]) -> DataLoader[Any]:
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": _Seeded(loader.worker_init_fn),
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=[[place] for place in places for _ in range(2)],
        collate_fn=_parts_then_seed,
        num_workers=min(loader.num_workers, 1),
        generator=torch.Generator(),
        **workers,
    )


class _Seeded:
    """Seeds a worker after the user's own function, as it is seeded after each row."""

    def __init__(self, user: Any) -> None:
        self._user = user

    def __call__(self, worker: int) -> None:
        if self._user is not None:
            self._user(worker)
        _seed()


def _seed() -> None:
    FreshRandomness(_SEED, stream=3).seed_all()


def _parts_then_seed(samples: Any) -> tuple[RowValue, ...]:
    try:
        return _parts(samples[0])
    finally:
        _seed()


def _next(reads: Iterator[Any]) -> tuple[RowValue, ...] | None:
    try:
        parts: tuple[RowValue, ...] = next(reads)
    except Exception:  # noqa: BLE001 # training reports it, where it needs the row
        return None
    return parts


def _steady(
    once: tuple[RowValue, ...] | None, again: tuple[RowValue, ...] | None
) -> tuple[RowValue | None, ...] | None:
    if once is None or again is None or len(once) != len(again):
        return None
    return tuple(a if _alike(a, b) else None for a, b in zip(once, again, strict=True))


def _steady_parts(rows: Sequence[tuple[RowValue | None, ...] | None]) -> Iterator[bool]:
    if all(row is not None for row in rows):
        for parts in zip(*(row for row in rows if row is not None), strict=False):
            yield None not in parts


def _differ(
    one: tuple[RowValue | None, ...] | None, other: tuple[RowValue | None, ...] | None
) -> bool:
    if one is None or other is None:
        return False
    if len(one) != len(other):
        return None not in one and None not in other
    return not all(a is None or b is None or _alike(a, b) for a, b in zip(one, other, strict=True))


def _alike(one: RowValue, other: RowValue) -> bool:
    allowance = max(one.allowance, other.allowance)
    return one.tag == other.tag and abs(one.sketch - other.sketch) <= allowance


def _parts(sample: Any) -> tuple[RowValue, ...]:
    """Return the values of a row; what is beyond the first ones is one value together."""
    parts = list(_values(sample))
    if len(parts) > _MOST_PARTS:
        rest = parts[_MOST_PARTS - 1 :]
        tag = _tag(*(str(part.tag) for part in rest))
        sketch = math.fsum(part.sketch for part in rest)
        parts = [*parts[: _MOST_PARTS - 1], RowValue(tag, sketch, sum(p.allowance for p in rest))]
    return tuple(parts)


def _values(value: Any, depth: int = 8) -> Iterator[RowValue]:
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized:
            value = value.to_dense() if value.layout != torch.strided else value.dequantize()
        coarse = value.dtype in (torch.bfloat16, torch.float16)
        value = value.detach().cpu().resolve_conj().resolve_neg()
        yield _of_array((value.float() if coarse else value).numpy(), coarse=coarse)
    elif isinstance(value, np.ndarray | np.generic):
        yield _of_array(np.asarray(value), coarse=value.dtype == np.float16)
    elif isinstance(value, bool | int | str | bytes | None):
        yield RowValue(_tag(type(value).__name__, value), 0.0, 0.0)
    elif isinstance(value, float | complex):
        yield _of_array(np.asarray(value))
    elif depth == 0:
        yield RowValue(_tag(type_name(value)), 0.0, 0.0)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield RowValue(_tag("key", key if isinstance(key, int | str) else ""), 0.0, 0.0)
            yield from _values(item, depth - 1)
    elif isinstance(value, list | tuple):
        yield RowValue(_tag("items", len(value)), 0.0, 0.0)
        for item in value:
            yield from _values(item, depth - 1)
    elif hasattr(value, "__array_interface__"):  # a picture of PIL's
        yield _of_array(np.asarray(value))
    else:
        yield RowValue(_tag(type_name(value)), 0.0, 0.0)
        if getattr(value, "__dict__", None):
            yield from _values(vars(value), depth - 1)


def _of_array(array: npt.NDArray[Any], *, coarse: bool = False) -> RowValue:
    form: tuple[Any, ...] = (str(array.dtype), array.shape)
    picture = array.dtype == np.uint8 and array.size >= _PICTURE
    if array.dtype.kind not in "fc" and not picture:
        exact = array.tobytes() if array.dtype.kind in "biuSUmM" else b""
        return RowValue(_tag(*form, exact), 0.0, 0.0)
    numbers = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64).reshape(-1)
    numbers = numbers.view(np.float64)
    finite = np.isfinite(numbers)
    if not finite.all():
        form = (*form, np.packbits(finite).tobytes())
        numbers = np.where(finite, numbers, 0.0)
    weighted = numbers * np.resize(_WEIGHTS, numbers.size)
    size = float(np.sqrt(np.square(weighted).sum()))
    tolerance = _COARSE if coarse or picture else _TOLERANCE
    return RowValue(_tag(*form), float(weighted.sum()), tolerance * size)


def _tag(*values: Any) -> int:
    sha = hashlib.sha256()
    for value in values:
        part = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        sha.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(sha.digest()[:8], "little")
