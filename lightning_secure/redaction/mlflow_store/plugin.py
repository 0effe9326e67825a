"""MLflow's entry points: addresses that start with ``secure+``.

MLflow loads this module while it is being imported itself, so it imports nothing of MLflow's.
One such address makes the whole process redact: runs name artifacts by addresses of their own,
and the same store may be reached by its plain address.
"""

from __future__ import annotations

import inspect
from typing import Any

from lightning_secure.compat.mlflow import model_registry_stores, tracking_stores
from lightning_secure.redaction.mlflow_store.enforce import enforce_mlflow_redaction
from lightning_secure.redaction.mlflow_store.server_tls import plain


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Return the tracking store at ``secure+<address>``, redacting."""
    enforce_mlflow_redaction()
    build = tracking_stores().get_store_builder(plain(store_uri))
    return build(store_uri=store_uri, artifact_uri=artifact_uri)


def model_registry_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """Return the model registry store at ``secure+<address>``, redacting."""
    enforce_mlflow_redaction()
    build = model_registry_stores().get_store_builder(plain(store_uri))
    if "tracking_uri" in inspect.signature(build).parameters:  # as MLflow itself asks
        return build(store_uri=store_uri, tracking_uri=tracking_uri)
    return build(store_uri=store_uri)


def artifact_repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> Any:
    """Return the artifact repository at ``secure+<address>``, redacting."""
    enforce_mlflow_redaction()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(artifact_uri, tracking_uri, registry_uri)
