"""Artifact repositories that redact text and refuse what cannot be checked."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_secure.redaction.files import copy_checked, copy_tree_checked
from lightning_secure.redaction.mlflow_store.guard import call_inside, guarding
from lightning_secure.redaction.mlflow_store.tables import ARTIFACTS
from lightning_secure.redaction.mlflow_store.values import Policy

__all__ = ["ArtifactPolicy", "guarded_repository_class"]


class ArtifactPolicy:
    """What happens to files.

    Args:
        policy: Redacts their text and names.

    Attributes:
        binaries: Whether files that are neither text nor encrypted pass unchecked.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.binaries = False

    def redact(self, name: str, text: str) -> str:
        """Return the text of a file, or a name if ``name`` is empty, redacted."""
        return self._policy.file(name, text) if name else self._policy.text(text)

    def log_artifact(
        self, send: Callable[..., Any], local_file: str, artifact_path: str | None = None
    ) -> Any:
        """Send a redacted copy of a file."""
        source = Path(local_file)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, self.redact("", source.name))
            copied = copy_checked(source, target, redact=self.redact, binaries=self.binaries)
            return send(str(copied), self._place(artifact_path))

    def log_artifacts(
        self, send: Callable[..., Any], local_dir: str, artifact_path: str | None = None
    ) -> Any:
        """Send a redacted copy of a folder."""
        with tempfile.TemporaryDirectory() as folder:
            copy_tree_checked(
                Path(local_dir), Path(folder), redact=self.redact, binaries=self.binaries
            )
            return send(folder, self._place(artifact_path))

    def upload_trace_data(self, send: Callable[..., Any], trace_data: str) -> Any:
        """Send the spans of a trace, redacted; they are JSON."""
        return send(self.redact("traces.json", trace_data))

    def upload_attachment(
        self, send: Callable[..., Any], attachment_id: str, content_bytes: bytes
    ) -> Any:
        """Send a file that belongs to a trace, if it is text."""
        self._policy.identifier(attachment_id, what="attachment_id")
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "attachment")
            source.write_bytes(content_bytes)
            target = Path(folder, "checked")
            copy_checked(source, target, redact=self.redact, binaries=self.binaries)
            return send(attachment_id, target.read_bytes())

    def _place(self, artifact_path: str | None) -> str | None:
        return self.redact("", str(artifact_path)) if artifact_path else artifact_path


def guarded_repository_class(cls: type, policy: ArtifactPolicy) -> type:
    """Return a subclass of an artifact repository's class whose every upload is redacted.

    Methods that nobody has classified are refused, uploads by parts and by streams among them.
    """

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any] | None:
        if name not in ARTIFACTS:
            return None
        return _uploading(method, getattr(policy, name)) if ARTIFACTS[name] else method

    return guarding(cls, wrap)


def _uploading(method: Callable[..., Any], upload: Callable[..., Any]) -> Callable[..., Any]:
    def redacted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return upload(functools.partial(call_inside, method, self), *args, **kwargs)

    return redacted
