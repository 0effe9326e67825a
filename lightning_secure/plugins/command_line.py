"""LightningCLI's reading of ``--ckpt_path`` for checkpoints that this package wrote.

LightningCLI reads the hyperparameters of a checkpoint by itself and puts them in the place of what
the command line and the configuration say. It cannot open an encrypted checkpoint, and would let
``REDACTED`` win over the value that was given again. And it makes what a checkpoint in the clear
names, before a CheckpointIO can refuse that checkpoint.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.util
import inspect
import logging
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Final

import torch
from lightning.fabric.plugins import CheckpointIO

from lightning_secure.crypto.file_header import CHECKPOINT
from lightning_secure.errors import ConfigError
from lightning_secure.redaction.redactor import REDACTED
from lightning_secure.util.files import open_regular

log = logging.getLogger(__name__)

#: Types that a text may be given for, without being looked up as a name.
_PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, enum.Enum, PurePath)
_CONTAINERS: Final = (dict, list, tuple, set, frozenset)


def attend_to_ckpt_path() -> None:
    """Let LightningCLI open the checkpoints of this package, once in a process.

    Guarantees:
        Of an encrypted checkpoint, and of every one where ``EncryptedCheckpointIO`` is configured,
        LightningCLI uses no hyperparameter, so that none of its names is imported: command line,
        configuration and defaults hold. Where ``RedactingCheckpointIO`` writes in the clear, it
        uses plain values only, and refuses what names a class or function; of redacted values,
        those that are given win. With other plugins, checkpoints are treated as Lightning does.
        A CheckpointIO counts where it stands in the Trainer's configuration or defaults, as an
        object or by name, alone or inside of another plugin.
    """
    if importlib.util.find_spec("jsonargparse") is None:
        return
    from lightning.pytorch.cli import LightningCLI

    cli: Any = LightningCLI
    if not hasattr(cli._parse_ckpt_path, "__wrapped__"):
        cli.parse_arguments = _remembering(cli.parse_arguments)
        cli._parse_ckpt_path = _attentive(cli._parse_ckpt_path)


def _remembering(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def parse_arguments(self: Any, parser: Any, args: Any) -> None:
        self._lightning_secure_args = args
        original(self, parser, args)

    return parse_arguments


def _attentive(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def _parse_ckpt_path(self: Any) -> None:
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if not path:
            original(self)
            return
        trainer = [self.config[command].get("trainer"), self.trainer_defaults]
        used = {getattr(kind, "uses_of_ckpt_path", None) for kind in _kinds(trainer)}
        if "nothing" in used or _is_encrypted(Path(path)):
            log.warning(
                "the hyperparameters in the checkpoint %r are not read: the module gets those of "
                "the command line, the configuration and its defaults.",
                str(path),
            )
            return
        before = self.config.clone()
        if "plain values" in used:
            _parse_plain(self, command, Path(path))
        else:
            original(self)
        if _has_redacted(self.config[command].get("model")):
            _restore(self, command, before)

    return _parse_ckpt_path


def _kinds(value: Any) -> Iterator[Any]:
    """Yield the classes of the plugins that a configuration holds or names, and of those inside."""
    value = _plain_mapping(value)
    if isinstance(value, Mapping):
        yield _named(value.get("class_path"))
        value = [*value.values()]
    elif isinstance(value, CheckpointIO):
        yield type(value)
        value = [one for one in vars(value).values() if isinstance(one, CheckpointIO)]
    if isinstance(value, list | tuple):
        for one in value:
            yield from _kinds(one)


def _plain_mapping(value: Any) -> Any:
    return getattr(value, "as_dict", lambda: value)()  # of a namespace


def _named(path: Any) -> Any:
    """Return the class that the user's configuration names, or that a function there returns."""
    found = None
    try:
        found = pkgutil.resolve_name(path) if isinstance(path, str) else None
        if inspect.isroutine(found):
            found = typing.get_type_hints(found).get("return")
    except Exception:  # noqa: BLE001 # jsonargparse says what is wrong with it
        return None
    return found


def _is_encrypted(path: Path) -> bool:
    try:
        with open(open_regular(path), "rb") as file:
            return file.read(len(CHECKPOINT.magic)) == CHECKPOINT.magic
    except OSError:
        return False  # Lightning says what is wrong


