"""Stores that redact: generated from MLflow's own, method by method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from enum import Enum
from typing import Any, Final

from lightning_secure.errors import RedactionError
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.bound_call import Parameters
from lightning_secure.redaction.mlflow_store.argument_kinds import ARGUMENTS, CHECKED, Kind
from lightning_secure.redaction.mlflow_store.sinks import label_of, limited, sinks_of
from lightning_secure.redaction.mlflow_store.values import Policy
from lightning_secure.redaction.redactor import REDACTED

_MARK: Final = "_lightning_secure_guarded"
# Set while a method of MLflow runs: the methods that it calls get redacted values already. Other
# threads begin outside, and redact once more.
_INSIDE: Final[ContextVar[bool]] = ContextVar("lightning_secure_inside", default=False)


def is_guarded(value: object) -> bool:
    """Return whether an object is a store or a repository that redacts."""
    return getattr(type(value), _MARK, False) is True


def guarded(value: Any, kind: Callable[[type], type]) -> Any:
    """Return the same object, from now on of the class that ``kind`` makes of its own.

    It stays an instance of what it was, which MLflow asks for in places; references that are held
    already now lead to a redacting one.
    """
    if not is_guarded(value):
        value.__class__ = kind(type(value))
    return value


def guarded_class(cls: type, policy: Policy) -> type:
    """Return a subclass of a store's class whose every public method is redacted or refused."""

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any] | None:
        return _checked(method, policy) if name in CHECKED else None

    return guarding(cls, wrap)


def guarding(
    cls: type, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any] | None]
) -> type:
    """Return a subclass of ``cls`` whose public methods are those that ``wrap`` makes of its own.

    Args:
        cls: A class of MLflow's.
        wrap: Is given a method's name and the method. If it returns None, the method is refused.
    """
    members: dict[str, Any] = {_MARK: True, "__module__": __name__}
    for name in dir(cls):
        if name.startswith("_") or not inspect.isfunction(inspect.getattr_static(cls, name)):
            continue  # properties and static methods are given nothing to store
        method = getattr(cls, name)
        members[name] = _inside(method, wrap(name, method) or _refusing(name))
    return type(f"Redacting{cls.__name__}", (cls,), members)


def _inside(method: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guard(*args: Any, **kwargs: Any) -> Any:
        return (method if _INSIDE.get() else outer)(*args, **kwargs)

    return guard


def call_inside(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of MLflow's with what is redacted already."""
    token = _INSIDE.set(True)
    try:
        return method(*args, **kwargs)
    finally:
        _INSIDE.reset(token)


def _refusing(name: str) -> Callable[..., Any]:
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RedactionError(
            f"{name} of MLflow's {type(self).__bases__[0].__name__} is not checked for secrets and "
            "personal data, so it was refused and nothing was sent."
        )

    return refused


def _checked(method: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    parameters = Parameters(method)
    own, *others = inspect.signature(method).parameters  # own: self
    label = {  # of what something is taken out of; the rest is refused or passes
        name: label_of(method.__name__, name, ARGUMENTS[name])
        for name in others
        if ARGUMENTS.get(name) in (Kind.TEXT, Kind.FILTER)
    }
    sinks = {sink for name in others for sink in sinks_of(method.__name__, name)}

    def redacted(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(args, kwargs)
        clean: dict[str, Any] = {}
        strict = policy.rules.strict
        for name, value in given.items():
            if name == own or value is None:
                clean[name] = value
            elif isinstance(value, list) and not value:
                clean[name] = []
            elif name not in label:
                clean[name] = _argument(policy, method.__name__, name, given)
            else:
                with finding_counts.looking(label[name], strict=strict):
                    clean[name] = _argument(policy, method.__name__, name, given)
        unsent = None
        if policy.rules.limits(sinks):
            unsent = limited(policy.rules, method.__name__, clean)
        finding_counts.announce()
        if unsent is not None:
            return unsent.answer
        positional, named = parameters.spread(clean)
        return call_inside(method, *positional, **named)

    return redacted


def _argument(policy: Policy, method: str, name: str, given: Mapping[str, Any]) -> Any:
    value = given[name]
    kind = ARGUMENTS.get(name)
    if kind is Kind.PERSON:
        return REDACTED
    if kind is Kind.FILTER:
        return policy.query(str(value))
    if kind in (Kind.ID, Kind.PLACE):
        return policy.identifier(value, what=f"{name} of {method}")
    if kind is Kind.PLAIN:
        if isinstance(value, str) and not isinstance(value, Enum) and name != "page_token":
            policy.identifier(value, what=f"{name} of {method}")
        return value
    if kind is Kind.TEXT:
        if name == "value" and "key" in given:
            return policy.stored(value, name=str(given["key"]))
        return policy.argument(value)
    raise RedactionError(
        f"argument {name!r} of {method} is not checked for secrets and personal data, because "
        "its content is not classified. Nothing was sent."
    )
