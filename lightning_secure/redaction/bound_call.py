"""Binding of a call's arguments to a method's parameters, by their names."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

_BY_POSITION: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD
_BY_NAME: Final = (_BY_POSITION, inspect.Parameter.KEYWORD_ONLY)


class Parameters:
    """The parameters of a method.

    Args:
        method: The method.

    Guarantees:
        Names go with arguments as ``inspect.Signature.bind`` has it. That takes several
        microseconds a call, which every step would wait for, and is used for the rest only:
        parameters like ``*args``, and calls that cannot be.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._signature = inspect.signature(method)
        parameters = self._signature.parameters.values()
        self._plain = all(p.kind in _BY_NAME for p in parameters)
        self._positional = tuple(p.name for p in parameters if p.kind is _BY_POSITION)
        self._names = frozenset(p.name for p in parameters)
        self._needed = frozenset(p.name for p in parameters if p.default is p.empty)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return what is given to each parameter.

        Raises:
            TypeError: if the method does not take these arguments.
        """
        given = dict(zip(self._positional, args, strict=False))
        given.update(kwargs)
        if (
            self._plain
            and len(given) == len(args) + len(kwargs)  # none too many, none twice
            and self._needed <= given.keys() <= self._names
        ):
            return given
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def spread(self, given: dict[str, Any]) -> tuple[Iterable[Any], dict[str, Any]]:
        """Return the positional and the named arguments of the call that gives ``given``."""
        if not self._plain:
            bound = inspect.BoundArguments(self._signature, OrderedDict(given))
            return bound.args, bound.kwargs
        named = given.copy()
        args = []
        for name in self._positional:
            if name not in named:
                break
            args.append(named.pop(name))
        return args, named
