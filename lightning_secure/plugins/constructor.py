"""Arguments with which a module is made anew of a checkpoint that runs no code.

Lightning hands the hyperparameters of a checkpoint that LightningCLI wrote to jsonargparse, which
imports and calls what ``class_path`` and texts in the place of functions name. Here the class is
the caller's, and its constructor is called with values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from lightning_secure.errors import ConfigError, IntegrityError

#: Where Lightning looks for hyperparameters besides the class's own key.
_PAST_KEYS: Final = ("hparams", "module_arguments")
_INSTANTIATOR: Final = "_instantiator"
_CLASS_PATH: Final = "_class_path"
#: A resolver, which OmegaConf calls when such a text is read; its name may be interpolated too.
_RESOLVER: Final = re.compile(r"\$\{.*:", re.DOTALL)
_NAME: Final = re.compile(r"[\w.]{1,200}")
_PLAIN: Final = (type(None), bool, int, float, str)


def constructor_arguments(
    kind: type[Any], checkpoint: Any, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments for ``kind.load_from_checkpoint``.

    Args:
        kind: The caller's class.
        checkpoint: The checkpoint, whose tensors may be fake.
        given: The caller's hyperparameters. They replace those of the checkpoint.

    Returns:
        ``given``, and what keeps Lightning from calling what the checkpoint names.

    Raises:
        IntegrityError: if the checkpoint is not one of a Trainer, or asks for a call. The text is
            the reason only.
        ConfigError: if the caller must give another class, or a hyperparameter that the checkpoint
            holds by name only.

    Guarantees:
        ``load_from_checkpoint`` with these arguments imports nothing and calls nothing that the
        checkpoint names. The constructor of ``kind`` gets the hyperparameters as values.
    """
    values = _hyperparameters(kind, checkpoint)
    parameters = inspect.signature(kind.__init__).parameters
    from_cli = _INSTANTIATOR in values
    if from_cli:
        _require_class(kind, values.get(_CLASS_PATH), parameters)
    name = checkpoint.get(kind.CHECKPOINT_HYPER_PARAMS_NAME)
    if isinstance(name, str) and name in parameters:
        values = {name: values}
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    missing = {
        name: value
        for name, value in values.items()
        if name not in given
        and name not in (_INSTANTIATOR, _CLASS_PATH)
        and (takes_all or name in parameters)
    }
    named = sorted(str(name) for name, value in missing.items() if _names_class(value))
    if named:
        raise _to_be_given(kind, named)
    if not from_cli:
        return dict(given)
    return {_INSTANTIATOR: None, **_converted(kind, missing, parameters), **given}


def _hyperparameters(kind: type[Any], checkpoint: Any) -> dict[Any, Any]:
    """Return all hyperparameters that Lightning would use, as plain values."""
    version = checkpoint.get("pytorch-lightning_version") if isinstance(checkpoint, dict) else None
    if not _is_version(version):
        raise IntegrityError(
            "it does not name the version of Lightning that wrote it, so it is not a Trainer's"
        )
    made = checkpoint.get(kind.CHECKPOINT_HYPER_PARAMS_TYPE)
    omegaconf = sys.modules.get("omegaconf")
    container = getattr(omegaconf, "DictConfig", None)
    if not (made is None or isinstance(made, str) or (container is not None and made is container)):
        raise IntegrityError("it asks to call something with its hyperparameters (hparams_type)")
    values: dict[Any, Any] = {}
    for key in (*_PAST_KEYS, kind.CHECKPOINT_HYPER_PARAMS_KEY):
        part = checkpoint.get(key, {})
        if not isinstance(part, Mapping):
            raise IntegrityError(f"its {key!r} is no mapping of names to values")
        values.update(_raw(part))
    interpolated = made is container is not None or any(map(_is_config, _parts(checkpoint)))
    if interpolated and any(isinstance(one, str) and _RESOLVER.search(one) for one in _all(values)):
        raise IntegrityError(
            "a hyperparameter names an OmegaConf resolver, which would be called when it is read. "
            "Resolve the configuration before it is saved, with OmegaConf.resolve(config)"
        )
    return values


