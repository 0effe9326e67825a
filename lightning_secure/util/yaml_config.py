"""Files that configure a command: strict YAML, and errors that repeat none of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from lightning_secure.errors import ConfigError
from lightning_secure.util.files import as_path

_T = TypeVar("_T")
_NAME: Final = re.compile(r"[A-Za-z_]{1,20}")


def parsed(path: Path) -> dict[str, Any]:
    """Return what a YAML file says.

    Raises:
        ConfigError: if the file cannot be read, is not YAML of plain values, has a key twice, or is
            no mapping. The message holds nothing of the file but a line's number.

    >>> _ = (folder / "plan.yaml").write_text("anonymize: {name: suppress}")
    >>> parsed(folder / "plan.yaml")
    {'anonymize': {'name': 'suppress'}}
    """
    import yaml

    where = reason = None
    config: Any = None
    data = b""
    try:
        data = as_path(path, what="the configuration").read_bytes()
    except OSError as error:
        reason = error.strerror
    try:
        config = yaml.load(data, _loader())  # noqa: S506 # a SafeLoader
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark.line + 1 if error.problem_mark else 1
    except ConfigError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        where = 1
    except (ValueError, TypeError, AttributeError):  # PyYAML's own words hold the value
        reason = "a key or value is not what its form says, such as a date that is none"
    # Outside the handlers: a YAML error repeats the line, which may hold a secret.
    if reason is not None:
        raise ConfigError(f"configuration {str(path)!r} cannot be read ({reason}).")
    if where is not None:
        raise ConfigError(f"configuration {str(path)!r} is not valid YAML in line {where}.")
    return typed(config, dict, "the configuration")


def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc] # ships no types
        """YAML in which a key stands once."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        pairs = loader.construct_pairs(node, deep=True)
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ConfigError(
                f"the configuration has a key twice, in the part from line "
                f"{node.start_mark.line + 1} on."
            )
        return result

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def known(value: Any, names: set[str], what: str) -> dict[str, Any]:
    """Return a mapping that has no other keys than these; raises ConfigError for any other.

    >>> known({"sensitiv": []}, {"sensitive"}, "the plan")
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: the plan has the unknown key 'sensitiv'; known are ...
    """
    fields = typed(value, dict, what)
    if unknown := [name for name in fields if name not in names]:
        raise ConfigError(
            f"{what} has the unknown key {shown(unknown, fields)}; known are "
            f"{', '.join(sorted(names))}. Nothing was sealed."
        )
    return fields


def shown(unknown: Sequence[Any], fields: Mapping[Any, Any]) -> str:
    """Return those of some keys that look like keys, for an error."""
    # A forgotten space makes one word of a key and its value, which may be a secret.
    named = [
        repr(name)
        for name in unknown
        if isinstance(name, str) and _NAME.fullmatch(name) and fields[name] is not None
    ]
    return ", ".join(named) or "(not shown)"


def typed(value: Any, kind: type[_T], what: str) -> _T:
    """Return a value of exactly this type; raises ConfigError for any other."""
    if type(value) is not kind:
        raise ConfigError(f"{what} must be of type {kind.__name__}, not {type(value).__name__}.")
    return value
