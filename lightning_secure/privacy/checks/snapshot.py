"""Snapshots around trial runs: restoring the state, and comparing what a checkpoint would hold."""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import random
import sys
import weakref
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import date, datetime, timedelta
from enum import Enum
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN: Final = (*_ATOMS, list, tuple, dict, set, deque, bytearray, np.ndarray, Tensor)
_UNCHANGING: Final = frozenset({*_ATOMS, range, slice, datetime, date, timedelta})
#: What pickle writes the name of, or nothing at all.
_REFERRED_TO: Final = (type, FunctionType, BuiltinFunctionType, ModuleType, weakref.ref)
#: Stands in names for parts that have none of their own.
MADE_OF: Final = "()"
_INTERNALS: Final = frozenset(vars(nn.Module()))

Restore = Callable[[], Any]


class Stateful(Protocol):
    """An optimizer or a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take that back."""


class Kept:
    """Copies of the tensors of a model and its optimizers.

    What a checkpoint would hold are, mostly, the same tensors under other names. They take as much
    memory as the model does, and are copied once.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, tuple[Tensor, Tensor]] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, and keep the copy for :meth:`of`."""
        copy = _clone(tensor)
        # Held, so that no other one comes to lie in its place.
        self._copies[_place(tensor)] = tensor, copy
        return copy

    def of(self, tensor: Tensor) -> Tensor:
        """Return the copy of a tensor that was added, and a new one of any other."""
        known = self._copies.get(_place(tensor))
        return _clone(tensor) if known is None else known[1]


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _place(tensor: Tensor) -> Any:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def return_freed_memory() -> None:
    """Return to the system what was freed, of which glibc keeps most if it lies in between."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def preserved(model: nn.Module, stateful: Iterable[Stateful] = ()) -> Iterator[Kept]:
    """Put back, after the block, what it changes; inside, the copies that were made for that.

    Args:
        model: Its weights, buffers and gradients are put back, and of its modules' attributes
            numbers, texts, tensors, arrays, and lists, tuples, dicts, sets and deques of them,
            nested or not; so are the states of metrics, which are such attributes. Collections are
            put back in place, since others may hold them too. Objects of other classes are not.
        stateful: Their states are put back if they have changed.

    The global random states of Python, NumPy and torch are put back as well.
    """
    kept = Kept()
    tensors = [(t, kept.add(t)) for t in (*model.parameters(), *model.buffers())]
    restore_attributes = remembered_attributes(model.modules())
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    states = [(item, copied(item.state_dict(), kept.add)) for item in stateful]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield kept
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
            with torch.no_grad():
                for tensor, saved in tensors:
                    tensor.copy_(saved)
            restore_attributes()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for item, state in states:
                if difference(state, copied(item.state_dict(), Tensor.detach)) is not None:
                    item.load_state_dict(state)


def remembered_attributes(
    modules: Iterable[nn.Module], *, apart_from: Container[str] = _INTERNALS
) -> Callable[[], None]:
    """Return what puts attributes of some modules back as they are now, and removes new ones.

    Args:
        modules: Not their children. Of their attributes those are meant that :func:`preserved`
            names: what a training step may count or collect in.
        apart_from: Names of attributes that are left alone.
    """
    modules = list(modules)
    memo: dict[int, Restore] = {}
    attributes = [
        {name: _remembered(value, memo) for name, value in _attributes(module, apart_from)}
        for module in modules
    ]

    def restore() -> None:
        for module, known in zip(modules, attributes, strict=True):
            for name, _ in list(_attributes(module, apart_from)):
                if name not in known:
                    del vars(module)[name]
        for module, known in zip(modules, attributes, strict=True):
            vars(module).update({name: value() for name, value in known.items()})

    return restore


def _attributes(module: nn.Module, apart_from: Container[str]) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if isinstance(value, _PLAIN) and name not in apart_from:
            yield name, value


def _remembered(value: Any, memo: dict[int, Restore]) -> Restore:
    """Return what gives the value as it is now; what is shared stays shared.

    Args:
        value: Collections are given back themselves, with their old content.
        memo: What was remembered already, by id.
    """
    if isinstance(value, _ATOMS) or not isinstance(value, _PLAIN):
        return lambda: value
    if id(value) not in memo:
        # A collection may hold itself: what asks for it meanwhile gets it as it is.
        memo[id(value)] = lambda: value
        memo[id(value)] = _once(_restore_of(value, memo))
    return memo[id(value)]


def _once(restore: Restore) -> Restore:
    done: list[Any] = []

    def call() -> Any:
        if not done:
            done.append(restore())
        return done[0]

    return call


def _restore_of(value: Any, memo: dict[int, Restore]) -> Restore:
    if isinstance(value, Tensor):
        saved = _clone(value)
        return lambda: _recopied(value, saved)
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: _refilled(value, array)
    if isinstance(value, dict):
        entries = {key: _remembered(item, memo) for key, item in value.items()}
        return lambda: _filled(value, {key: item() for key, item in entries.items()})
    if isinstance(value, set | bytearray):
        content = value.copy()
        return lambda: _filled(value, content)
    if all(type(item) in _ATOMS for item in value):
        # Not one function an item: this may be a long list.
        old = list(value)
        return lambda: _filled(value, old)
    items = [_remembered(item, memo) for item in value]
    return lambda: _filled(value, [item() for item in items])


def _filled(value: Any, content: Any) -> Any:
    """Give a collection its old content in place, or make a tuple of it."""
    if isinstance(value, tuple):
        if all(a is b for a, b in zip(value, content, strict=True)):
            return value
        return value._make(content) if hasattr(value, "_make") else type(value)(content)
    if isinstance(value, list | bytearray):
        value[:] = content
    elif isinstance(value, dict | set):
        value.clear()
        value.update(content)
    else:
        value.clear()
        value.extend(content)
    return value


def _refilled(value: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if value.shape != content.shape or not value.flags.writeable:
        return content
    value[...] = content
    return value


def _recopied(value: Tensor, content: Tensor) -> Tensor:
    """Give a tensor its old content in place: it may be a parameter in a list, for example."""
    if value.shape != content.shape or value.is_inference():
        return content
    if not torch.equal(value, content):
        value.detach().copy_(content)
    return value


def copied(
    value: Any, tensor: Callable[[Tensor], Tensor] = _clone, memo: dict[int, Any] | None = None
) -> Any:
    """Return a value in a form that later changes do not reach, for :func:`difference`.

    Args:
        value: Tensors, arrays, collections, and objects, of which all is taken that pickle would
            write, whether they have attributes or not.
        tensor: Copies a tensor. ``Tensor.detach`` will do for a value that is compared at once.
        memo: What was copied already, by id; a value may hold itself.
    """
    memo = {} if memo is None else memo
    if type(value) in _UNCHANGING or isinstance(value, Enum):
        return value
    if id(value) in memo:
        return memo[id(value)][0]
    memo[id(value)] = ("...", value)  # held, so that no other value takes over its id
    result = _copied(value, tensor, memo)
    memo[id(value)] = (result, value)
    return result


def uncopied(value: Any) -> Any:
    """Return a value in the form of :func:`copied`, to be compared at once: tensors are shared."""
    return copied(value, Tensor.detach)


def _copied(value: Any, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.copy()
    if isinstance(value, np.generic) and not isinstance(value, np.void):
        item = value.item()  # a longdouble gives itself
        return value if type(item) is type(value) else copied(item, tensor, memo)
    if isinstance(value, nn.Module):
        return copied(_content(value), tensor, memo)
    if isinstance(value, _REFERRED_TO) or type(value) is object:
        return value
    if isinstance(value, dict):
        items = {key: copied(item, tensor, memo) for key, item in value.items()}
        return {**items, **_attributes_of(value, tensor, memo)}
    if isinstance(value, list | tuple | deque):
        found = [copied(item, tensor, memo) for item in value]
        attributes = _attributes_of(value, tensor, memo)
        return [*found, attributes] if attributes else found
    if type(value) in (set, frozenset):
        # As good as sorted, in both copies alike.
        return sorted((copied(item, tensor, memo) for item in value), key=repr)
    if type(value) is bytearray:
        return bytes(value)
    return _pickled(value, tensor, memo)


def _content(module: nn.Module) -> dict[str, Any]:
    """Return what a pickle holds of a module, without hooks, which are ours.

    A pickle holds all buffers, also those that ``state_dict`` leaves out.
    """
    state: Any = getattr(module, "__getstate__", lambda: vars(module))()
    own = {name: item for name, item in dict(state or {}).items() if name not in _INTERNALS}
    children = {name: _content(child) for name, child in module.named_children()}
    buffers = dict(module.named_buffers(recurse=False))
    return {**own, **buffers, **dict(module.state_dict()), **children}


def _attributes_of(
    value: Any, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]
) -> dict[str, Any]:
    """Return what a collection of a class of its own has besides its items."""
    own = getattr(value, "__dict__", None)
    return {name: copied(item, tensor, memo) for name, item in own.items()} if own else {}


def _pickled(value: Any, tensor: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Any:
    """Return what pickle would write of an object, part by part.

    What it cannot write stands in no checkpoint, and is compared by identity.
    """
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        written: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception:  # noqa: BLE001 # whatever the object raises, pickle would end with it
        known = getattr(value, "__dict__", None)
        return value if known is None else copied(dict(known), tensor, memo)
    if isinstance(written, str):
        return value  # by its name
    function, arguments, state, items, pairs = (*written, None, None, None)[:5]
    # By their names where pickle has names; those of what it is made of are left out of errors.
    states = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    parts: dict[str, Any] = {}
    for part in states:
        named = isinstance(part, dict) and all(isinstance(key, str) for key in part)
        parts |= part if named else {MADE_OF: [*parts.pop(MADE_OF, []), part]}
    made_of = [function, list(arguments), list(items or ()), list(pairs or ())]
    return copied({**parts, MADE_OF: [*parts.pop(MADE_OF, []), *made_of]}, tensor, memo)


def difference(before: Any, after: Any) -> str | None:
    """Return where two copies differ first, as a dotted name; None if they are alike.

    Args:
        before: Made by :func:`copied`.
        after: The same, later.
    """
    return next((name for name, _, _ in differences(before, after)), None)


def differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two copies differ, as a dotted name, and what is there in both.

    Keys that are new may be a row's values: they are no part of a name, but for those that a hook
    has given to the checkpoint or its hyperparameters.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        # Missing ones differ from everything, None included.
        missing = object()
        for key in [*before, *(key for key in after if key not in before)]:
            named = key in before or name in ("", "hyper_parameters")
            inner = ".".join(filter(None, (name, str(key)))) if named else name
            yield from differences(before.get(key, missing), after.get(key, missing), inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{name}.{place}" if name else str(place))
    elif not _same(before, after):
        yield name, before, after


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that is sharded, and others as they are.

    To compare all of it would take the other processes, which may be elsewhere.
    """
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, Tensor):
        before, after = local_part(before), local_part(after)
        alike = before.shape == after.shape and before.dtype == after.dtype
        if not alike:
            return False
        return torch.equal(before, after) or (
            before.is_floating_point()
            and torch.allclose(before, after, rtol=0, atol=0, equal_nan=True)
        )
    if isinstance(before, np.ndarray):
        kind = before.dtype.kind in "fc"
        return before.shape == after.shape and np.array_equal(before, after, equal_nan=kind)
    if isinstance(before, float) and before != before and after != after:
        return True
    return bool(before == after)
