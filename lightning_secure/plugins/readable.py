"""A trial of safe loading on a checkpoint's content, before it is written."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_secure.errors import ConfigError
from lightning_secure.plugins.compact import save_without_data

_HYPERPARAMETERS: Final = {
    "hyper_parameters": "hyperparameter",
    "datamodule_hyper_parameters": "hyperparameter of the datamodule",
    "callbacks": "state of the callback",
}
#: Errors that pickle raises of objects without a form for it.
_UNPICKLABLE: Final = (pickle.PicklingError, TypeError, AttributeError, RecursionError)
#: Types that ``==`` compares as a whole.
_COMPARED: Final = (str, int, float, complex, bytes, bytearray, set, frozenset, type)
#: How torch names what it would import.
_GLOBAL: Final = re.compile(
    r"(?<=GLOBAL )[\w.]+(?= was not an allowed)|(?<=`add_safe_globals`, but got <class ')[\w.]+"
)


# ---------------------------------------------------------------- numbers of numpy


def with_plain_numbers(value: Any, _done: dict[int, Any] | None = None) -> Any:
    """Return a value with numpy's scalars as the Python numbers that equal them.

    Args:
        value: Of its dicts, lists and tuples, those that hold such a scalar are copied; objects of
            other classes stay what they are.

    ``numpy.float64(0.1)`` becomes ``0.1``, ``numpy.bool_`` a bool, ``numpy.str_`` a text. A scalar
    that no Python number equals, such as a long double or a date, stays.

    >>> with_plain_numbers({"lr": np.float32(0.5), "sizes": (np.int64(3), 4)})
    {'lr': 0.5, 'sizes': (3, 4)}
    """
    done = {} if _done is None else _done
    if isinstance(value, np.generic):
        return _plain_number(value)
    kind = type(value)
    if kind not in (dict, OrderedDict, list, tuple):
        return value
    if id(value) in done:
        return done[id(value)]
    if not _has_scalar(value, set()):
        return value
    if kind is tuple:
        return tuple(with_plain_numbers(item, done) for item in value)
    made = done[id(value)] = copy.copy(value)  # with the attributes of an OrderedDict
    made.clear()
    if kind is list:
        made.extend(with_plain_numbers(item, done) for item in value)
    else:
        made.update(
            (with_plain_numbers(key, done), with_plain_numbers(item, done))
            for key, item in value.items()
        )
    return made


def _plain_number(value: np.generic) -> Any:
    plain = value.item()
    if type(plain) not in (bool, int, float, complex, str, bytes):
        return value
    same = bool(plain == value) or (plain != plain and value != value)
    return plain if same and value.dtype.kind in "biufcSU" else value


def _has_scalar(value: Any, seen: set[int]) -> bool:
    if isinstance(value, np.generic):
        return True
    kind = type(value)
    if kind not in (dict, OrderedDict, list, tuple) or id(value) in seen:
        return False
    seen.add(id(value))
    items = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return any(_has_scalar(item, seen) for item in items)


# ---------------------------------------------------------------- the trial


def require_readable(
    checkpoint: Mapping[str, Any], *, safe_globals: Sequence[Any], planned: bool = False
) -> None:
    """Write a checkpoint into memory, without the data of large tensors, and read it back.

    Args:
        checkpoint: What is to be written.
        safe_globals: Classes that reading will allow, too.
        planned: Whether nothing is written now. An error that an object's own code raises while it
            is serialised is a ConfigError then, and otherwise raised as it is.

    Raises:
        ConfigError: if safe loading refuses the checkpoint, or gives back something else. The error
            names the hyperparameter, and the classes that are missing.
    """
    if _problem(checkpoint, safe_globals, planned) is None:
        return
    where, found = _place(checkpoint, safe_globals, planned)
    raise ConfigError(
        f"the checkpoint would hold {found.what}: {where} could be written and never read again, "
        f"so nothing was written. {found.instead} If it is a hyperparameter, "
        "save_hyperparameters(ignore=[...]) leaves it out."
    )


class _Problem(NamedTuple):
    """Why a value could not be read back.

    Attributes:
        what: The content at fault, and what safe loading does with it.
        instead: The way on.
    """

    what: str
    instead: str = "Give plain values, such as a list or a dict."


def _problem(value: Any, safe_globals: Sequence[Any], planned: bool) -> _Problem | None:
    """Return why a value could not be read back, or None."""
    buffer = io.BytesIO()
    failed = ""
    try:
        save_without_data(value, buffer)
    except Exception as error:
        if not planned and not isinstance(error, _UNPICKLABLE):
            raise
        failed = type(error).__name__
    if failed:
        return _Problem(f"{_kinds(value)}, which cannot be serialised ({failed})")
    buffer.seek(0)
    missing: list[str] = []
    loaded = None
    with torch.serialization.safe_globals(list(safe_globals)):
        try:
            missing = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
            buffer.seek(0)
            if not missing:
                loaded = torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 # so may its unpickling
            failed = type(error).__name__
            missing = _GLOBAL.findall(str(error))  # classes that are not written by name
    if missing:
        return _Problem(
            f"{', '.join(sorted(missing))}, which safe loading refuses",
            "If it is a plain data class, pass EncryptedCheckpointIO(safe_globals=[...]).",
        )
    if failed:
        return _Problem(
            f"{_kinds(value)}, which safe loading cannot build again, whatever safe_globals names"
        )
    if not _same(value, loaded, {}):
        return _Problem(f"{_kinds(value)}, of which safe loading would make something else")
    return None


def _place(
    checkpoint: Mapping[str, Any], safe_globals: Sequence[Any], planned: bool
) -> tuple[str, _Problem]:
    """Return the name of the first entry that cannot be read back, and why."""
    for key, value in checkpoint.items():
        if (found := _problem(value, safe_globals, planned)) is None:
            continue
        if key in _HYPERPARAMETERS and isinstance(value, dict):
            for name, item in value.items():
                if (inner := _problem(item, safe_globals, planned)) is not None:
                    return f"{_HYPERPARAMETERS[key]} {_shown(name)}", inner
        return f"its entry {_shown(key)}", found
    return "it", _Problem("what safe loading does not give back as it is")


def _shown(name: Any) -> str:
    return repr(name) if isinstance(name, str) else f"of type {type(name).__name__}"


def _kinds(value: Any) -> str:
    """Return the names of the classes in a value that are not plain."""
    kinds: set[str] = set()
    left: list[Any] = [value]
    seen: set[int] = set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        kind = type(part)
        if kind in (dict, OrderedDict):
            left += [*part.keys(), *part.values()]
        elif kind in (list, tuple, set):
            left += part
        elif not isinstance(part, str | int | float | complex | bytes | Tensor | None):
            kinds.add(f"{kind.__module__}.{kind.__qualname__}")
    return ", ".join(sorted(kinds)) or "such a value"


def _same(given: Any, loaded: Any, seen: dict[int, Any]) -> bool:
    """Whether a value came back as it was, as far as its parts and ``==`` tell.

    Args:
        given: What was written.
        loaded: What was read.
        seen: Parts by their id. It holds them, so that no other object gets the id of one.
    """
    if isinstance(given, Tensor) and isinstance(loaded, Tensor):
        return given.shape == loaded.shape and given.dtype == loaded.dtype
    if torch.is_storage(given):
        return torch.is_storage(loaded)
    if type(given) is not type(loaded):
        return False
    if id(given) in seen:
        return True
    seen[id(given)] = given
    if isinstance(given, dict):
        return _same([*given.items()], [*loaded.items()], seen)
    if isinstance(given, list | tuple):
        return len(given) == len(loaded) and all(
            _same(one, other, seen) for one, other in zip(given, loaded, strict=True)
        )
    same: bool | None = None
    try:
        same = bool(given == loaded) or bool(given != given)
    except Exception:  # noqa: BLE001 # of an array, the comparison is an array
        same = None
    if same or isinstance(given, _COMPARED):
        return same is not False
    # Objects in it may know no other equality than identity.
    if fields := _fields(given):
        return _same(fields, _fields(loaded), seen)
    equality: Any = type(given).__eq__
    return same is None or equality is object.__eq__


def _fields(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, also those in slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    inside = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return {**inside, **getattr(value, "__dict__", {})}


def _slots(kind: type[Any]) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


# ---------------------------------------------------------------- before the first step


def planned_hyperparameters(strategy: Strategy, target: Any) -> dict[str, Any]:
    """Return the hyperparameters that a fit's checkpoints would bring to ``target``.

    They are none where no callback writes checkpoints, or where a hook of the module, the
    datamodule or a callback may still change them: the save tells then.

    Args:
        strategy: The Trainer's.
        target: A CheckpointIO of its chain; those around it are asked what they make of them.

    Raises:
        ConfigError: if AsyncCheckpointIO is among them and cannot copy a hyperparameter.
    """
    module = getattr(strategy, "lightning_module", None)
    trainer = getattr(module, "_trainer", None)
    if module is None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return {}
    hooked = (module, getattr(trainer, "datamodule", None), *trainer.callbacks)
    if not trainer.checkpoint_callbacks or any(map(_changes_checkpoints, hooked)):
        return {}
    planned: dict[str, Any] = {
        one.CHECKPOINT_HYPER_PARAMS_KEY: one.hparams  # a container of OmegaConf is written as such
        if type(one.hparams).__module__.startswith("omegaconf.")
        else dict(one.hparams)
        for one in (module, getattr(trainer, "datamodule", None))
        if one is not None and one.hparams
    }
    outer: Any = strategy.checkpoint_io
    while outer is not None and outer is not target:
        if isinstance(outer, AsyncCheckpointIO):
            _require_copied(planned)
        prepared = getattr(outer, "prepared", None)
        if prepared is not None:
            planned = prepared(planned)
        outer = getattr(outer, "checkpoint_io", None)
    return planned


def _changes_checkpoints(one: Any) -> bool:
    """Whether a hook of the user's own gets each checkpoint before it is saved."""
    hook = getattr(type(one), "on_save_checkpoint", None)
    library = getattr(hook, "__module__", "lightning").partition(".")[0]
    return library not in ("lightning", "lightning_secure")


