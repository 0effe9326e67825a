"""Artifact repositories that redact text, and encrypt or refuse what cannot be checked."""

from __future__ import annotations

import functools
import posixpath
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.artifacts.copy import as_it_is, copy_checked, copy_tree_checked
from lightning_secure.redaction.artifacts.encrypted import SUFFIX, encrypted
from lightning_secure.redaction.mlflow_store.argument_kinds import ARTIFACTS
from lightning_secure.redaction.mlflow_store.guard import call_inside, guarding
from lightning_secure.redaction.mlflow_store.sinks import limited_trace_data
from lightning_secure.redaction.mlflow_store.values import Policy


class ArtifactPolicy:
    """The treatment of files.

    Args:
        policy: Redacts their text and names; its rules say what becomes of the others.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def redact(self, name: str, text: str) -> str:
        """Return the text of a file, or a name if ``name`` is empty, redacted."""
        return self._policy.file(name, text) if name else self._policy.text(text)

    def binary(self, name: str, data: bytes) -> tuple[str, bytes]:
        """Return a file that cannot be checked as it may be sent: encrypted, or as it is."""
        keys = self._policy.rules.keys
        if keys is None:
            return as_it_is(name, data)
        return name + SUFFIX, encrypted(data, name=name, keys=keys)

    def log_artifact(
        self, send: Callable[..., Any], local_file: str, artifact_path: str | None = None
    ) -> Any:
        """Send a redacted copy of a file."""
        source = Path(local_file)
        with self._looking("artifacts"), tempfile.TemporaryDirectory() as folder:
            place, name = self._place(artifact_path), self.redact("", source.name)
            if not self._passes(place, name):
                finding_counts.announce()
                return None
            target = Path(folder, name)
            copied = copy_checked(source, target, redact=self.redact, binary=self._binary)
            finding_counts.announce()
            return send(str(copied), place)

    def log_artifacts(
        self, send: Callable[..., Any], local_dir: str, artifact_path: str | None = None
    ) -> Any:
        """Send a redacted copy of a folder."""
        with self._looking("artifacts"), tempfile.TemporaryDirectory() as folder:
            place = self._place(artifact_path)
            copy_tree_checked(
                Path(local_dir), Path(folder), redact=self.redact, binary=self._binary,
                passes=functools.partial(self._passes, place),
            )  # fmt: skip
            finding_counts.announce()
            return send(folder, place)

    def upload_trace_data(self, send: Callable[..., Any], trace_data: str) -> Any:
        """Send the spans of a trace, redacted; they are JSON."""
        rules = self._policy.rules
        with self._looking("traces"):
            data = self.redact("traces.json", trace_data)
            if rules.limits(("traces",)):
                data = "" if rules.drops("traces") else limited_trace_data(rules, data)
            finding_counts.announce()
            return send(data) if data else None

    def upload_attachment(
        self, send: Callable[..., Any], attachment_id: str, content_bytes: bytes
    ) -> Any:
        """Send a file that belongs to a trace, if it is text or may be sent otherwise."""
        with self._looking("traces"), tempfile.TemporaryDirectory() as folder:
            self._policy.identifier(attachment_id, what="attachment_id")
            if not self._policy.rules.passes(("traces",), "attachment"):
                finding_counts.count("policy")
                finding_counts.announce()
                return None
            # Ciphertext is bound to the name that it is stored by.
            source = Path(folder, PurePath(attachment_id).name)
            source.write_bytes(content_bytes)
            target = Path(folder, "checked", source.name)
            copied = copy_checked(source, target, redact=self.redact, binary=self._binary)
            finding_counts.announce()
            return send(attachment_id, copied.read_bytes())

    @property
    def _binary(self) -> Callable[[str, bytes], tuple[str, bytes]] | None:
        return None if self._policy.rules.binaries == "refuse" else self.binary

    def _looking(self, sink: str) -> finding_counts.looking:
        return finding_counts.looking(sink, strict=self._policy.rules.strict)

    def _place(self, artifact_path: str | None) -> str | None:
        return self.redact("", str(artifact_path)) if artifact_path else artifact_path

    def _passes(self, place: str | None, name: str) -> bool:
        if self._policy.rules.passes(("artifacts",), posixpath.join(place or "", name)):
            return True
        finding_counts.count("policy")
        return False


def guarded_repository_class(cls: type, policy: ArtifactPolicy) -> type:
    """Return a subclass of an artifact repository's class whose every upload is redacted.

    Unclassified methods are refused, uploads by parts and by streams among them.
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
