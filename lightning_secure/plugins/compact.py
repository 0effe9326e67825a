"""``torch.save`` of what an object names, and not of the memory around it.

A tensor can be a view of much more memory, and torch writes all of that: one row that a module
keeps of a batch would take every row of its window into the checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import IO, Any, Final

import torch
from torch import Tensor

_PROTOCOL: Final = 2  # of torch.save
#: A multiple of the size of every dtype's elements, in bytes.
_ALIGNED: Final = 16
#: Smaller tensors keep their data, which some objects need when they are read, within a total.
_SMALL_BYTES: Final = 65536
_TOTAL_BYTES: Final = 1 << 20
#: Tensors of bytes that are smaller always do: the state of a generator is not read back of zeros.
_STATE_BYTES: Final = 8192


def save_named(value: Any, file: IO[bytes]) -> None:
    """Write what ``torch.save`` writes, without bytes that no tensor in ``value`` looks at.

    Args:
        value: What to write.
        file: Where to.

    Guarantees:
        Of a memory that is larger than the tensors over it, each stretch that tensors share goes
        into a copy of its own, with zeros where none of them looks. So tensors that share elements,
        such as tied weights, share them after loading; quantised ones and conjugate or negative
        views may not, where they are copied. Memory that is named as a whole is not copied, which
        is so for all that a model usually has: beyond it, there is memory for the copies only, none
        larger than what it is a copy of. A storage that stands there by itself is named as a whole.
    """
    survey = _Survey()
    survey.dump(value)
    copies = {
        place: copy for views in survey.views.values() for place, copy in _copies(list(views))
    }
    _save(value, file, lambda tensor: _own_memory(tensor, copies))


def save_without_data(value: Any, file: IO[bytes]) -> None:
    """Write what :func:`save_named` writes, with zeros in the place of large tensors.

    Args:
        value: What to write.
        file: Where to.

    Guarantees:
        Each tensor keeps its class, dtype, shape and attributes. Tensors of up to 64 KiB keep
        their data until 1 MiB is full, and those of bytes always up to 8 KiB. Only storages that
        stand by themselves and tensors of unusual layouts are written whole.
    """
    _save(value, file, _StandIns())


def _save(value: Any, file: IO[bytes], replaced: Callable[[Tensor], Tensor | None]) -> None:
    module: Any = SimpleNamespace(__name__="pickle", Pickler=_pickler(replaced))
    torch.save(value, file, pickle_module=module, pickle_protocol=_PROTOCOL)


def _own_memory(tensor: Tensor, copies: dict[tuple[Any, ...], Tensor]) -> Tensor | None:
    if _lazy(tensor):
        return tensor.resolve_conj().resolve_neg()
    copy = copies.get(_place(tensor))
    return None if copy is None else copy.detach().requires_grad_(tensor.requires_grad)


class _StandIns:
    """Gives zeros for tensors that take too much."""

    def __init__(self) -> None:
        self._left = _TOTAL_BYTES

    def __call__(self, tensor: Tensor) -> Tensor | None:
        if tensor.device.type == "cpu" and self._keeps(tensor):
            return tensor.resolve_conj().resolve_neg() if _lazy(tensor) else None
        zero = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        return zero.requires_grad_(tensor.requires_grad)

    def _keeps(self, tensor: Tensor) -> bool:
        size = tensor.untyped_storage().nbytes()
        if tensor.dtype is torch.uint8 and size <= _STATE_BYTES:
            return True
        kept = size <= min(_SMALL_BYTES, self._left)
        self._left -= size if kept else 0
        return kept


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors have in common that look at the same elements in the same way."""
    where = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return (*where, tensor.dtype, tuple(tensor.shape), tensor.stride())


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Survey(pickle.Pickler):
    """Finds each tensor that would be written, by the way that it would be."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=_PROTOCOL)
        self.views: dict[int, list[Tensor]] = {}  # also keeps the memory from being another's

    def persistent_id(self, value: Any) -> str | None:
        storage = isinstance(value, torch.storage.TypedStorage) or torch.is_storage(value)
        return "" if storage else None

    def reducer_override(self, value: Any) -> Any:
        tensor = _in_memory(value)
        if tensor is not None and not _lazy(tensor):
            self.views.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        return NotImplemented


def _pickler(replaced: Callable[[Tensor], Tensor | None]) -> type[pickle.Pickler]:
    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            tensor = _in_memory(value)
            if tensor is None:
                return _reduced(value.clone()) if _part_of_quantised(value) else NotImplemented
            if (own := replaced(tensor)) is None:
                return NotImplemented
            if type(value) is Tensor:
                vars(own).update(vars(value))
                return _reduced(own)
            rebuild, (_, kind, _, state) = _reduced(value)
            func, arguments = _reduced(own)
            return rebuild, (func, kind, arguments, state)

    return Pickler


def _reduced(tensor: Any) -> Any:
    return tensor.__reduce_ex__(_PROTOCOL)


def _in_memory(value: Any) -> Tensor | None:
    """Return a tensor that is written as a part of its memory, without a class of its own."""
    # Parameters, sparse tensors and other kinds are written by way of such as these.
    if (
        not isinstance(value, Tensor)
        or type(value).__reduce_ex__ is not Tensor.__reduce_ex__
        or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        tensor = value if type(value) is Tensor else value.as_subclass(Tensor)
    special = tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta"
    return None if special or tensor.layout is not torch.strided else tensor


def _part_of_quantised(value: Any) -> bool:
    if type(value) is not Tensor or not value.is_quantized:
        return False
    return value.untyped_storage().nbytes() > value.nbytes


def _lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of its memory that a tensor looks at, and the one after the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * int(stride) for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + length * tensor.element_size()


def _unexpanded(tensor: Tensor) -> Tensor:
    """Return the tensor with each element once, where it was expanded."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _dense(tensor: Tensor) -> bool:
    """Whether the tensor looks at each byte of its span."""
    expected = 1
    inner = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in inner if stride and size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _copies(views: list[Tensor]) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Return copies by place, if the views do not name the whole of their memory."""
    end = 0
    for start, stop in sorted(_span(view) for view in views if _dense(view)):
        if start > end:
            break
        end = max(end, stop)
    if end >= views[0].untyped_storage().nbytes():
        return
    places = {_place(view): view.detach() for view in views}
    stretch: dict[tuple[Any, ...], Tensor] = {}
    end = 0
    for place, view in sorted(places.items(), key=lambda item: _span(item[1])):
        start, stop = _span(view)
        if stretch and start >= end:
            yield from _copied(stretch)
            stretch = {}
        stretch[place] = view
        end = max(end, stop)
    yield from _copied(stretch)


def _copied(stretch: dict[tuple[Any, ...], Tensor]) -> Iterable[tuple[tuple[Any, ...], Tensor]]:
    """Copy views that share elements into memory of their own."""
    spans = [_span(view) for view in stretch.values()]
    if len(stretch) == 1:
        ((place, view),) = stretch.items()
        alone = _unexpanded(view)
        if alone.nbytes <= spans[0][1] - spans[0][0]:  # sliding windows have more than they span
            own = alone.clone(memory_format=torch.contiguous_format)
            return [(place, own.expand(view.shape))]
    first = spans[0][0] - spans[0][0] % _ALIGNED
    length = max(stop for _, stop in spans) - first
    device = next(iter(stretch.values())).device
    memory = torch.zeros(length, dtype=torch.uint8, device=device).untyped_storage()
    moved = {place: _moved(view, memory, first) for place, view in stretch.items()}
    for place, view in stretch.items():
        _unexpanded(moved[place]).copy_(_unexpanded(view))
    return moved.items()


def _moved(view: Tensor, memory: torch.UntypedStorage, first: int) -> Tensor:
    offset = view.storage_offset() - first // view.element_size()
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(memory, offset, view.shape, view.stride())
