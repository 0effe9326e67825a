"""Leaving out what a policy does not let pass: by method and argument, what is stored where.

It comes after redaction, so names are compared as they would be stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final, NamedTuple

from lightning_secure.errors import RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.mlflow_store.argument_kinds import Kind, words
from lightning_secure.redaction.policy import Rules
from lightning_secure.redaction.redactor import REDACTED

_ABOUT: Final[dict[str, str]] = {
    **dict.fromkeys(
        words(
            "create_assessment create_issue deprecated_end_trace_v2 deprecated_start_trace_v2 "
            "link_prompts_to_trace link_traces_to_run log_spans log_spans_async set_trace_tag "
            "start_trace unlink_traces_from_run update_assessment update_issue"
        ),
        "traces",
    ),
    **dict.fromkeys(
        words(
            "copy_model_version create_logged_model create_model_version create_prompt "
            "create_prompt_version create_registered_model log_logged_model_params "
            "record_logged_model set_logged_model_tags set_model_version_tag set_prompt_tag "
            "set_prompt_version_tag set_registered_model_tag update_model_version "
            "update_registered_model"
        ),
        "models",
    ),
    **dict.fromkeys(
        words("create_dataset log_inputs set_dataset_tags upsert_dataset_records"), "datasets"
    ),
}
_BY_ARGUMENT: Final = {
    "metric": "metrics",
    "metrics": "metrics",
    "param": "params",
    "params": "params",
    "tag": "tags",
    "tags": "tags",
    "key": "tags",  # with a value beside it
    "value": "tags",
    "mlflow_model": "tags",
}
#: One thing, several or a mapping of them, that pass by their own names.
KEYED: Final = words("metadata metric metrics param params request_metadata tag tags")
#: Texts and containers that pass by the name of the argument.
FIELDS: Final = words(
    "categories description expectation feedback model_config model_type rationale records "
    "response_format root_causes template"
)
#: Names MLflow needs as identifiers: kept, redacted.
NAMES: Final = words(
    "alias dst_name experiment_name models name new_name prompt_versions run_name workspace_name"
)
#: Each of which is taken apart by a function of its own.
WHOLE: Final = words("assessment datasets key mlflow_model spans src_mv trace_info value")

# Ids and places without which MLflow does not find its way, and names that stay in any mode.
_MLFLOWS_OWN: Final = words(
    "_mlflow_experiment_ids _mlflow_prompt_type mlflow.artifactLocation "
    "mlflow.assessment.sourceRunId mlflow.experimentId mlflow.linkedPrompts mlflow.modelId "
    "mlflow.parentRunId mlflow.prompt.associatedRunIds mlflow.prompt.is_prompt mlflow.runName "
    "mlflow.sourceRun mlflow.spanType mlflow.trace.sizeBytes mlflow.trace.sizeStats "
    "mlflow.trace.spansLocation mlflow.traceName mlflow.traceRequestId mlflow.trace_schema.version"
)
#: Before the names of this package's own tags: what a run has spent of its privacy is said before
#: what it was spent on.
OURS: Final = "lightning_secure."
_HISTORY: Final = "mlflow.log-model.history"
_TEMPLATE: Final = "mlflow.prompt.text"


class Unsent(NamedTuple):
    """A call of which nothing is left to be stored.

    Attributes:
        answer: What MLflow is given in place of the store's.
    """

    answer: Any


def sinks_of(method: str, argument: str) -> tuple[str, ...]:
    """Return the sinks that an argument of a method has to pass."""
    both = (_BY_ARGUMENT.get(argument), _ABOUT.get(method))
    return tuple(sink for sink in both if sink is not None)


def label_of(method: str, argument: str, kind: Kind) -> str:
    """Return in what the audit log says that something was found."""
    if kind is Kind.FILTER:
        return "queries"
    return _ABOUT.get(method) or _BY_ARGUMENT.get(argument) or "names"


def limited(rules: Rules, method: str, given: MutableMapping[str, Any]) -> Unsent | None:
    """Leave out of a call's arguments what may not be stored.

    Args:
        rules: Say what may.
        method: Of one of MLflow's stores.
        given: Its arguments by name, redacted; those that are limited are exchanged.

    Returns:
        None if the call may go on.

    Raises:
        RedactionError: if nothing may be stored, and MLflow cannot go on without it.
    """
    if _ABOUT.get(method) == "traces" and rules.drops("traces"):
        _left_out("traces")
        return _without_trace(method, given)
    if method == "update_assessment" and given["assessment_id"] is None:
        return Unsent(None)  # of one that was left out
    pair = "key" in given and "value" in given
    before = bool(given.get("datasets"))
    for argument, value in list(given.items()):
        sinks = sinks_of(method, argument)
        if value is None or not rules.limits(sinks):
            continue
        passes = _passing(rules, sinks)
        if (argument == "key" and pair) or argument == "mlflow_model":
            if not passes(value if argument == "key" else _HISTORY):
                return Unsent(None)
        elif argument in KEYED:
            kept = _keyed(value, passes)
            if kept is None:  # the only thing that the call would have stored
                return _nothing(method)
            given[argument] = kept
        elif argument in FIELDS:
            if not passes(argument):
                given[argument] = _blank(value)
        elif argument == "spans":
            given[argument] = [
                type(span).from_dict(limited_span(rules, span.to_dict())) for span in value
            ]
        elif argument == "assessment":
            given[argument] = _assessment(value, passes)
            if given[argument] is None:
                return Unsent(value)
        elif argument in _PARTS:
            given[argument] = _PARTS[argument](rules, value, passes)
    if method in ("log_batch", "log_batch_async") and not any(
        given.get(argument) for argument in ("metrics", "params", "tags")
    ):
        return _nothing(method)
    if method == "log_inputs" and before and not given["datasets"] and not given.get("models"):
        return Unsent(None)
    return None


def limited_span(rules: Rules, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a span as ``Span.to_dict`` writes it, without what may not be stored."""
    passes = _passing(rules, ("traces",))
    status = fields["status"]
    if status.get("message") and not passes("status.message"):
        status = {**status, "message": ""}
    return {
        **fields,
        "status": status,
        "attributes": _kept(fields["attributes"], passes),
        "events": [event for event in fields.get("events") or () if passes(str(event["name"]))],
        "links": [
            {**link, "attributes": _kept(link.get("attributes") or {}, passes)}
            for link in fields.get("links") or ()
        ],
    }


