"""The tags of a run: its privacy, the data it read, and the checkpoints it wrote."""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from lightning_secure.crypto.manifest import HasManifest
from lightning_secure.privacy.accounting.ledger import GuardsMetrics, HasLedger, Ledger
from lightning_secure.redaction.mlflow_store.sinks import OURS

_EPSILON: Final = "privacy/epsilon"
# As MLFlowLogger does with names of metrics: MLflow refuses other characters, and longer names.
_REFUSED: Final = re.compile(r"[^a-zA-Z0-9_/. -]+")
_LONGEST: Final = 250
# Metrics that Lightning and this package's callbacks log beside a module's own.
_NO_RELEASE: Final = frozenset({"epoch", "step", _EPSILON, "privacy/delta", "privacy/steps"})


class RunTags:
    """Makes the tags of one logger's run.

    ==================== =====================================================================
    tag                  value
    ==================== =====================================================================
    private              ``true`` if epsilon holds for all that the last fit released
    epsilon, delta       what was spent when something was last released; ``inf`` without DP
    privacy_steps        steps (and other releases) that the account holds
    privacy_run          id of the account, the same in every checkpoint
    manifest_digest      of the dataset, as ``EncryptedDataModule(manifest_digest=)`` takes it
    checkpoint.<SHA-256> name of a checkpoint's file, by the digest of what is in it
    metric.<name>        epsilon at the last release of a metric; ``public`` for a declared one
    ==================== =====================================================================

    Computing epsilon takes about a tenth of a second: once for each time that released metrics or
    metrics of validation are logged, or a checkpoint is saved, after further steps. A checkpoint is
    read once more for its digest.
    """

    def __init__(self) -> None:
        self._trainer: weakref.ref[pl.Trainer] | None = None
        self._private = False  # asking a Protocol takes as long as looking through the metrics
        self._counted: tuple[Any, ...] = ()
        self._epsilon = 0.0
        self._logged: tuple[int | None, float] | None = None
        self._saved: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None}  # of this process

    def begin(self, trainer: pl.Trainer) -> dict[str, str]:
        """Return the tags of a fit, or of something else, that begins."""
        self._trainer = weakref.ref(trainer)
        self._private = isinstance(trainer.strategy, HasLedger)
        tags = {}
        datamodule = getattr(trainer, "datamodule", None)
        digest = datamodule.manifest_digest if isinstance(datamodule, HasManifest) else None
        if digest is not None:
            tags["manifest_digest"] = digest
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and not self._private:
            # Also where an earlier fit of the run was private: its weights are trained on without.
            tags |= {"private": "false", "epsilon": "inf"}
        return _named({**tags, **self._account()})

    def release(
        self, metrics: Mapping[str, Any], step: int | None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Return tags, and what to log, for metrics that are about to be logged.

        Epsilon is logged once a step, however often metrics are logged in it.
        """
        tags, told = self._released(metrics)
        logged = {name: value for name, value in metrics.items() if name != _EPSILON or not told}
        if told and self._logged != (step, self._epsilon):
            self._logged = (step, self._epsilon)
            logged[_EPSILON] = self._epsilon
        return tags, logged

    def _released(self, names: Collection[str]) -> tuple[dict[str, str], bool]:
        """Return tags for metrics, and whether epsilon belongs beside them."""
        if self._ledger() is None:
            return {}, False
        guard = _strategy(self._trainer)
        published = guard.published_metrics if isinstance(guard, GuardsMetrics) else {}
        noised = {name: _looked_up(published, name) for name in names if name not in _NO_RELEASE}
        tags = {f"metric.{name}": "public" for name, noise in noised.items() if noise is False}
        told = _EPSILON in names  # by PrivacyBudget, and rounded by Lightning
        if not told and all(noise is False for noise in noised.values()):
            return _named(tags), False
        before = self._counted
        tags |= self._account()
        for name, noise in noised.items():
            if noise:
                tags[f"metric.{name}"] = str(self._epsilon)
        return _named(tags), told or self._counted != before

    def saved(self, checkpoint_callback: Any) -> dict[str, str]:
        """Return tags when a callback has saved a checkpoint."""
        self._saved.add(str(getattr(checkpoint_callback, "_last_checkpoint_saved", "")))
        strategy = _strategy(self._trainer)
        later = _written_later(getattr(strategy, "checkpoint_io", None))
        return _named({**self._account(), **({} if later else self._digests())})

    def end(self, step: int, *, whole: bool) -> tuple[dict[str, str], dict[str, float]]:
        """Return tags and metrics at the end.

        Args:
            step: The last one.
            whole: Whether checkpoints that were written in the background are complete.
        """
        before = self._counted
        tags = {**self._account(), **(self._digests() if whole else {})}
        known = self._counted == before or self._logged == (step, self._epsilon)
        return _named(tags), {} if known else {_EPSILON: self._epsilon}

    def _ledger(self) -> Ledger | None:
        strategy: Any = _strategy(self._trainer) if self._private else None
        return None if strategy is None else strategy.ledger

    def _account(self) -> dict[str, str]:
        ledger = self._ledger()
        if ledger is None:
            return {}
        counted = (ledger.run_id, *ledger.releases)
        if counted != self._counted:
            self._epsilon = ledger.epsilon()
            self._counted = counted
        return {
            "private": str(ledger.private).lower(),
            "epsilon": str(self._epsilon),
            "delta": str(ledger.delta),
            "privacy_steps": str(ledger.steps),
            "privacy_run": ledger.run_id,
        }

    def _digests(self) -> dict[str, str]:
        tags = {}
        for path in map(Path, sorted(self._saved)):
            if path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                tags[f"checkpoint.{digest}"] = path.name
        self._saved.clear()
        return tags


def _named(tags: Mapping[str, str]) -> dict[str, str]:
    return {f"{OURS}{_REFUSED.sub('', name)}"[:_LONGEST]: tag for name, tag in tags.items()}


def _strategy(trainer: weakref.ref[pl.Trainer] | None) -> object:
    running = trainer() if trainer is not None else None
    return running.strategy if running is not None else None


def _looked_up(published: Mapping[str, bool], name: str) -> bool | None:
    """Return whether a metric was noised; None if it did not come through the guard."""
    if name not in published:  # logged both ways, it has a name for each
        name = name.removesuffix("_step").removesuffix("_epoch")
    return published.get(name)


def _written_later(checkpoint_io: Any) -> bool:
    """Return whether a checkpoint may not be there yet when saving it has returned."""
    while checkpoint_io is not None:
        if isinstance(checkpoint_io, AsyncCheckpointIO):
            return True
        checkpoint_io = getattr(checkpoint_io, "checkpoint_io", None)
    return False
