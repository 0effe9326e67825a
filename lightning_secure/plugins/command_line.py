"""What LightningCLI makes of ``--ckpt_path`` when this package wrote the checkpoint.

LightningCLI reads the hyperparameters of a checkpoint by itself and puts them in the place of what
the command line and the configuration say. It cannot open an encrypted checkpoint, and would let
``REDACTED`` win over the value that was given again.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_secure.crypto.heads import CHECKPOINT
from lightning_secure.files import open_regular
from lightning_secure.redaction.redactor import REDACTED

__all__ = ["attend_to_ckpt_path"]

log = logging.getLogger(__name__)


def attend_to_ckpt_path() -> None:
    """Let LightningCLI open the checkpoints of this package, once in a process.

    Guarantees:
        Of an encrypted checkpoint, LightningCLI uses no hyperparameter, so that none of its names
        is imported: command line, configuration and defaults hold. Of a redacted one, values that
        are given win. Other checkpoints are treated as Lightning does.
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
        if path and _is_encrypted(Path(path)):
            log.warning(
                "the hyperparameters in the encrypted checkpoint %r are not read: the module gets "
                "those of the command line, the configuration and its defaults.",
                str(path),
            )
            return
        before = self.config.clone()
        original(self)
        if command and _has_redacted(self.config[command].get("model")):
            _restore(self, command, before)

    return _parse_ckpt_path


def _is_encrypted(path: Path) -> bool:
    try:
        with open(open_regular(path), "rb") as file:
            return file.read(len(CHECKPOINT.magic)) == CHECKPOINT.magic
    except OSError:
        return False  # Lightning says what is wrong


def _has_redacted(value: Any) -> bool:
    values = getattr(value, "as_dict", lambda: value)()
    if isinstance(values, Mapping):
        return any(map(_has_redacted, values.values()))
    if isinstance(values, list | tuple):
        return any(map(_has_redacted, values))
    return isinstance(values, str) and REDACTED in values


def _restore(cli: Any, command: str, before: Any) -> None:
    """Put the values that were given in the place of those of the checkpoint."""
    args = getattr(cli, "_lightning_secure_args", None)
    parse = cli.parser.parse_object if isinstance(args, Mapping) else cli.parser.parse_args
    given = parse(args, defaults=False)
    prefix = f"{command}.model."
    for key in given.keys():  # noqa: SIM118 # of a namespace, with its nested keys
        if key.startswith(prefix) and key in cli.config and key in before:
            cli.config[key] = before[key]