def limited_trace_data(rules: Rules, text: str) -> str:
    """Return the spans of a trace, which are JSON, without what may not be stored."""
    data = json.loads(text)
    return json.dumps({**data, "spans": [limited_span(rules, span) for span in data["spans"]]})


def _passing(rules: Rules, sinks: Sequence[str]) -> Callable[[str], bool]:
    ours = "tags" in sinks
    mlflows = ours or not {"params", "metrics"}.intersection(sinks)

    def passes(name: str) -> bool:
        if (mlflows and name in _MLFLOWS_OWN) or (ours and name.startswith(OURS)):
            return True
        if rules.passes(sinks, name):
            return True
        _left_out(sinks[-1])
        return False

    return passes


def _left_out(sink: str) -> None:
    with finding_counts.looking(sink):
        finding_counts.count("policy")


def _keyed(value: Any, passes: Callable[[str], bool]) -> Any:
    if isinstance(value, Mapping):
        return _kept(value, passes)
    if not isinstance(value, list):
        return value if passes(str(value.key)) else None
    kept = []
    for entity in value:
        if passes(str(entity.key)):
            kept.append(entity)
        elif entity.key == _TEMPLATE:  # without one it is no prompt
            kept.append(copy.copy(entity))
            kept[-1]._value = REDACTED
    return kept


def _kept(value: Mapping[str, Any], passes: Callable[[str], bool]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if passes(key)}


def _blank(value: Any) -> Any:
    """Return what stands where MLflow wants something."""
    if isinstance(value, list):
        return REDACTED if value and isinstance(value[0], Mapping) and "role" in value[0] else []
    return REDACTED if isinstance(value, str) else None


def _nothing(method: str) -> Unsent:
    if not method.endswith("_async"):
        return Unsent(None)
    from mlflow.utils.async_logging.run_operations import RunOperations

    return Unsent(RunOperations([]))  # type: ignore[no-untyped-call]


def _without_trace(method: str, given: Mapping[str, Any]) -> Unsent:
    if method == "start_trace":
        info = given["trace_info"]
        # As a store does that has the spans itself: MLflow would look for another place for them.
        info.tags["mlflow.trace.spansLocation"] = "TRACKING_STORE"
        return Unsent(info)
    if method == "create_assessment":
        return Unsent(given["assessment"])
    if method == "log_spans":
        return Unsent(given["spans"])
    if method in ("create_issue", "deprecated_start_trace_v2", "deprecated_end_trace_v2"):
        raise RedactionError(
            f"a policy drops traces, and {method} of MLflow's store has to return what it has "
            "stored, so it was refused. Nothing was sent."
        )
    return Unsent(None)


def _trace_info(rules: Rules, value: Any, passes: Callable[[str], bool]) -> Any:
    info = copy.copy(value)
    for field in ("request_preview", "response_preview", "client_request_id"):
        if getattr(info, field) is not None and not passes(field):
            setattr(info, field, None)
    info.trace_metadata = _kept(info.trace_metadata, passes)
    info.tags = _kept(info.tags, _passing(rules, ("tags", "traces")))
    info.assessments = [
        kept for one in info.assessments if (kept := _assessment(one, passes)) is not None
    ]
    return info


def _assessment(value: Any, passes: Callable[[str], bool]) -> Any:
    if not passes(str(value.name)):
        return None
    kept = copy.copy(value)
    kept.metadata = _kept(value.metadata, passes) if value.metadata else value.metadata
    return kept


def _datasets(rules: Rules, value: Any, passes: Callable[[str], bool]) -> Any:
    if rules.drops("datasets"):
        _left_out("datasets")
        return []
    kept = copy.deepcopy(value)
    for used in kept:
        for field in ("_source", "_schema", "_profile"):
            if getattr(used.dataset, field) is not None and not passes(field[1:]):
                setattr(used.dataset, field, REDACTED if field == "_source" else None)
        of_tags = _passing(rules, ("tags", "datasets"))
        used._tags = [tag for tag in used.tags if of_tags(str(tag.key))]
    return kept


def _source_version(rules: Rules, value: Any, passes: Callable[[str], bool]) -> Any:
    kept = copy.copy(value)
    kept._tags = _kept(value.tags, _passing(rules, ("tags", "models")))
    if kept._description and not passes("description"):
        kept._description = REDACTED
    return kept


_PARTS: Final[dict[str, Callable[[Rules, Any, Callable[[str], bool]], Any]]] = {
    "trace_info": _trace_info,
    "datasets": _datasets,
    "src_mv": _source_version,
}
