"""Checks of arguments that name the argument: ``positive(max_grad_norm=value)``."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

from lightning_secure.errors import ConfigError


def positive(**values: float | None) -> None:
    """Require finite numbers above zero; None passes.

    Raises:
        ConfigError: if an argument is not a finite number above zero; the message names the
            argument.

    >>> positive(max_grad_norm=0.0)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: max_grad_norm must be a finite number above 0, not 0.0.
    """
    for name, value in values.items():
        if value is not None and not (_number(value) and math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number above 0, not {value!r}.")


def positive_int(**values: int | None) -> None:
    """Require whole numbers above zero; None passes.

    Raises:
        ConfigError: if an argument is not a whole number above zero; the message names the
            argument.

    >>> positive_int(threads=0)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: threads must be ...
    """
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} must be a whole number above 0, not {value!r}.")


def open_unit_interval(**values: float) -> None:
    """Require numbers above 0 and below 1.

    Raises:
        ConfigError: if an argument is not a number above 0 and below 1; the message names the
            argument.

    >>> open_unit_interval(delta=1.5)
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: delta must ...
    """
    for name, value in values.items():
        if not (_number(value) and 0 < value < 1):
            raise ConfigError(f"{name} must lie between 0 and 1, not {value!r}.")


def whole_number(value: Any) -> int | None:
    """Return a whole number of any type as an int; None for anything else, also True and 1.0.

    >>> import numpy as np
    >>> whole_number(np.int64(3)), whole_number(3.0), whole_number(True)
    (3, None, None)
    """
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    return None


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
