"""``Trainer(logger=RedactingMLFlowLogger(...))``: MLflow without secrets and personal data."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from lightning.fabric.utilities.logger import _convert_params
from lightning.pytorch.loggers import MLFlowLogger

from lightning_secure.errors import ConfigError, MissingExtraError
from lightning_secure.loggers.client import RedactingClient
from lightning_secure.redaction.mlflow_store.enforce import (
    enforce_mlflow_redaction,
    plain,
    switch_telemetry_off,
)
from lightning_secure.redaction.redactor import Redactor

__all__ = ["RedactingMLFlowLogger"]

_FIRST_URI: Final = os.environ.get("MLFLOW_TRACKING_URI")
_OWN_URIS: Final[set[str]] = set()
_LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})


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
        insecure_allow_http: Whether a tracking server may be spoken to without TLS.
        insecure_only_this_logger: Leave the rest of the process alone: what talks to MLflow past
            the logger (``mlflow.log_*``, autologging, traces, a client of its own) is not redacted
            then.

    Params, tags, metric names and text artifacts are redacted in what Lightning logs and in what
    the module logs through ``logger.experiment``; the user's login name and the script's folder
    are left out of MLflow's own tags, and MLflow's telemetry is switched off for the process,
    whatever its environment says. Everything else that this process tracks with MLflow is redacted
    in MLflow's stores: see :func:`enforce_mlflow_redaction`, which is called here.

    Raises:
        MissingExtraError: MLflow, or its database support, is not installed.
        ConfigError: The server is spoken to without TLS, or the environment asks for traces to be
            sent to a second place.
        RedactionError: ``logger.experiment`` was asked for something that cannot be checked.
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
        insecure_allow_http: bool = False,
        insecure_only_this_logger: bool = False,
    ) -> None:
        switch_telemetry_off()
        uri = tracking_uri or _environments_uri()
        if uri is None:
            folder = Path(save_dir).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{folder / 'mlflow.db'}"
            artifact_location = artifact_location or (folder / "artifacts").as_uri()
        _OWN_URIS.add(uri)
        _require_packages(uri)
        _require_tls(uri, insecure_allow_http)
        if not insecure_only_this_logger:
            enforce_mlflow_redaction(redactor)
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name,
            tracking_uri=uri,
            tags=tags,
            save_dir=str(save_dir),
            log_model=log_model,
            prefix=prefix,
            artifact_location=artifact_location,
            run_id=run_id,
            synchronous=synchronous,
        )
        self._redactor = redactor or Redactor()
        self._mlflow_client: Any = RedactingClient(self._mlflow_client, self._redactor)

    @property
    def redactor(self) -> Redactor:
        """What takes things out; its ``counts`` say how often."""
        return self._redactor

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log hyperparameters, redacted before they are cut to MLflow's length."""
        # Before they are cut, for half of a secret is not recognised any more and still a leak; and
        # before they are flattened, which turns containers that Lightning does not know into text.
        super().log_hyperparams(self._redactor.redact(_convert_params(params)))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics with redacted names; text is dropped, for Lightning would print it."""
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, str)}
        names = self._redactor.redact(dict.fromkeys(numbers))
        super().log_metrics(dict(zip(names, numbers.values(), strict=True)), step)


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


def _require_tls(uri: str, insecure_allow_http: bool) -> None:
    parts = urlsplit(plain(uri))
    if parts.scheme == "http" and parts.hostname not in _LOCAL_HOSTS and not insecure_allow_http:
        raise ConfigError(
            f"the tracking server at {parts.hostname!r} would be spoken to without TLS, and "
            "everybody on the way could read and change what is logged. Use https, or pass "
            "insecure_allow_http=True. Nothing was sent."
        )
