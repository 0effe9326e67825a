"""``Trainer(callbacks=[AuditTrail("audit/")])``: what happened, in a log that shows tampering."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_secure._version import __version__
from lightning_secure.audit.event_recorder import EventRecorder
from lightning_secure.audit.log import AuditLog
from lightning_secure.errors import AuditWriteError
from lightning_secure.privacy.accounting.ledger import HasLedger, Ledger
from lightning_secure.redaction import finding_counts
from lightning_secure.util import events

log = logging.getLogger(__name__)

FILE_NAME: Final = "audit.jsonl"


class AuditTrail(Callback):
    """Writes who used which key for what, and what became of the run, to a hash-chained log.

    Args:
        folder: Where the log lies. Several runs may share it.

    Records: ``run.start``, ``key.unwrap`` (also refused ones), ``key.wrap``, ``data.open``,
    ``checkpoint.save``, ``checkpoint.load``, ``redaction`` (how often which rule took something out
    of what is tracked), ``run.end`` and ``run.exception``. Of checkpoints in
    the clear, only those that ``PrivateStrategy`` saves are recorded. They hold ids,
    counts and names of types; never a key, a value of a row or the text of an exception.

    From the moment it is made it records every key that this process uses, and a key whose use
    cannot be recorded is not released. A process that is sent a key provider by pickle, such as a
    spawned worker, writes to the same log. Two trails in one folder are one log.

    >>> from lightning_secure import EncryptedShardDataset, seal
    >>> _ = seal({"age": [34, 51]}, folder / "data", keys=keys)
    >>> trail = AuditTrail(folder / "audit")
    >>> _ = EncryptedShardDataset(folder / "data", split="train", keys=keys)
    >>> [record["action"] for record in trail.log_file.records()]
    ['key.unwrap', 'data.open']
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._log = AuditLog(Path(folder) / FILE_NAME)
        self._recorder = EventRecorder(self._log)
        name = f"audit:{self._log.path.resolve()}"
        events.subscribe(name, self._recorder, follows_keys=True)

    @property
    def log_file(self) -> AuditLog:
        """The log."""
        return self._log

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Record what runs, on what, with which versions."""
        self._recorder.run = secrets.token_hex(16)
        self._record(
            "run.start",
            {
                "stage": stage,
                "module": type(pl_module).__name__,
                "datamodule": type(getattr(trainer, "datamodule", None)).__name__,
                "strategy": type(trainer.strategy).__name__,
                "precision": str(trainer.precision),
                "accelerator": type(trainer.accelerator).__name__,
                "devices": trainer.num_devices,
                "lightning_secure": __version__,
                "lightning": version("lightning"),
                "torch": torch.__version__,
            },
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Record the end of a run that ended by itself."""
        finding_counts.announce_all()
        details = {"stage": stage, "step": trainer.global_step, **_privacy(trainer)}
        self._record("run.end", details)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Record the type of what ended the run; its text may hold data."""
        kind = type(exception)
        name = f"{kind.__module__}.{kind.__qualname__}"
        details = {"exception": name, "step": trainer.global_step, **_privacy(trainer)}
        try:
            finding_counts.announce_all()
            self._record("run.exception", details, outcome="failure")
        except AuditWriteError as error:
            # The run is ending, by an error that must not be hidden behind this one. Without a
            # traceback: it would carry the text of that error along.
            log.error("the end of the run could not be recorded: %s", error)

    def _record(
        self, action: str, details: Mapping[str, str | int], *, outcome: str = "success"
    ) -> None:
        self._log.append(action, {"run": self._recorder.run, **details}, outcome=outcome)


def _privacy(trainer: pl.Trainer) -> dict[str, str | int]:
    strategy = trainer.strategy
    ledger: Ledger | None = strategy.ledger if isinstance(strategy, HasLedger) else None
    if ledger is None:
        return {}
    return {
        "private": str(ledger.private).lower(),
        "epsilon": str(ledger.epsilon()),
        "delta": str(ledger.delta),
        "privacy_steps": ledger.steps,
        "privacy_run": ledger.run_id,
    }
