"""MLflow's own ids, told from numbers of cards and of people by where they stand.

A file store numbers experiments with eighteen random digits, Databricks with as many; one in a
hundred of them is a card's number as far as digits tell.
"""

from __future__ import annotations

import re
from typing import Final

# r, m, tr and so on are MLflow's prefixes; experiments have numbers, versions too.
_ID: Final = re.compile(r"(?:[a-z]{1,3}-)?[0-9a-f]{8}[0-9a-f-]{0,56}|\d{1,32}")
_EXPERIMENT: Final = re.compile(
    r"(?<=/)\d{1,32}(?=/(?:[0-9a-f]{32}|models/m-[0-9a-f]{32}|traces/tr-[0-9a-f]{32})(?:/|$))"
)
_TAG: Final = "_mlflow_experiment_ids"  # of prompts, and as filters name it
_LISTED: Final = re.compile(r"%?,?\d{18}(?:,\d{18})*,?%?")


def is_id(text: str) -> bool:
    """Return whether a text has the form of an id that MLflow makes.

    >>> is_id("53af2b4682a54b3a9a0ef0bd03503277"), is_id("jo@clinic.example")
    (True, False)
    """
    return _ID.fullmatch(text) is not None


def without_experiment(place: str) -> str:
    """Return a place without the number of an experiment before a run, a model or a trace.

    >>> without_experiment("file:///runs/614660148694459054/53af2b4682a54b3a9a0ef0bd03503277/a")
    'file:///runs//53af2b4682a54b3a9a0ef0bd03503277/a'
    """
    return _EXPERIMENT.sub("", place)


def lists_experiments(text: str, *, name: str) -> bool:
    """Return whether a text is MLflow's list of the experiments of a prompt, or looks for one."""
    return name.removeprefix("tags.") == _TAG and _LISTED.fullmatch(text) is not None
