"""A stand-in for ``MlflowClient`` through which nothing unchecked passes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Final

from lightning_secure.errors import RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.artifacts.copy import as_it_is, copy_checked, copy_tree_checked
from lightning_secure.redaction.bound_call import Parameters
from lightning_secure.redaction.clean_metrics import known_clean
from lightning_secure.redaction.containers import number_of
from lightning_secure.redaction.policy import RedactionPolicy
from lightning_secure.redaction.redactor import REDACTED, Redactor

# Methods that only read, or remove by id: nothing of the caller's is stored.
_READS: Final = ("get_", "search_", "list_", "download_")
_HARMLESS: Final = frozenset(
    {"delete_run", "restore_run", "delete_experiment", "restore_experiment", "delete_tag"}
)
_WRITES: Final = frozenset(
    {
        "create_experiment",
        "create_run",
        "log_batch",
        "log_dict",
        "log_metric",
        "log_param",
        "log_text",
        "rename_experiment",
        "set_experiment_tag",
        "set_tag",
        "set_terminated",
        "update_run",
    }
)
_ID_FIELDS: Final = frozenset({"_run_id", "_model_id"})
_FILES: Final = frozenset({"log_artifact", "log_artifacts"})
_PICTURES: Final = frozenset({"log_figure", "log_image"})
# In what something was found, for the audit log: by the argument, or by the method.
_SINKS: Final = {
    "metrics": "metrics", "params": "params", "tags": "tags", "log_metric": "metrics",
    "log_param": "params", "log_dict": "artifacts", "log_text": "artifacts", "set_tag": "tags",
    "set_experiment_tag": "tags",
}  # fmt: skip
_IDS: Final = frozenset({"run_id", "experiment_id", "model_id"})


class RedactingClient:
    """Passes on the calls of a client with everything that is stored redacted.

    Args:
        client: An ``mlflow.MlflowClient``.
        redactor: Decides what is taken out.
        policy: That MLflow's stores keep. If it does not refuse binaries, pictures and files that
            hold no text are handed to the stores.

    Params, tags, metric names, run and experiment names, texts, dicts and text files are redacted;
    files that this package encrypted pass as they are. Every other method that writes, and every
    one that a newer MLflow may bring, raises :class:`RedactionError`: what is not checked is not
    sent.
    """

    def __init__(
        self, client: Any, redactor: Redactor, *, policy: RedactionPolicy | None = None
    ) -> None:
        self._client = client
        self._redactor = redactor
        self._calls: dict[str, tuple[Any, Callable[..., Any]]] = {}
        self._strict = policy is not None and policy.strict
        self._binary = None if policy is None or policy.binaries == "refuse" else as_it_is

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}  # made anew when they are called

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = getattr(self._client, name)
        if not callable(member) or name.startswith(_READS) or name in _HARMLESS:
            return member
        if name in _WRITES:
            made_of, call = self._calls.get(name, (None, None))
            if call is None or made_of != member:
                call = self._redacting(name, member)
                self._calls[name] = (member, call)
            return call
        if name in _PICTURES and self._binary is not None:
            return member
        if name in _FILES:
            return getattr(self, f"_{name}")
        raise RedactionError(
            f"MlflowClient.{name} sends things that are not checked for secrets and personal data "
            "yet, so it was refused and nothing was sent. Params, tags, metrics, text, dicts and "
            "text files are checked."
        )

    def _redacting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        parameters = Parameters(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = parameters.bind(args, kwargs)
            clean = {}
            for argument, value in given.items():
                clean[argument] = value
                if argument not in _IDS:
                    sink = _SINKS.get(argument) or _SINKS.get(name, "names")
                    with finding_counts.looking(sink, strict=self._strict):
                        clean[argument] = self._argument(name, argument, value, given)
            finding_counts.announce()
            positional, named = parameters.spread(clean)
            return method(*positional, **named)

        return call

    def _argument(self, method: str, argument: str, value: Any, given: Mapping[str, Any]) -> Any:
        redactor = self._redactor
        if argument == "value" and method == "log_metric":
            return number_of(value)
        if argument == "value":
            return self._stored(value, name=str(given["key"]))
        if argument == "tags" and isinstance(value, Mapping):
            tags = {str(key): self._stored(item, name=str(key)) for key, item in value.items()}
            return _without_user(dict(zip(redactor.redact(tags), tags.values(), strict=True)))
        if argument in ("metrics", "params", "tags") and method == "log_batch":
            entities = list(value)
            if known_clean(entities, (redactor,)):
                return entities
            return [self._entity(entity) for entity in entities]
        redacted = redactor.redact(value)
        if argument in ("artifact_location", "artifact_file") and redacted != value:
            raise RedactionError(
                f"{argument} of MlflowClient.{method} holds a secret or personal data, and a "
                "location cannot be redacted. Choose another one. Nothing was sent."
            )
        return redacted

    def _entity(self, entity: Any) -> Any:
        """Return a copy of a Metric, Param or RunTag with its key, value and other texts clean."""
        clean = copy.copy(entity)
        number = type(entity).__name__ == "Metric"
        for field, value in vars(entity).items():
            if field == "_value":
                clean._value = number_of(value) if number else self._stored(value, name=entity.key)
            elif field not in _ID_FIELDS and not isinstance(value, int | float | None):
                setattr(clean, field, self._redactor.redact_text(_text(value)))
        return clean

    def _stored(self, value: Any, *, name: str) -> Any:
        """Return a value as MLflow stores it: as text, of which nothing is left to be taken out.

        MLflow would make text of it by itself, and repeat it in its errors if it cannot.
        """
        redacted = self._redactor.redact(value, name=name)
        return redacted if isinstance(redacted, str) else self._redactor.redact_text(str(redacted))

    def _log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        source = Path(local_path)
        if source.is_dir():
            self._log_artifacts(run_id, local_path, artifact_path)
            return
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, self._redacted("", source.name))
            copied = copy_checked(source, target, redact=self._redacted, binary=self._binary)
            place = self._place(artifact_path)
            finding_counts.announce()
            self._client.log_artifact(run_id, str(copied), place)

    def _log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy_tree_checked(
                Path(local_dir), Path(folder), redact=self._redacted, binary=self._binary
            )
            place = self._place(artifact_path)
            finding_counts.announce()
            self._client.log_artifacts(run_id, folder, place)

    def _redacted(self, _: str, text: str) -> str:
        with finding_counts.looking("artifacts", strict=self._strict):
            return self._redactor.redact_text(text)

    def _place(self, artifact_path: str | None) -> str | None:
        return self._redacted("", artifact_path) if artifact_path else artifact_path


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _without_user(tags: Any) -> Any:
    """Replace what MLflow fills in about the person: the login name, and where the script lies."""
    if not isinstance(tags, dict):
        return tags
    tags = dict(tags)
    if "mlflow.user" in tags:
        tags["mlflow.user"] = REDACTED
    if isinstance(tags.get("mlflow.source.name"), str):
        tags["mlflow.source.name"] = PurePath(tags["mlflow.source.name"]).name
    return tags
