"""The content of values, whichever library's containers they are in."""

from __future__ import annotations

import contextlib
import dataclasses
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

from lightning_secure.errors import RedactionError


def fields_of(value: Any) -> dict[str, Any] | None:
    """Return what stands under names in ``value``, or None if nothing does.

    Of mappings (OmegaConf's too), dataclasses, namespaces, named tuples, attrs and pydantic. A name
    that is not text becomes text.

    >>> from types import SimpleNamespace
    >>> fields_of(SimpleNamespace(lr=0.1)), fields_of([0.1])
    ({'lr': 0.1}, None)
    """
    fields: Mapping[Any, Any] | None = None
    if isinstance(value, Mapping):
        fields = value
    elif isinstance(value, type):
        return None
    elif dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    elif isinstance(value, Namespace | SimpleNamespace):
        fields = vars(value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = dict(zip(value._fields, value, strict=True))
    elif hasattr(value, "__attrs_attrs__"):
        fields = {a.name: getattr(value, a.name, None) for a in value.__attrs_attrs__}
    elif hasattr(type(value), "model_fields"):
        fields = {**vars(value), **(getattr(value, "model_extra", None) or {})}
    return None if fields is None else _under_text(fields)


def items_of(value: Any) -> list[Any] | None:
    """Return what stands one after another in ``value``, or None if nothing does.

    >>> items_of((1, 2)), items_of({"lr": 0.1})
    ([1, 2], None)
    """
    if isinstance(value, str | bytes | bytearray | memoryview | range):
        return None
    if isinstance(value, Sequence | AbstractSet | deque | ValuesView):
        return list(value)
    return None


def number_of(value: Any) -> float:
    """Return the value of a metric.

    Raises:
        RedactionError: if the value is no number. Python's own error would repeat a text that was
            given instead.

    >>> number_of("0.5")
    0.5
    """
    number = None
    # Of a list, of what is too large, and of a tensor of several numbers.
    with contextlib.suppress(ValueError, TypeError, OverflowError, RuntimeError):
        number = float(value)
    if number is None:
        raise RedactionError(
            f"the value of a metric is not a number but {type(value).__name__}. Nothing was sent."
        )
    return number


def _under_text(fields: Mapping[Any, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in fields.items():
        text = str(key)
        while text in result:  # 1 and "1"
            text += "'"
        result[text] = item
    return result
