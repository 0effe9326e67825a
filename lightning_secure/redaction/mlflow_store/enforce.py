"""Making every store that this process has, and will have, one that redacts."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from lightning_secure.compat.mlflow import (
    artifact_repositories,
    forget_stores,
    model_registry_stores,
    tracking_stores,
    workspace_stores,
)
from lightning_secure.errors import ConfigError, MissingExtraError
from lightning_secure.redaction.mlflow_store.artifacts import (
    ArtifactPolicy,
    guarded_repository_class,
)
from lightning_secure.redaction.mlflow_store.guard import guarded, guarded_class
from lightning_secure.redaction.mlflow_store.server_tls import allow_http, plain, require_tls
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.policy import RedactionPolicy
from lightning_secure.redaction.redactor import Redactor

_LOCK: Final = threading.RLock()
_POLICY: Final = Policy()
_ARTIFACTS: Final = ArtifactPolicy(_POLICY)
_enforced = False


def enforce_mlflow_redaction(
    redactor: Redactor | None = None,
    *,
    policy: RedactionPolicy | None = None,
    insecure_allow_binaries: bool = False,
    insecure_allow_http: bool = False,
) -> None:
    """Redact everything that this process tracks with MLflow from here on, by any caller.

    Args:
        redactor: Takes things out in addition to the default one, and to those of earlier calls.
            Each one looks at every text for as long as the process lives, so make one and hand it
            to all loggers.
        policy: The rules of what may be stored, besides redaction. Of several policies in one
            process the strictest counts, whichever came first; a call without one states nothing.
            Without any, all that is redacted may be stored, and binaries are refused.
        insecure_allow_binaries: The same as a policy with ``binaries="insecure_allow"``: artifacts
            that are neither text nor encrypted by this package pass unchecked (figures, pickled
            models), unless a policy says otherwise.
        insecure_allow_http: Let tracking servers on other hosts be spoken to without TLS, or with
            an unchecked certificate. Stores that exist already are not asked.

    Every tracking store, model registry store and artifact repository of the process is made a
    redacting one: those that exist already, wherever they are held, and those that MLflow will
    make, for every scheme. It holds for the logger, for ``mlflow.log_*`` and autologging, for every
    ``MlflowClient`` and for traces. It can be called as often as one likes, and cannot be undone:
    a redactor is added, never replaced. Unclassified methods raise
    :class:`RedactionError`. MLflow's telemetry and its export of traces over OTLP are switched off.
    Each finding and each omission is announced as ``redaction``, with the sink, the rule and how
    often, so that :class:`~lightning_secure.AuditTrail` records it before the rest is sent.

    Guarantees:
        No finding of the redactors reaches a store, an artifact or a server's log. What they do
        not find (names, places, free text; a value split over two fields) is not taken out.
        Other processes are not covered: they begin with an address that starts with ``secure+``
        in ``MLFLOW_TRACKING_URI``, or call this themselves.

    Raises:
        MissingExtraError: if MLflow is not installed.
        ConfigError: if the environment asks for traces to be sent to a second place, or the policy
            encrypts under other keys than an earlier one.

    >>> from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    >>> enforce_mlflow_redaction()
    >>> _ = (folder / "notes.txt").write_text("mail jo@clinic.example")
    >>> store = get_artifact_repository((folder / "artifacts").as_uri())
    >>> store.log_artifact(str(folder / "notes.txt"))
    >>> (folder / "artifacts" / "notes.txt").read_text()
    'mail REDACTED'
    """
    global _enforced
    _refuse_second_exporter()
    switch_telemetry_off()
    with _LOCK:
        if not _POLICY.redactors:
            _POLICY.add(Redactor())
        if redactor is not None:
            _POLICY.add(redactor)
        if policy is not None:
            _POLICY.rules.add(policy)
        if insecure_allow_binaries:
            _POLICY.rules.add(RedactionPolicy(binaries="insecure_allow"))
        if insecure_allow_http:
            allow_http()
        if not _enforced:
            try:
                _take_over()
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "mlflow":
                    raise
                raise MissingExtraError(
                    "enforce_mlflow_redaction needs MLflow: pip install mlflow-skinny."
                ) from None
            _enforced = True


@functools.cache
def _store_class(cls: type) -> type:
    return guarded_class(cls, _POLICY)


@functools.cache
def _repository_class(cls: type) -> type:
    return guarded_repository_class(cls, _ARTIFACTS)


def _take_over() -> None:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository
    from mlflow.store.model_registry.abstract_store import AbstractStore as ModelRegistryStore
    from mlflow.store.tracking.abstract_store import AbstractStore as TrackingStore
    from mlflow.store.workspace.abstract_store import AbstractStore as WorkspaceStore

    # Their methods are replaced, not the builders that are registered with them: so it holds for
    # schemes that are registered later, too.
    for registry in (tracking_stores(), model_registry_stores(), workspace_stores()):
        registry.__class__ = _redacting_registry(type(registry))
    artifacts = artifact_repositories()
    artifacts.__class__ = _redacting_artifact_registry(type(artifacts))
    forget_stores()
    # Other code may hold one that was made before.
    for value in gc.get_objects():
        kind = type(value)  # not isinstance(): that would ask the object, which may be a proxy
        if issubclass(kind, TrackingStore | ModelRegistryStore | WorkspaceStore):
            guarded(value, _store_class)
        elif issubclass(kind, ArtifactRepository):
            guarded(value, _repository_class)
    _reset_tracing()


def _redacting_registry(cls: Any) -> Any:
    class RedactingStoreRegistry(cls):  # type: ignore[misc]
        def get_store_builder(self, store_uri: str) -> Callable[..., Any]:
            builder: Callable[..., Any] = super().get_store_builder(plain(store_uri))

            @functools.wraps(builder, updated=())
            def redacting(**given: Any) -> Any:
                require_tls(given.get("store_uri"))
                given = {name: plain(value) for name, value in given.items()}
                return guarded(builder(**given), _store_class)

            redacting.__signature__ = inspect.signature(builder)  # type: ignore[attr-defined]
            return redacting

    return RedactingStoreRegistry


def _redacting_artifact_registry(cls: Any) -> Any:
    class RedactingArtifactRegistry(cls):  # type: ignore[misc]
        def get_artifact_repository(
            self, artifact_uri: str, tracking_uri: Any = None, registry_uri: Any = None
        ) -> Any:
            repository = super().get_artifact_repository(
                plain(artifact_uri), plain(tracking_uri), plain(registry_uri)
            )
            require_tls(getattr(repository, "artifact_uri", None))
            return guarded(repository, _repository_class)

    return RedactingArtifactRegistry


def _refuse_second_exporter() -> None:
    wanted = os.environ.get("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "").lower() in ("true", "1")
    metrics = os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    traces = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    both = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if wanted or metrics or traces or both:
        raise ConfigError(
            "the environment (OTEL_EXPORTER_OTLP_..., MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT) makes "
            "MLflow send traces to a collector as well, past its stores and unchecked. Unset it "
            "for this process. Nothing was sent."
        )
    # In case one is named later.
    os.environ["MLFLOW_ENABLE_OTLP_EXPORTER"] = "false"
    os.environ["MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT"] = "false"


def _reset_tracing() -> None:
    # An exporter that was chosen before the environment was changed.
    provider: Any = sys.modules.get("mlflow.tracing.provider")
    if provider is not None:
        provider.reset()


def switch_telemetry_off() -> None:
    """Switch MLflow's telemetry off, whether or not MLflow was imported already."""
    # MLflow looks once, when it is imported; if it was already, its client is there.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    telemetry: Any = sys.modules.get("mlflow.telemetry")
    if telemetry is None:
        return
    client = telemetry.get_telemetry_client()
    telemetry.set_telemetry_client()  # to none, as the environment now says
    if client is not None:
        client.flush(terminate=True)  # stops its threads; what waits is not sent
