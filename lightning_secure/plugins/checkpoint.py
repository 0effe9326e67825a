"""``Trainer(plugins=[EncryptedCheckpointIO(keys)])``: checkpoints that only the key's owner reads.

A checkpoint is a head (:mod:`~lightning_secure.crypto.file_header`) and a Cobblestone-256 stream.
The head names the wrapped data key, the run and the step; all bytes before the stream are
bound to it, so none of them can be changed. The stream holds what ``torch.save`` writes.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, TypeVar, cast

import fsspec
import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy

from lightning_secure.compat.torch import FakeTensorMode
from lightning_secure.crypto.file_header import CHECKPOINT
from lightning_secure.crypto.keys import DataKey, KeyProvider, WrappedKey
from lightning_secure.crypto.stream import StreamReader, StreamWriter
from lightning_secure.errors import (
    CheckpointCorruptedError,
    ConfigError,
    IntegrityError,
)
from lightning_secure.plugins.asking import require_asked_to_read, require_asked_to_write
from lightning_secure.plugins.command_line import attend_to_ckpt_path
from lightning_secure.plugins.compact import save_named
from lightning_secure.plugins.constructor import constructor_arguments
from lightning_secure.plugins.readable import (
    planned_hyperparameters,
    require_readable,
    require_waited_for,
    with_plain_numbers,
)
from lightning_secure.privacy.accounting.carried_ledger import keep_ledger
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.weight_notes import noted_weights
from lightning_secure.util import events
from lightning_secure.util.files import atomic_writer, open_regular

attend_to_ckpt_path()

_Module = TypeVar("_Module", bound=pl.LightningModule)


class EncryptedCheckpointIO(CheckpointIO):
    """Writes every checkpoint of the Trainer encrypted, and reads nothing else.

    Args:
        keys: Wraps a fresh data key for each checkpoint.
        safe_globals: Classes of your own that checkpoints may hold, besides tensors and plain
            Python values.

    What is to be written is read back in memory first, without the data of large tensors: what
    safe loading refuses, or gives back as something else, is an error that names the
    hyperparameter. Hyperparameters of a module that is to be trained are tried when the run is set
    up. Scalars of numpy are written as the Python numbers that equal them. LightningCLI opens such
    a checkpoint with ``--ckpt_path``. It reads no hyperparameter of any checkpoint then.

    Paths may be local or fsspec URLs. Local files appear whole or not at all. Memory beyond the
    checkpoint itself stays near two megabytes, and a copy of those tensors that are parts of a
    larger memory, so that nothing else of that memory is written. It works under
    ``AsyncCheckpointIO``.

    Guarantees:
        A checkpoint is authenticated before any of it is parsed: a truncated file fails at once, a
        flipped bit when its chunk is read. It is always loaded with ``weights_only=True``, so it
        cannot run code of its author.

    It does not show that a checkpoint is the latest one of its run: an older one, put in its
    place, opens.

    Strategies that write checkpoints themselves, as Lightning's ModelParallelStrategy,
    DeepSpeedStrategy and sharded FSDPStrategy do, ask no CheckpointIO. They are refused when a run
    is set up, if this package is installed or the run's datamodule is an ``EncryptedDataModule``;
    so is every other with a ``save_checkpoint`` of its own whose class does not say
    ``asks_checkpoint_io = True``.

    Attributes:
        announces: It tells of each checkpoint by itself.
        uses_of_ckpt_path: Which hyperparameters LightningCLI uses of a checkpoint, with this one.

    >>> plugin = EncryptedCheckpointIO(keys)
    >>> plugin.save_checkpoint({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, folder / "a.ckpt")
    >>> plugin.load_checkpoint(folder / "a.ckpt")
    {'state_dict': {'w': tensor([1., 1.])}, 'epoch': 3}
    """

    announces: Final = True
    uses_of_ckpt_path: Final = "nothing"

    def __init__(self, keys: KeyProvider, *, safe_globals: Sequence[type] = ()) -> None:
        self._keys = keys
        self._safe_globals: list[Any] = list(safe_globals)
        self._run_id = secrets.token_hex(16)

    @property
    def keys(self) -> KeyProvider:
        """The provider that guards the keys."""
        return self._keys

    def meet(self, strategy: Strategy, *, loaded: bool) -> None:
        """Get to know the strategy that it was given to.

        Args:
            strategy: The Trainer's.
            loaded: Whether that has loaded a checkpoint.

        Raises:
            ConfigError: if the strategy would write checkpoints in the clear, or has loaded one
                that was not authenticated, or a hyperparameter of a module that is to be trained
                could not be read back. Nothing was written, nor trained or evaluated.
        """
        require_asked_to_write(strategy, self)
        if loaded:
            require_asked_to_read(strategy, self)
        require_waited_for(strategy)
        planned = with_plain_numbers(planned_hyperparameters(strategy, self))
        require_readable(planned, safe_globals=self._safe_globals, planned=True)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None
    ) -> None:
        """Encrypt a checkpoint.

        Args:
            checkpoint: The content that the Trainer wants kept.
            path: Where to.
            storage_options: Not supported.

        Raises:
            ConfigError: if the checkpoint holds objects that could be written but, for safety,
                never read, or if there are too many recipients. Nothing was written.
        """
        if storage_options is not None:
            raise ConfigError("EncryptedCheckpointIO takes no storage_options; use an fsspec URL.")
        checkpoint = with_plain_numbers(checkpoint)
        self._require_readable(checkpoint)
        key, name = DataKey.generate(), secrets.token_hex(16)
        wrapped = [one.to_json() for one in self._keys.wrap_all(key, context=_context(name))]
        privacy = checkpoint.get("lightning_secure", {}).get("privacy", {})
        prefix = CHECKPOINT.write(
            {
                "checkpoint": name,
                "run_id": privacy.get("run_id", self._run_id),
                "step": int(checkpoint.get("global_step", 0)),
                "key": wrapped[0] if len(wrapped) == 1 else wrapped,
            }
        )
        with _writer(path) as raw:
            raw.write(prefix)
            stream = StreamWriter(raw, key=key, context=prefix)
            save_named(checkpoint, cast("IO[bytes]", stream))
            stream.finish()
            size = raw.tell()
        events.announce(
            "checkpoint.save",
            {
                "checkpoint": name,
                "path": str(path),
                "bytes": size,
                "step": int(checkpoint.get("global_step", 0)),
            },
        )

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Decrypt a checkpoint.

        Args:
            path: Where from.
            map_location: As for :func:`torch.load`; the CPU by default.
            weights_only: True, or None for the same.

        Raises:
            CheckpointCorruptedError: if the file was altered or cut off, is not an encrypted
                checkpoint, or holds objects that are not safe to load. Nothing from it was used.
            WrongKeyError: if the checkpoint was written under another key.
            FileNotFoundError: if there is no checkpoint.
        """
        if weights_only is False:
            raise ConfigError(
                "weights_only=False would let the checkpoint's author run code here. Name the "
                "classes that it needs in EncryptedCheckpointIO(safe_globals=[...]) instead."
            )
        with opened(path, keys=self._keys) as stream, self._allowed():
            checkpoint: dict[str, Any] = torch.load(
                stream, map_location=map_location or _to_cpu, weights_only=True
            )
        events.announce("checkpoint.load", {"path": str(path)})
        return checkpoint

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove a checkpoint, if it exists.

        >>> plugin = EncryptedCheckpointIO(keys)
        >>> plugin.save_checkpoint({"epoch": 3}, folder / "a.ckpt")
        >>> plugin.remove_checkpoint(folder / "a.ckpt")
        >>> (folder / "a.ckpt").exists()
        False
        """
        filesystem, name = fsspec.core.url_to_fs(str(path))
        if filesystem.exists(name):
            filesystem.rm(name, recursive=True)
            events.announce("checkpoint.remove", {"path": str(path)})

    def _allowed(self) -> contextlib.AbstractContextManager[None]:
        return torch.serialization.safe_globals(self._safe_globals)

    def _require_readable(self, checkpoint: dict[str, Any]) -> None:
        """Refuse now what reading would refuse when the run is over."""
        require_readable(checkpoint, safe_globals=self._safe_globals)


def load_encrypted_checkpoint(
    module_class: type[_Module],
    path: _PATH,
    *,
    keys: KeyProvider,
    map_location: Any | None = None,
    strict: bool | None = None,
    safe_globals: Sequence[type] = (),
    **kwargs: Any,
) -> _Module:
    """Return a module with the weights and hyperparameters of an encrypted checkpoint.

    ``ModuleClass.load_from_checkpoint`` opens the path by itself and cannot decrypt it. A module
    that was trained privately brings its account along, and private training of it goes on there.

    Args:
        module_class: The LightningModule's class.
        path: A local path or fsspec URL.
        keys: Releases the checkpoint's key.
        map_location: As for ``load_from_checkpoint``.
        strict: As for ``load_from_checkpoint``.
        safe_globals: As for :class:`EncryptedCheckpointIO`: what was needed to write it is needed
            to read it.
        **kwargs: Hyperparameters to override, as for ``load_from_checkpoint``. Those that the
            checkpoint of a LightningCLI run holds by name only, such as a module, a function or a
            class, must be given.

    Raises:
        CheckpointCorruptedError: if the file was altered or cut off, is not an encrypted checkpoint
            of a Trainer, or asks for a call.
        ConfigError: if the checkpoint was written for another class, or a hyperparameter must be
            given.
        WrongKeyError: if the checkpoint was written under another key.

    Guarantees:
        The module is made by calling ``module_class`` with values. What the checkpoint names,
        such as ``class_path``, is neither imported nor called.

    >>> class Model(pl.LightningModule):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(width, 1)
    >>> saved = {"state_dict": Model(4).state_dict(), "hyper_parameters": {"width": 4}}
    >>> saved["pytorch-lightning_version"] = pl.__version__
    >>> EncryptedCheckpointIO(keys).save_checkpoint(saved, folder / "a.ckpt")
    >>> load_encrypted_checkpoint(Model, folder / "a.ckpt", keys=keys).layer
    Linear(in_features=4, out_features=1, bias=True)
    """
    allowed: list[Any] = list(safe_globals)
    with opened(path, keys=keys) as stream, torch.serialization.safe_globals(allowed):
        # Without reading the tensors.
        with FakeTensorMode():
            seen: Any = torch.load(stream, weights_only=True)
        arguments = constructor_arguments(module_class, seen, kwargs)
        ledger = Ledger.from_checkpoint(seen)
        stream.seek(0)
        module = module_class.load_from_checkpoint(
            stream,
            map_location=map_location,
            strict=strict,
            weights_only=True,
            **arguments,
        )
    if ledger is not None:
        ledger.weights = noted_weights(module)
        keep_ledger(module, ledger)
    events.announce("checkpoint.load", {"path": str(path)})
    return module


@contextlib.contextmanager
def opened(path: _PATH, *, keys: KeyProvider) -> Iterator[IO[bytes]]:
    """Open the plaintext of a checkpoint, which leaves the file only as it is read.

    Raises:
        CheckpointCorruptedError: if the file is not an encrypted checkpoint or was altered, or if
            the block finds unsafe content in it.
        WrongKeyError: if the checkpoint was written under another key.
        FileNotFoundError: if there is no checkpoint.
    """
    reason: str | None = None
    stream: StreamReader | None = None
    with _reader(path) as raw:
        try:
            prefix, header = CHECKPOINT.read(raw)
            key = keys.unwrap_any(
                _wrapped_keys(header["key"]), context=_context(header["checkpoint"])
            )
            stream = StreamReader(raw, key=key, context=prefix, start=len(prefix))
            with stream:
                yield cast("IO[bytes]", stream)
        except IntegrityError as error:
            reason = str(error)
        except pickle.UnpicklingError:
            reason = "it holds objects that are not safe to load"
        except Exception:
            # torch turns an error of a file object into one of its own.
            if stream is None or stream.failure is None:
                raise
            reason = stream.failure
    if reason is not None:
        raise CheckpointCorruptedError(
            f"checkpoint {str(path)!r} rejected: {reason.rstrip('.')}. Nothing from it was used."
        )


def _wrapped_keys(value: Any) -> list[WrappedKey]:
    """Parse the key's wrapped form: one, or a list with one for each recipient."""
    several = value if isinstance(value, list) and value else [value]
    return [WrappedKey.from_json(one) for one in several]


@contextlib.contextmanager
def _writer(path: _PATH) -> Iterator[BinaryIO]:
    """Open a file for writing that appears only when the block ends without an error."""
    # An instance of its own: transactions of a shared one would mix.
    filesystem, name = fsspec.core.url_to_fs(str(path), skip_instance_cache=True)
    if isinstance(filesystem, LocalFileSystem):
        local = Path(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(local) as file:
            yield file
        return
    filesystem.makedirs(os.path.dirname(name), exist_ok=True)
    with filesystem.transaction, filesystem.open(name, "wb") as file:
        yield file


@contextlib.contextmanager
def _reader(path: _PATH) -> Iterator[BinaryIO]:
    filesystem, name = fsspec.core.url_to_fs(str(path))
    if not filesystem.exists(name):
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}")
    if isinstance(filesystem, LocalFileSystem):
        reason = None
        try:
            fd = open_regular(name)
        except OSError as error:
            reason = error.strerror
        if reason is not None:
            raise CheckpointCorruptedError(
                f"checkpoint {str(path)!r} cannot be opened ({reason}). Nothing from it was used."
            )
        with os.fdopen(fd, "rb") as file:
            yield file
        return
    with filesystem.open(name, "rb") as file:
        yield file


def _context(name: str) -> dict[str, str]:
    return {"purpose": "checkpoint", "checkpoint": name}


def _to_cpu(storage: Any, location: str) -> Any:
    return storage
