"""Private attributes of MLflow's."""

from __future__ import annotations

from typing import Any


def tracking_stores() -> Any:
    """Return the registry of tracking stores."""
    from mlflow.tracking._tracking_service import utils

    return utils._tracking_store_registry


def model_registry_stores() -> Any:
    """Return the registry of model registry stores."""
    from mlflow.tracking._model_registry import utils

    return utils._get_store_registry()  # type: ignore[no-untyped-call]


def workspace_stores() -> Any:
    """Return the registry of workspace stores."""
    from mlflow.tracking._workspace import registry

    return registry._get_workspace_store_registry()


def artifact_repositories() -> Any:
    """Return the registry of artifact repositories."""
    from mlflow.store.artifact import artifact_repository_registry

    return artifact_repository_registry._artifact_repository_registry


def forget_stores() -> None:
    """Have MLflow build each store and artifact repository anew."""
    from mlflow.tracking._tracking_service import utils

    for registry in (tracking_stores(), model_registry_stores(), workspace_stores()):
        registry._get_store_with_resolved_uri.cache_clear()
    utils._artifact_repos_cache.clear()
