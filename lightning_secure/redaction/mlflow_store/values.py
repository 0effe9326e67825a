"""Redacting what MLflow's methods are given: texts, containers, entities, spans and models."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import Any, Final

import yaml

from lightning_secure.errors import RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.clean_metrics import known_clean
from lightning_secure.redaction.containers import fields_of, items_of, number_of
from lightning_secure.redaction.detect.split_secrets import halves
from lightning_secure.redaction.mlflow_store.argument_kinds import ENTITIES
from lightning_secure.redaction.mlflow_store.delimited import DELIMITED, by_columns
from lightning_secure.redaction.mlflow_store.ids import (
    is_id,
    lists_experiments,
    without_experiment,
)
from lightning_secure.redaction.policy import Rules
from lightning_secure.redaction.redactor import REDACTED, Redactor

# MLflow cuts previews and metadata of traces; what stands at the end may be half of something.
_CUT: Final = re.compile(r"[^\s\"',{}\[\]]*\.\.\.$")
_CUT_LENGTHS: Final = frozenset({250, 1000, 10_000})
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_COMPARED: Final = re.compile(
    r"(?P<name>(?:[\w.]+|`[^`]*`|\"[^\"]*\")+)(?P<is>\s*(?:!=|=|LIKE|ILIKE)\s*)"
    r"(?P<text>'[^']*'|\"[^\"]*\")",
    re.IGNORECASE,
)
_LONGEST_LITERAL: Final = 100_000
_MAX_DEPTH: Final = 32


class Policy:
    """Redacts by one or several redactors, each of which takes out what it finds.

    Args:
        redactors: The redactors.

    Attributes:
        rules: The policy of what may be stored.
    """

    def __init__(self, *redactors: Redactor) -> None:
        self.redactors = list(redactors)
        self.rules = Rules()

    def add(self, redactor: Redactor) -> None:
        """Let ``redactor`` take out things too; what was taken out before still is."""
        if all(known is not redactor for known in self.redactors):
            self.redactors.append(redactor)

    def text(self, text: str, *, name: str = "") -> str:
        """Return a redacted text; containers that were written out in it are looked into.

        Args:
            text: The text.
            name: Under which it stands, if it is stored as the value of something.
        """
        if name and lists_experiments(text, name=name):
            return text
        clean = self._inside(text)
        for redactor in self.redactors:
            clean = redactor.redact(clean, name=name)
        return clean

    def _inside(self, text: str) -> str:
        """Return a text with the container that it spells out redacted: JSON, or Python's repr."""
        start = text.lstrip()[:1]
        if start not in ("{", "[", "(", '"') or len(text) > 50 * _LONGEST_LITERAL:
            return text
        write: Any = json.dumps
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            if len(text) > _LONGEST_LITERAL:
                return text
            write = repr
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                return text
        clean = self.value(value)
        return text if clean == _plain(value) else str(write(clean))

    def file(self, name: str, text: str) -> str:
        """Return the text of a file redacted; YAML and CSV are looked into, as JSON is."""
        description, suffix = PurePath(name).name == "MLmodel", PurePath(name).suffix.lower()
        if between := DELIMITED.get(suffix):
            text = by_columns(text, between=between, redact=lambda cell, n: self.text(cell, name=n))
        if not description and suffix not in (".yaml", ".yml"):
            return self.text(text)
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            return self.text(text)
        if not isinstance(value, dict | list):
            return self.text(text)
        if description and isinstance(value, dict):
            clean: Any = self._model(value)
        else:
            clean = self.value(value)
        if clean == _plain(value):
            return self.text(text)
        return self.text(yaml.safe_dump(clean, sort_keys=False, allow_unicode=True))

    def query(self, text: str) -> str:
        """Return a filter with the texts in it redacted, by the names that they are compared with.

        Raises:
            RedactionError: if text in the filter outside of its quoted texts would have to be taken
                out.
        """
        if self.text(text) == text:
            return text
        beside = _COMPARED.sub(lambda match: f"{match['name']} = ''", text)
        self.identifier(_QUOTED.sub("", beside), what="a filter")

        def literal(match: re.Match[str], name: str = "") -> str:
            quote = match[0][0]
            return f"{quote}{self.text(match[0][1:-1], name=name)}{quote}"

        def compared(match: re.Match[str]) -> str:
            side = _QUOTED.sub(literal, match["name"])
            name = match["name"].strip('`"')
            return side + match["is"] + _QUOTED.sub(lambda m: literal(m, name), match["text"])

        # Other quotes are in a list, or around a name between backticks.
        pieces, position = [], 0
        for match in _COMPARED.finditer(text):
            pieces += [_QUOTED.sub(literal, text[position : match.start()]), compared(match)]
            position = match.end()
        return "".join([*pieces, _QUOTED.sub(literal, text[position:])])

    def value(self, value: Any, *, name: str = "") -> Any:
        """Return texts, numbers and containers redacted, as lists and dicts of plain values."""
        clean = self._expanded(value, 0)
        for redactor in self.redactors:
            clean = redactor.redact(clean, name=name)
        return clean

    def _expanded(self, value: Any, depth: int) -> Any:
        """Return plain containers in which texts that are containers themselves are redacted."""
        if value is None or isinstance(value, bool | int | float) or depth > _MAX_DEPTH:
            return value
        if isinstance(value, str):
            return self._inside(value)
        if isinstance(value, bytes | bytearray):
            return value.decode(errors="replace")
        try:
            fields, items = fields_of(value), items_of(value)
        except Exception:  # noqa: BLE001 # a foreign mapping may raise anything; redact() drops it
            return value
        if fields is not None:
            clean = {key: self._expanded(item, depth + 1) for key, item in fields.items()}
            return self._table(clean)
        if items is not None:
            return [self._expanded(item, depth + 1) for item in items]
        return value

    def _table(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Redact a table by the names of its columns, if this is one (as ``log_table`` writes)."""
        columns, rows = fields.get("columns"), fields.get("data")
        if not (
            isinstance(columns, list)
            and isinstance(rows, list)
            and all(isinstance(row, list) and len(row) == len(columns) for row in rows)
        ):
            return fields
        data = [
            [self.value(cell, name=str(column)) for column, cell in zip(columns, row, strict=True)]
            for row in rows
        ]
        return {**fields, "data": data}

    def stored(self, value: Any, *, name: str) -> Any:
        """Return the value of a tag or a param as MLflow stores it, as text."""
        if value is None:
            return None
        if name == "mlflow.user":
            return REDACTED
        if name == "mlflow.source.name" and isinstance(value, str):
            value = PurePath(value).name
        if not isinstance(value, str):
            value = self.value(value, name=name)
            return value if isinstance(value, str) else self.text(str(value))
        if name == "mlflow.artifactLocation" and self._is_clean(without_experiment(value)):
            return value
        if len(value) in _CUT_LENGTHS and name.startswith("mlflow."):
            value = _CUT.sub(REDACTED, value)
        return self.text(value, name=name)

    def identifier(self, value: Any, *, what: str) -> Any:
        """Return an identifier or a place as it is.

        Raises:
            RedactionError: if the identifier holds text that would have to be taken out.
        """
        items = items_of(value)
        for item in [value] if items is None else items:
            if item is None or isinstance(item, int) or is_id(str(item)):
                continue
            if not self._is_clean(without_experiment(str(item))):
                raise RedactionError(
                    f"{what} holds a secret or personal data, and cannot be redacted, because it "
                    "would then mean something else. Choose another one. Nothing was sent."
                )
        return value

    def _is_clean(self, text: str) -> bool:
        return self.text(text) == text

    def argument(self, value: Any) -> Any:
        """Return whatever a method is given, redacted; entities stay entities.

        Raises:
            RedactionError: if its type is not classified.
        """
        if type(value) is list and known_clean(given := value[:], self.redactors):
            return given
        if value is None or isinstance(value, Enum | bool | int | float):
            return value  # enumerations before texts: some are both
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
            given = list(value)
            return _without_halves(_kept_apart(given, [self.argument(item) for item in given]))
        return self._entity(value)

    def _mapping(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for key, item in given.items():
            label = shown = self.text(str(key))
            number = 2
            while shown in clean:  # two names that differed only in what was taken out
                shown, number = f"{label}_{number}", number + 1
            if isinstance(item, str):
                clean[shown] = self.stored(item, name=str(key))
            else:
                clean[shown] = self.value(item, name=str(key))
        return clean

    def _entity(self, value: Any) -> Any:
        kinds: dict[str, Any] = {kind.__name__: kind for kind in type(value).__mro__}
        if type(value).__module__.startswith("mlflow.entities.span") and "Span" in kinds:
            return self._span(value, kinds["Span"])
        if type(value).__module__ == "mlflow.models.model" and "Model" in kinds:
            return kinds["Model"].from_dict(self._model(value.to_dict()))
        if isinstance(value, type) and hasattr(value, "model_json_schema"):
            return self.value(value.model_json_schema())
        if type(value).__name__ == "PromptModelConfig":
            return self.value(value.to_dict())
        kept = ENTITIES.get(type(value).__name__)
        if kept is None or not type(value).__module__.startswith("mlflow.entities"):
            raise RedactionError(
                f"an entity of type {type(value).__name__} cannot be checked for secrets and "
                "personal data, because its fields are not classified. Nothing was sent."
            )
        clean = copy.copy(value)
        name = str(getattr(value, "key", None) or getattr(value, "name", None) or "")
        for field, item in vars(value).items():
            if field in kept:
                shown = self.identifier(item, what=f"{field} of {type(value).__name__}")
            elif field in ("_value", "value") and type(value).__name__ == "Metric":
                shown = number_of(item)
            elif field in ("_value", "value") and isinstance(item, str):
                shown = self.stored(item, name=name)
            elif field in ("_value", "value"):
                shown = self.value(item, name=name)
            elif field in ("request_preview", "response_preview") and isinstance(item, str):
                shown = self.stored(item, name="mlflow.trace")
            elif field in ("_user_id", "user_id", "source_id"):
                shown = item and REDACTED
            else:
                shown = self.argument(item)
            # Some are frozen dataclasses.
            object.__setattr__(clean, field, shown)
        return clean

    def _model(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        # {"name": "password", "type": "string"} is a column here, not a secret and its value.
        signature = fields.get("signature") or {}
        clean: dict[str, Any] = self.value({**fields, "signature": None})
        place = fields.get("artifact_path")
        if isinstance(place, str) and self._is_clean(without_experiment(place)):
            clean["artifact_path"] = place
        if not signature:
            return {key: item for key, item in clean.items() if key != "signature"}
        clean["signature"] = {
            part: spec and json.dumps([self._column(column) for column in json.loads(spec)])
            for part, spec in signature.items()
        }
        return clean

    def _column(self, column: Any) -> Any:
        if not isinstance(column, Mapping):
            return self.value(column)
        name = str(column.get("name", ""))
        return {
            key: self.value(item, name=name if key == "default" else "")
            for key, item in column.items()
        }

    def _span(self, span: Any, kind: Any) -> Any:
        return kind.from_dict(self.span(span.to_dict()))

    def span(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return a span as ``Span.to_dict`` writes it, redacted; its resource is left out."""
        clean = dict(fields)
        clean["name"] = self.text(str(fields["name"]))
        status = dict(fields["status"])
        status["message"] = status.get("message") and self.text(str(status["message"]))
        clean["status"] = status
        clean["attributes"] = self._attributes(fields["attributes"])
        clean["events"] = [
            {
                **event,
                "name": self.text(str(event["name"])),
                "attributes": self._attributes(event.get("attributes") or {}),
            }
            for event in fields.get("events", ())
        ]
        clean["links"] = [
            {**link, "attributes": self._attributes(link.get("attributes") or {})}
            for link in fields.get("links", ())
        ]
        return clean

    def _attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for key, item in dict(attributes).items():
            if isinstance(item, str):
                item = self._attribute(item, name=key)
            elif items_of(item) is not None:
                item = [self.value(part, name=key) for part in item]
            else:
                item = self.value(item, name=key)
            clean[self.text(key)] = item
        return clean

    def _attribute(self, text: str, *, name: str) -> str:
        """Return an attribute, which MLflow keeps as JSON, redacted and still JSON."""
        try:
            value = json.loads(text)
        except ValueError:
            return self.text(text, name=name)
        if isinstance(value, str) and is_id(value):
            return text
        clean = self.value(value, name=name)
        return text if clean == _plain(value) else json.dumps(clean)


def _kept_apart(given: Sequence[Any], clean: list[Any]) -> list[Any]:
    """Number the keys of entities that differed only in what was taken out."""
    owners: dict[str, str] = {}
    for before, after in zip(given, clean, strict=True):
        key = getattr(after, "_key", None)
        if not isinstance(key, str):
            continue
        number = 2
        while owners.setdefault(after._key, before._key) != before._key:
            after._key, number = f"{key}_{number}", number + 1
    return clean


def _without_halves(clean: list[Any]) -> list[Any]:
    """Take out a secret that stands half in one param or tag, half in the next."""
    texts = [getattr(entity, "_value", None) for entity in clean]
    if len(texts) > 1 and all(isinstance(text, str) for text in texts):
        for number, rule in halves(texts).items():  # type: ignore[arg-type]
            clean[number]._value = REDACTED
            finding_counts.count(rule)
    return clean


def _plain(value: Any) -> Any:
    """Return what redacting makes of a value in which there is nothing to take out."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value
