"""Metrics in which nothing is to be taken out, told from what redactors remember."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

from lightning_secure.redaction.redactor import Redactor

_FIELDS: Final = (
    "_key", "_value", "_timestamp", "_step", "_model_id", "_dataset_name", "_dataset_digest",
    "_run_id",
)  # fmt: skip


def known_clean(entities: Sequence[Any], redactors: Sequence[Redactor]) -> bool:
    """Return whether these are metrics in which redacting would change nothing.

    A step logs the names of the step before with new numbers, and would otherwise wait until each
    has been looked at, by the client and by the store. If not, nothing is known of them: they may
    be entities of other kinds, have a name that is new, or a field that a newer MLflow brings.

    Args:
        entities: What MLflow is to store.
        redactors: Those that would look at them.

    Guarantees:
        Each is a ``Metric`` of a name that every redactor remembers as clean, with a number, two
        whole numbers for its time and step, and no other field set.
    """
    module = sys.modules.get("mlflow.entities.metric")
    metric = None if module is None else module.Metric
    names = []
    for entity in entities:
        if type(entity) is not metric:
            return False
        fields = vars(entity)
        if tuple(fields) != _FIELDS:
            return False
        name, value, timestamp, step, model_id, dataset, digest, run_id = fields.values()
        if (
            type(name) is not str
            or not name[:1].isalpha()  # the text of a container, perhaps, which is looked into
            or (type(value) is not float and type(value) is not int)
            or type(timestamp) is not int
            or type(step) is not int
            or model_id is not None
            or dataset is not None
            or digest is not None
            or run_id is not None
        ):
            return False
        names.append(name)
    return all(redactor.remembers(names) for redactor in redactors)