def _is_version(value: Any) -> bool:
    try:
        return isinstance(value, str) and Version(value) is not None
    except InvalidVersion:
        return False


def _is_config(value: Any) -> bool:
    omegaconf = sys.modules.get("omegaconf")
    return omegaconf is not None and isinstance(value, omegaconf.Container)


def _raw(value: Any) -> Any:
    """Return a value with OmegaConf's containers as plain ones, of which nothing is resolved."""
    if _is_config(value):
        return sys.modules["omegaconf"].OmegaConf.to_container(value, resolve=False)
    return value


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and everything in its plain containers, each container once."""
    seen: set[int] = set()
    left = [value]
    while left:
        part = left.pop()
        yield part
        if isinstance(part, dict | list | tuple | set | frozenset) and id(part) not in seen:
            seen.add(id(part))
            left += [*part, *part.values()] if isinstance(part, dict) else part


def _all(value: Any) -> Iterator[Any]:
    """Yield a value and everything in it, also in containers of OmegaConf."""
    for part in _parts(value):
        if _is_config(part):
            yield from _parts(_raw(part))
        else:
            yield part


def _names_class(value: Any) -> bool:
    return any(isinstance(part, dict) and "class_path" in part for part in _all(value))


def _require_class(kind: type[Any], path: Any, parameters: Mapping[str, Any]) -> None:
    if path is None:
        return
    if not isinstance(path, str) or path.rpartition(".")[2] != kind.__name__:
        shown = repr(path) if isinstance(path, str) and _NAME.fullmatch(path) else "another one"
        raise ConfigError(
            f"the checkpoint was written for the class {shown}, and {kind.__name__} was given. A "
            "checkpoint does not choose a class here: give that class. Nothing was loaded."
        )
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise ConfigError(
            f"{kind.__name__} takes any keyword, so {_CLASS_PATH!r}, which LightningCLI has put "
            "among the hyperparameters, would be given to it. Nothing was loaded. Make the module, "
            "and load 'state_dict' of EncryptedCheckpointIO(keys).load_checkpoint(path) into it."
        )


def _to_be_given(kind: type[Any], names: list[str]) -> ConfigError:
    listed = ", ".join(repr(name) for name in names if _NAME.fullmatch(name)) or "one"
    return ConfigError(
        f"the checkpoint names what the hyperparameters of {kind.__name__} are to be made of: "
        f"{listed}. A checkpoint's names are neither imported nor called. Nothing was loaded. Give "
        "each of them as an object: load_encrypted_checkpoint(..., NAME=OBJECT)."
    )


# ---------------------------------------------------------------- what LightningCLI wrote as text


def _converted(
    kind: type[Any], values: Mapping[str, Any], parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those hyperparameters that the class takes as something else than YAML has."""
    try:
        hints = typing.get_type_hints(kind.__init__)
    except Exception:  # noqa: BLE001 # names that are known to type checkers only
        hints = {}
    converted, named, refused = {}, [], []
    for name, value in values.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if isinstance(value, str) and value == _import_path(default):
            converted[name] = default
            continue
        if type(value) is type(default) and value == default:  # as None for what is no Optional
            continue
        try:
            fitted = _fitted(hints.get(name, Any), value)
        except _RefusedError:
            refused.append(name)
            continue
        except (_UnfitError, TypeError):  # a protocol may know no instances
            named.append(name)
            continue
        if fitted is not value:
            converted[name] = fitted
    if named:
        raise _to_be_given(kind, sorted(named))
    if refused:
        raise ConfigError(
            f"the classes of the hyperparameters {', '.join(map(repr, sorted(refused)))} of "
            f"{kind.__name__} refused the values in the checkpoint. Nothing was loaded. Give each "
            "of them as an object: load_encrypted_checkpoint(..., NAME=OBJECT)."
        )
    return converted


class _UnfitError(Exception):
    """A value of YAML that is none of the parameter's type."""


