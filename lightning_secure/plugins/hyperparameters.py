"""``Trainer(plugins=[RedactingCheckpointIO(...)])``: hyperparameters in checkpoints, redacted."""

from __future__ import annotations

import copy
import dataclasses
import threading
from argparse import Namespace
from collections import Counter, deque
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_secure.plugins.asking import require_asked_to_write
from lightning_secure.plugins.command_line import attend_to_ckpt_path
from lightning_secure.plugins.readable import require_waited_for
from lightning_secure.redaction.containers import fields_of, items_of
from lightning_secure.redaction.redactor import REDACTED, Redactor

attend_to_ckpt_path()

_HYPERPARAMETERS: Final = ("hyper_parameters", "datamodule_hyper_parameters")
#: Written as numbers, or as the name of what they are.
_KEPT: Final = (
    np.number, np.bool_, torch.dtype, torch.device, torch.Size, type, FunctionType,
)  # fmt: skip
#: Of these, what is derived may have attributes, which pickle writes, too.
_PLAIN: Final[tuple[type[Any], ...]] = (bool, int, float, complex, bytes, bytearray)
_KEYS: Final = (str, int, float, bool, type(None))
_SEQUENCES: Final = (list, tuple, set, frozenset, deque)


class RedactingCheckpointIO(_WrappingCheckpointIO):
    """Takes secrets and personal data out of the hyperparameters that checkpoints hold.

    Args:
        checkpoint_io: Writes the checkpoints: ``EncryptedCheckpointIO(keys)``, or another one. By
            default what the Trainer would use, which writes them in the clear.
        redactor: Decides what is taken out.

    ``save_hyperparameters`` puts every argument of a module or datamodule into every checkpoint:
    in the clear for every reader of the file, and encrypted for every holder of the key. Here
    what is found is replaced by ``REDACTED``, and must be given again when the module is loaded:
    ``load_from_checkpoint(path, db_password=...)``. A run is resumed without it.

    Only hyperparameters are redacted. What a module puts into a checkpoint by itself, weights, and
    paths in the states of callbacks are written as they are. Strategies that write checkpoints
    themselves are refused, see :class:`EncryptedCheckpointIO`.

    Guarantees:
        Numbers, tensors and arrays of them, types and functions stay what they are, and so do
        dicts, lists, tuples, sets, namespaces and dataclasses with what is in them. Containers of
        other libraries become dicts and lists, members of an Enum of objects their names, other
        objects and methods text: the redactor cannot look at what pickle would write of them.

    Attributes:
        uses_of_ckpt_path: Which hyperparameters LightningCLI uses of a checkpoint, with this one.

    >>> from lightning_secure import EncryptedCheckpointIO
    >>> plugin = RedactingCheckpointIO(EncryptedCheckpointIO(keys))
    >>> hyperparameters = {"lr": 0.1, "db_password": "hunter2"}
    >>> plugin.save_checkpoint({"hyper_parameters": hyperparameters}, folder / "a.ckpt")
    >>> plugin.load_checkpoint(folder / "a.ckpt")
    {'hyper_parameters': {'lr': 0.1, 'db_password': 'REDACTED'}}
    """

    uses_of_ckpt_path: Final = "plain values"

    def __init__(
        self, checkpoint_io: CheckpointIO | None = None, *, redactor: Redactor | None = None
    ) -> None:
        super().__init__(checkpoint_io)
        self._redactor = redactor or Redactor()

    @property
    def redactor(self) -> Redactor:
        """The redactor; its ``counts`` say how often each rule has found something."""
        return self._redactor

    def meet(self, strategy: Strategy, *, loaded: bool) -> None:
        """Get to know the strategy that it was given to.

        Args:
            strategy: The Trainer's.
            loaded: Whether that has loaded a checkpoint; nothing is redacted then.

        Raises:
            ConfigError: if the strategy would write checkpoints that are not redacted. Nothing was
                written.
        """
        require_asked_to_write(strategy, self)
        require_waited_for(strategy)

    def prepared(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """Return what would be written of a checkpoint, without counting what is taken out."""
        redactor = copy.copy(self._redactor)
        redactor.counts = Counter()
        return _redacted(checkpoint, redactor)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint with its hyperparameters redacted; ``checkpoint`` stays as it is."""
        clean = _redacted(checkpoint, self._redactor)
        super().save_checkpoint(clean, path, storage_options)
        if threading.current_thread() is not threading.main_thread():
            # An AsyncCheckpointIO around this one does not wait for one inside.
            self.teardown()

    def teardown(self) -> None:
        """Wait for what is written in the background, and raise its error."""
        if self.checkpoint_io is not None:
            self.checkpoint_io.teardown()


def _redacted(checkpoint: Mapping[str, Any], redactor: Redactor) -> dict[str, Any]:
    clean = dict(checkpoint)
    for key in _HYPERPARAMETERS:
        if key in clean:
            given = clean[key]
            clean[key] = _restored(given, redactor.redact(given), redactor)
    return clean


def _restored(given: Any, clean: Any, redactor: Redactor) -> Any:
    """Return what a redactor has made of a value, of the value's own type where that can be had."""
    if isinstance(given, Enum):  # before texts: some are both
        shown = f"{clean} {redactor.redact(given.value)}"
        if REDACTED in shown:
            return REDACTED
        # Pickle writes its value, of which an object's text may say nothing.
        return given if _is_plain(given.value) else given.name
    if clean == REDACTED and given is not None:
        return REDACTED
    if isinstance(given, Tensor):
        # Pickle writes a tensor's attributes, and all of the memory that it is a part of.
        return given.detach().clone() if vars(given) or _is_part(given) else given
    if given is None or isinstance(given, _KEPT):
        return given
    if isinstance(given, BuiltinFunctionType):
        # Of a method, pickle writes what it is bound to, such as the dict of dict.get.
        return given if isinstance(given.__self__, ModuleType | type | None) else clean
    if type(given) is np.ndarray and given.dtype.kind in "biufc":
        return given.astype(given.dtype.str) if given.dtype.metadata else given
    if isinstance(given, bytes | bytearray | range) and clean != str(given):
        return clean
    for plain in _PLAIN:
        if isinstance(given, plain):
            return given if type(given) is plain else plain(given)
    if isinstance(given, range):
        return given
    if isinstance(given, PurePath):
        return type(given)(clean)
    fields, items = fields_of(given), items_of(given)
    if fields is not None and isinstance(clean, dict):
        pairs = zip(fields.items(), clean.items(), strict=True)
        inner = {
            label: (key, _restored(item, shown, redactor)) for (key, item), (label, shown) in pairs
        }
        return _with_fields(given, inner)
    if items is not None and isinstance(clean, list):
        pairs_of = zip(items, clean, strict=True)
        parts = [_restored(item, shown, redactor) for item, shown in pairs_of]
        return type(given)(parts) if type(given) in _SEQUENCES else parts
    return str.__str__(clean) if isinstance(clean, str) else clean


def _is_part(value: Tensor) -> bool:
    strided = value.layout is torch.strided and value.device.type != "meta"
    return strided and value.untyped_storage().nbytes() > value.nbytes


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (str, *_PLAIN, *_KEYS)


def _with_fields(given: Any, inner: dict[str, tuple[str, Any]]) -> Any:
    values = [value for _, value in inner.values()]
    if isinstance(given, tuple):
        return type(given)(*values)
    if dataclasses.is_dataclass(given):
        # Its fields only: the redactor has looked at nothing else.
        made = object.__new__(type(given))
        for (name, _), value in zip(inner.values(), values, strict=True):
            object.__setattr__(made, name, value)
        return made
    if type(given) in (Namespace, SimpleNamespace):
        return type(given)(**dict(zip(inner, values, strict=True)))
    if type(given) is not dict:
        return dict(zip(inner, values, strict=True))
    # Keys that are no text were made text to be looked at.
    keys = (
        key if label == text and type(key) in _KEYS else str.__str__(label)
        for key, (label, (text, _)) in zip(given, inner.items(), strict=True)
    )
    return dict(zip(keys, values, strict=True))