def _require_copied(planned: Mapping[str, Any]) -> None:
    for key, values in planned.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            failed = False
            try:
                apply_to_collection(value, Tensor, lambda tensor: tensor)
            except Exception:  # noqa: BLE001 # whatever an object's own copying raises
                failed = True
            if failed:
                raise ConfigError(
                    f"{_HYPERPARAMETERS.get(key, 'entry')} {_shown(name)}: Lightning's "
                    f"AsyncCheckpointIO cannot copy {_kinds(value)}, and every save would fail. "
                    "Leave AsyncCheckpointIO out, or give plain values. Nothing was trained."
                )


def require_waited_for(strategy: Strategy) -> None:
    """Refuse an AsyncCheckpointIO around another one, if nothing between them waits.

    Args:
        strategy: The Trainer's, once a run is set up.

    Raises:
        ConfigError: if the outer one would end a run without waiting for the inner one.
    """
    if getattr(strategy, "lightning_module", None) is None:
        return
    outer: Any = strategy.checkpoint_io
    while (inner := getattr(outer, "checkpoint_io", None)) is not None:
        if isinstance(outer, AsyncCheckpointIO) and isinstance(inner, AsyncCheckpointIO):
            raise ConfigError(
                "AsyncCheckpointIO around AsyncCheckpointIO: Lightning does not wait for the inner "
                "one at the end of a run, and its last checkpoint and error would be lost. Leave "
                "one of them out. Nothing was written."
            )
        outer = inner