class _RefusedError(_UnfitError):
    """A value of which the caller's own class makes no object."""


def _import_path(value: Any) -> str | None:
    if not isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return None
    return f"{value.__module__}.{value.__qualname__}"


def _fitted(hint: Any, value: Any) -> Any:
    """Return a value of YAML as the caller's annotation has it; the same one if that is what it is.

    Raises:
        _UnfitError: if the annotation asks for an object that the value can only name.
    """
    if not all(isinstance(part, (*_PLAIN, dict, list)) for part in _parts(value)):
        return value
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _fitted(inner[0], value)
    if origin in (typing.Union, types.UnionType):
        return _fitted_to_one(inner, value)
    if origin is typing.Literal:
        return _accepted(value, value in inner)
    if hint is None or hint is type(None):
        return _accepted(value, value is None)
    if isinstance(hint, typing.TypeVar) or hint in (Any, object, inspect.Parameter.empty):
        return value
    if isinstance(origin, type):
        return _fitted_to_container(origin, inner, value)
    if isinstance(hint, typing.NewType):
        return _fitted(hint.__supertype__, value)
    if not isinstance(hint, type):
        raise _UnfitError
    if issubclass(hint, dict) and hasattr(hint, "__total__"):  # a TypedDict knows no instances
        _accepted(value, isinstance(value, dict))
        return _with_fields(dict, hint, value)
    if issubclass(hint, enum.Enum):
        return _accepted(hint.__members__.get(value, value), value in hint.__members__)
    if issubclass(hint, PurePath) and isinstance(value, str):
        return hint(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _with_fields(hint, hint, value)
    if hint is float and type(value) is int:
        return float(value)
    if hint not in _PLAIN and issubclass(hint, int | float | str) and type(value) in _PLAIN:
        return _made(hint, value)
    if hint in (tuple, set, frozenset) and isinstance(value, list):
        return hint(value)
    return _accepted(value, isinstance(value, hint))


def _with_fields(made: type[Any], hint: type[Any], value: dict[Any, Any]) -> Any:
    fields = typing.get_type_hints(hint)
    fitted = {name: _fitted(fields.get(name, Any), one) for name, one in value.items()}
    with contextlib.suppress(Exception):  # of the class's own code
        return made(**fitted)
    raise _RefusedError


def _made(hint: type[Any], value: Any) -> Any:
    """Return a number or text as the class that restricts it, such as ``PositiveInt``."""
    plain: Any = next(one for one in (int, float, str) if issubclass(hint, one))
    fits = type(value) is plain or (plain is float and type(value) is int)
    _accepted(value, fits)
    with contextlib.suppress(Exception):  # of the class's own code
        return hint(value)
    raise _RefusedError


def _accepted(value: Any, fits: bool) -> Any:
    if not fits:
        raise _UnfitError
    return value


def _fitted_to_one(hints: tuple[Any, ...], value: Any) -> Any:
    exact = [hint for hint in hints if hint is type(value)]
    why = _UnfitError
    for hint in (*exact, *hints):
        try:
            return _fitted(hint, value)
        except _RefusedError:
            why = _RefusedError
        except _UnfitError:
            continue
    raise why


def _fitted_to_container(origin: type[Any], inner: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, dict) and issubclass(dict, origin):
        hint = inner[-1] if len(inner) == 2 else Any  # keys and values
        changed = {key: _fitted(hint, one) for key, one in value.items()}
        return changed if any(changed[key] is not value[key] for key in value) else value
    if not isinstance(value, list) or not (
        issubclass(list, origin) or origin in (tuple, set, frozenset)
    ):
        raise _UnfitError
    hints = list(inner) if origin is tuple and ... not in inner else [inner[0] if inner else Any]
    if len(hints) == 1 and not (origin is tuple and ... not in inner):
        hints *= len(value)
    if len(hints) != len(value):
        raise _UnfitError
    parts = [_fitted(hint, one) for hint, one in zip(hints, value, strict=True)]
    if origin in (tuple, set, frozenset):
        return origin(parts)
    return parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
