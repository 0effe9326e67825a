"""``Trainer(logger=RedactingLogger(...))``: any logger of Lightning's, without secrets."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Final

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import Tensor
from torch.nn import Module

from lightning_secure.errors import ConfigError, RedactionError
from lightning_secure.loggers.experiments import (
    redacted_fields,
    redacted_metrics,
    redacting_experiment,
    refusal,
)
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.artifacts.recognise import is_sealed
from lightning_secure.redaction.containers import fields_of, items_of
from lightning_secure.redaction.redactor import REDACTED, Redactor

log = logging.getLogger(__name__)

#: Hooks of loggers that do nothing after a checkpoint was saved.
_NOTHING: Final = (Logger.after_save_checkpoint, TensorBoardLogger.after_save_checkpoint)


class RedactingLogger(Logger):
    """Logs to another logger after secrets and personal data were taken out.

    Args:
        logger: A logger of Lightning's: ``CSVLogger``, ``TensorBoardLogger`` and the like. Nothing
            else may log to it.
        redactor: Decides what is taken out.

    Hyperparameters (also in ``hparams.yaml``), names of metrics and texts are redacted, those too
    that a module logs through ``logger.experiment``. Graphs are withheld, for they show constants
    and paths. Checkpoints are handed to the logger only if this package encrypted them. What is not
    checked raises: every other method of the logger and of its experiment, such as images and
    histograms. What is taken out is announced as ``redaction``, before the rest is logged, so that
    :class:`~lightning_secure.AuditTrail` records it.

    It passes for a logger of the same class, so that Lightning puts checkpoints and
    ``config.yaml`` where it would without it. For MLflow use
    :class:`~lightning_secure.RedactingMLFlowLogger`, which covers the ways past the logger, too.

    Raises:
        ConfigError: if the argument is no logger, or a logger with a secret or personal data in its
            name or its tags: the name becomes a folder, and tags are sent before the first call.
        RedactionError: if a value that cannot be checked was to be logged.

    >>> from lightning.pytorch.loggers import CSVLogger
    >>> logger = RedactingLogger(CSVLogger(folder, name="run", version=0))
    >>> logger.log_hyperparams({"lr": 0.1, "db_password": "hunter2"})
    >>> logger.save()
    >>> print((folder / "run" / "version_0" / "hparams.yaml").read_text().strip())
    lr: 0.1
    db_password: REDACTED
    """

    def __init__(self, logger: Logger, *, redactor: Redactor | None = None) -> None:
        if not isinstance(logger, Logger):
            raise ConfigError(
                f"RedactingLogger wraps a logger of lightning.pytorch, and this is a "
                f"{type(logger).__name__}. Nothing was logged."
            )
        self._logger = logger
        self._redactor = redactor or Redactor()
        self._graph_withheld = False
        self._withheld = False
        self._handed_over: dict[str, Any] = {}
        self._checked: dict[str, tuple[int, int, int]] = {}
        for name, value in vars(logger).items():
            if self._speaks(value):
                raise ConfigError(
                    f"{type(logger).__name__} was given a secret or personal data "
                    f"({name.lstrip('_')!r}), and writes it by itself. Leave it out. Nothing was "
                    "logged."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rewrapped, (self._logger, self._redactor)

    # Lightning asks with isinstance() where a logger keeps its files.
    @property  # type: ignore[misc] # cannot be set here
    def __class__(self) -> Any:
        return type(self._logger)

    @property
    def redactor(self) -> Redactor:
        """The redactor; its ``counts`` say how often each rule has found something."""
        return self._redactor

    @property
    def name(self) -> str | None:
        """The logger's."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        """The logger's."""
        return self._logger.version

    @property
    def root_dir(self) -> str | None:
        """The logger's."""
        return self._logger.root_dir

    @property
    def log_dir(self) -> str | None:
        """The logger's."""
        return self._logger.log_dir

    @property
    def save_dir(self) -> str | None:
        """The logger's."""
        return self._logger.save_dir

    @property
    def group_separator(self) -> str:
        """The logger's."""
        return self._logger.group_separator

    @property
    def experiment(self) -> Any:
        """The logger's experiment, behind a stand-in that redacts or refuses."""
        experiment = getattr(self._logger, "experiment", None)
        if experiment is None or isinstance(experiment, _DummyExperiment):
            return experiment
        return redacting_experiment(experiment, self._redactor)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._logger, name)
        if value is None or isinstance(value, str | int | float | PurePath):
            return value
        raise refusal(f"{type(self._logger).__name__}.{name}")

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace | None,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Log hyperparameters, redacted."""
        clean = redacted_fields(self._redactor, {} if params is None else params)
        shown = None if metrics is None else redacted_metrics(self._redactor, metrics)
        finding_counts.announce()
        if metrics is None and step is None:
            self._logger.log_hyperparams(clean)
        else:
            self._logger.log_hyperparams(clean, shown, step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics with redacted names."""
        clean = redacted_metrics(self._redactor, metrics)
        finding_counts.announce()
        self._logger.log_metrics(clean, step)

    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Withhold the graph."""
        if getattr(self._logger, "_log_graph", False) and not self._graph_withheld:
            self._graph_withheld = True
            log.warning("a model's graph is not checked for what is in it, and was not logged")

    def save(self) -> None:
        """Let the logger save what it has been given."""
        self._logger.save()

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Let the logger have checkpoints, if all that the callback has saved are encrypted."""
        if type(self._logger).after_save_checkpoint in _NOTHING:
            return
        for path in _saved_by(checkpoint_callback):
            if not self._may_be_sent(path):
                if not self._withheld:
                    log.warning(
                        "checkpoint %s is not an encrypted file on this machine, or its name holds "
                        "a secret or personal data: this run's checkpoints are withheld from the "
                        "logger",
                        self._redactor.redact_text(path),
                    )
                self._withheld = True
                return
        self._handed_over[str(checkpoint_callback.state_key)] = checkpoint_callback
        self._logger.after_save_checkpoint(checkpoint_callback)

    def finalize(self, status: str) -> None:
        """Let the logger end.

        Raises:
            RedactionError: if the logger may send checkpoints now, and one is not encrypted.
        """
        for callback in self._handed_over.values():
            paths = [path for path in _saved_by(callback) if "://" in path or Path(path).exists()]
            if not all(map(self._may_be_sent, paths)):
                raise RedactionError(
                    "a checkpoint of the run is not encrypted, so it could not be checked for "
                    "secrets and personal data, and the logger may send it when it ends. It was "
                    "not told to end."
                )
        self._logger.finalize(status)

    def _may_be_sent(self, path: str) -> bool:
        if not Path(path).is_file():  # a folder, a URL, or not written to its end
            return False
        state = Path(path).stat()
        mark = (state.st_ino, state.st_size, state.st_mtime_ns)
        if self._checked.get(path) != mark:
            if self._redactor.redact_text(path) != path or not is_sealed(Path(path).read_bytes()):
                return False
            self._checked[path] = mark
        return True

    def _speaks(self, value: Any) -> bool:
        """Return whether there is something to take out in what the logger was made with."""
        if isinstance(value, PurePath):
            value = str(value)
        if isinstance(value, str):
            return self._redactor.redact_text(value) != value
        if isinstance(value, Mapping | list | tuple | set) and (
            fields_of(value) or items_of(value)
        ):
            return REDACTED in str(self._redactor.redact(value))
        return False


def _rewrapped(logger: Logger, redactor: Redactor) -> RedactingLogger:
    return RedactingLogger(logger, redactor=redactor)


def _saved_by(checkpoint_callback: Any) -> list[str]:
    """Return the files, and places elsewhere, that a logger may send: the last, the best, the k."""
    best, last = checkpoint_callback.best_model_path, checkpoint_callback.last_model_path
    return sorted({str(path) for path in (best, last, *checkpoint_callback.best_k_models)} - {""})