def _has_redacted(value: Any) -> bool:
    values = _plain_mapping(value)
    if isinstance(values, Mapping):
        return any(map(_has_redacted, values.values()))
    if isinstance(values, list | tuple):
        return any(map(_has_redacted, values))
    return isinstance(values, str) and REDACTED in values


def _restore(cli: Any, command: str, before: Any) -> None:
    """Put the values that were given in the place of those of the checkpoint."""
    for key in _given(cli, command):
        if key in cli.config and key in before:
            cli.config[key] = before[key]


def _given(cli: Any, command: str) -> list[str]:
    """Return the keys of the model that the command line and the configuration give."""
    args = getattr(cli, "_lightning_secure_args", None)
    parse = cli.parser.parse_object if isinstance(args, Mapping) else cli.parser.parse_args
    given = parse(args, defaults=False)
    return [key for key in given.keys() if key.startswith(f"{command}.model.")]  # noqa: SIM118 # nested


# ---------------------------------------------------------------- a checkpoint in the clear


def _parse_plain(cli: Any, command: str, path: Path) -> None:
    """Do what LightningCLI does with a checkpoint, with values that name nothing.

    Raises:
        ConfigError: if the checkpoint names a class or a function, and none is given for it.
    """
    if not path.is_file():
        return
    saved = torch.load(path, weights_only=True, map_location="cpu").get("hyper_parameters", {})
    values = {name: value for name, value in saved.items() if name != "_instantiator"}
    if not values:
        return
    named = values.pop("_class_path", None)
    model = _plain_mapping(cli.config[command].get("model"))
    chosen = model.get("class_path") if cli.subclass_mode_model and model else None
    if named is not None and named != chosen:
        raise ConfigError(
            f"the checkpoint {str(path)!r} is not encrypted and names another class for the model "
            "than the command line does. Nothing was made of it. Give the class with --model."
        )
    hints = _hints(_named(chosen) if cli.subclass_mode_model else cli._model_class)
    naming = {name for name, value in values.items() if _may_name(hints.get(name), value)}
    prefix = f"{command}.model."
    given = {
        key.removeprefix(prefix).removeprefix("init_args.").partition(".")[0]
        for key in _given(cli, command)
    }
    if refused := sorted(str(name) for name in naming - given):
        raise ConfigError(
            f"the checkpoint {str(path)!r} is not encrypted, and its hyperparameters "
            f"{', '.join(map(repr, refused))} may name a class or a function. Nothing was made of "
            "them. Give each of them on the command line or in the configuration."
        )
    values = {name: value for name, value in values.items() if name not in naming}
    found = values if named is None else {"class_path": named, "dict_kwargs": values}
    cli.config = cli.parser.parse_object({command: {"model": found}}, cli.config)


def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a class's arguments, with those that it hands on to its bases."""
    found: dict[str, Any] = {}
    for one in reversed(getattr(kind, "__mro__", ())):
        init = vars(one).get("__init__")
        annotated: dict[str, Any] | None = None
        names: Mapping[str, Any] = {}
        try:
            annotated = typing.get_type_hints(init) if init is not None else {}
        except Exception:  # noqa: BLE001 # names that are known to type checkers only
            annotated = None
        with contextlib.suppress(TypeError, ValueError):
            names = inspect.signature(init).parameters if init is not None else {}
        for name in names:
            found[name] = None if annotated is None else annotated.get(name, Any)
    return found


def _may_name(hint: Any, value: Any) -> bool:
    """Whether a value, for an argument with such an annotation, may be looked up as a name."""
    texts = list(_texts(value))
    if any("class_path" in text for text in texts):
        return True
    # Those that stand as keys are no values.
    return any(_texts(value, keys=False)) and not _takes_plain(hint)


def _texts(value: Any, *, keys: bool = True) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _texts(key) if keys else ()
            yield from _texts(one, keys=keys)
    elif isinstance(value, _CONTAINERS):
        for one in value:
            yield from _texts(one, keys=keys)


def _takes_plain(hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is type(None) or origin is typing.Literal:
        return True
    if origin is typing.Annotated:
        return _takes_plain(inner[0])
    if origin in (typing.Union, types.UnionType) or _holds(origin):
        return all(one is ... or _takes_plain(one) for one in inner)
    return isinstance(hint, type) and issubclass(hint, (*_PLAIN, *_CONTAINERS))


def _holds(origin: Any) -> bool:
    """Whether the annotation is a container, such as a list, or what a list may be given for."""
    return isinstance(origin, type) and any(issubclass(one, origin) for one in _CONTAINERS)
