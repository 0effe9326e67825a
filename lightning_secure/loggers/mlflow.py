"""``Trainer(logger=RedactingMLFlowLogger(...))``: MLflow without secrets and personal data."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import Module

from lightning_secure.errors import ConfigError, MissingExtraError
from lightning_secure.loggers.client import RedactingClient
from lightning_secure.loggers.run_tags import RunTags
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.mlflow_store.enforce import (
    enforce_mlflow_redaction,
    switch_telemetry_off,
)
from lightning_secure.redaction.mlflow_store.server_tls import allow_http, plain, require_tls
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.policy import RedactionPolicy
from lightning_secure.redaction.redactor import Redactor
from lightning_secure.util.files import exclusive_lock
from lightning_secure.util.ranks import rank_of_process

_FIRST_URI: Final = os.environ.get("MLFLOW_TRACKING_URI")
_OWN_URIS: Final[set[str]] = set()
#: Answers never, and a client of it opens no store.
_NOWHERE: Final = "https://opened-by-the-first-process.invalid"
_MOST_TAGS: Final = 100  # that MLflow takes at once


class RedactingMLFlowLogger(MLFlowLogger):
    """Logs to MLflow after secrets and personal data were taken out.

    Args:
        experiment_name: Name of the experiment.
        run_name: Name of the run.
        tracking_uri: Where to. By default the environment's ``MLFLOW_TRACKING_URI``, or else an
            SQLite database below ``save_dir``.
        tags: Tags of the run.
        save_dir: Folder of the database and the artifacts, if there is no ``tracking_uri``.
        log_model: As for Lightning's MLFlowLogger; checkpoints must be encrypted ones.
        prefix: Put before metric names.
        artifact_location: Where a new experiment keeps its artifacts.
        run_id: A run to go on with.
        synchronous: As for Lightning's MLFlowLogger.
        redactor: Decides what is taken out.
        policy: The rules of what this logger and everything else in the process may store: see
            :class:`RedactionPolicy`.
        insecure_allow_http: Whether this tracking server may be spoken to without TLS.
        insecure_only_this_logger: Leave the rest of the process alone: what talks to MLflow past
            the logger (``mlflow.log_*``, autologging, traces, a client of its own) is not redacted
            then.

    Params, tags, metric names and text artifacts are redacted in what Lightning logs and in what
    the module logs through ``logger.experiment``; the user's login name and the script's folder
    are left out of MLflow's own tags, and MLflow's telemetry is switched off for the process,
    whatever its environment says. Everything else that this process tracks with MLflow is redacted
    in MLflow's stores: see :func:`enforce_mlflow_redaction`, which is called here.

    The run carries tags that begin with ``lightning_secure.``: the epsilon and delta that it has
    spent, the digest of the dataset's manifest, and the digest of each checkpoint that a
    ``ModelCheckpoint`` has saved on this machine; see
    :class:`~lightning_secure.loggers.run_tags.RunTags`. Numbers in tags are compared as text, so
    epsilon is a metric as well, ``privacy/epsilon``. It needs the Trainer's
    ``enable_autolog_hparams``, which is on by default.

    Raises:
        MissingExtraError: if MLflow, or its database support, is not installed.
        ConfigError: if the server is spoken to without TLS, its address holds credentials, the
            environment asks for traces to be sent to a second place, or the policy cannot be kept.
        RedactionError: if ``logger.experiment`` was asked for something that cannot be checked.
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        *,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | os.PathLike[str] = "./mlruns",
        log_model: Literal[True, False, "all"] = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
        redactor: Redactor | None = None,
        policy: RedactionPolicy | None = None,
        insecure_allow_http: bool = False,
        insecure_only_this_logger: bool = False,
    ) -> None:
        switch_telemetry_off()
        uri = tracking_uri or _environments_uri()
        # Of several processes the first alone logs, and the others must not touch its store.
        first = rank_of_process() == 0 and not getattr(rank_zero_only, "rank", 0)
        if not uri:
            folder = Path(save_dir).absolute()
            if first:
                folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder / 'mlflow.db'}"
            artifact_location = artifact_location or (folder / "artifacts").as_uri()
        if uri != os.environ.get("MLFLOW_TRACKING_URI"):
            _OWN_URIS.add(uri)
        _require_packages(uri)
        if insecure_allow_http:
            allow_http(uri)
        require_tls(uri)
        if not insecure_only_this_logger:
            enforce_mlflow_redaction(redactor, policy=policy)
        elif policy is not None:
            raise ConfigError(
                "a policy is kept in MLflow's stores, and insecure_only_this_logger leaves those "
                "alone; the policy would be without effect. Nothing was sent."
            )
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=_NOWHERE,  # Lightning opens the store at once
            tags=tags,
            save_dir=str(save_dir),
            log_model=log_model,
            prefix=prefix,
            artifact_location=artifact_location,
            run_id=run_id,
            synchronous=synchronous,
        )
        self._run_tags = RunTags()
        self._tags_written: dict[str, str] = {}
        self._last_step = 0
        self._redactor = redactor or Redactor()
        self._policy = policy
        self._strict = policy is not None and policy.strict
        self._tracking_uri = uri
        self._mlflow_client: Any = self._connected() if first else None

    def _connected(self) -> RedactingClient:
        """Open the store, and make its tables if there are none."""
        from mlflow.tracking import MlflowClient

        with _alone(self._tracking_uri):
            client = MlflowClient(self._tracking_uri)
        return RedactingClient(client, self._redactor, policy=self._policy)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The redacting client of the run; in all processes but the first, one without effect."""
        if self._mlflow_client is None:  # the environment did not show that this is the first
            self._mlflow_client = self._connected()
        return super().experiment

    @property
    def redactor(self) -> Redactor:
        """The redactor; its ``counts`` say how often each rule has found something."""
        return self._redactor

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyperparameters, redacted before they are cut to MLflow's length."""
        # Before they are cut, for half of a secret is not recognised any more and still a leak; and
        # before they are flattened, which turns containers that Lightning does not know into text.
        with finding_counts.looking("params", strict=self._strict):
            clean = self._redactor.redact(_convert_params(params))
        finding_counts.announce()
        super().log_hyperparams(clean)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics with redacted names; text is dropped, for Lightning would print it."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        tags, numbers = self._run_tags.release(numbers, step)
        self._tag(tags)  # first: what is visible must not have cost more than the tags say
        self._last_step = max(self._last_step, step or 0)
        # A container that is written out in a name is looked into here, for Lightning takes its
        # brackets away, and so it would pass for words in the store.
        if not (self._redactor.remembers(numbers) and all(n[:1].isalpha() for n in numbers)):
            with finding_counts.looking("metrics", strict=self._strict):
                names = Policy(self._redactor).argument(dict.fromkeys(numbers))
            finding_counts.announce()
            numbers = dict(zip(names, numbers.values(), strict=True))
        if numbers or not metrics:
            super().log_metrics(numbers, step)

    @rank_zero_only
    def log_graph(self, model: Module, input_array: Tensor | None = None) -> None:
        """Tag the run with what it is about to train on; graphs are not logged."""
        # By this call Lightning tells a logger whose run it logs.
        trainer = getattr(model, "_trainer", None)
        if isinstance(trainer, pl.Trainer):
            self._tag(self._run_tags.begin(trainer))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Tag the run with a checkpoint's digest, and log the checkpoint if it is to be."""
        self._tag(self._run_tags.saved(checkpoint_callback))
        super().after_save_checkpoint(checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Tag the run with what it has come to, and end it."""
        if self._initialized:
            tags, beside = self._run_tags.end(self._last_step, whole=status != "failed")
            self._tag(tags)
            if beside:
                super().log_metrics(beside, self._last_step)
        super().finalize(status)

    def _tag(self, tags: Mapping[str, str]) -> None:
        new = {name: tag for name, tag in tags.items() if self._tags_written.get(name) != tag}
        if not new:
            return
        from mlflow.entities import RunTag

        entities = [RunTag(name, tag) for name, tag in new.items()]
        for start in range(0, len(entities), _MOST_TAGS):
            part = entities[start : start + _MOST_TAGS]
            self.experiment.log_batch(self.run_id, tags=part, **self._log_batch_kwargs)
        self._tags_written |= new


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let no other process open an SQLite store meanwhile: MLflow makes its tables then."""
    database = plain(uri)
    path = database.removeprefix("sqlite:///").partition("?")[0]
    with contextlib.ExitStack() as stack:
        if path != database and path and not path.startswith((":memory:", "file:")):
            with contextlib.suppress(OSError):  # MLflow says what is wrong with the place
                stack.enter_context(exclusive_lock(Path(f"{path}.lock")))
        yield


def _environments_uri() -> str | None:
    """Return the address that the user put into the environment.

    MLflow puts there whatever it was last told, and that may be the database of another logger.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return uri if uri == _FIRST_URI or uri not in _OWN_URIS else None


def _require_packages(uri: str) -> None:
    uri = plain(uri)
    if importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("RedactingMLFlowLogger needs MLflow: pip install mlflow-skinny.")
    database = not uri.startswith(("http://", "https://", "databricks", "file:"))
    if database and importlib.util.find_spec("sqlalchemy") is None:
        raise MissingExtraError(
            "MLflow keeps runs in a database here, and that needs the whole of MLflow: pip install "
            "'lightning-secure[tracking]'. Nothing was logged."
        )
