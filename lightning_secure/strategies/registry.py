"""The names under which a Trainer finds the private strategies: ``Trainer(strategy="private")``."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, Final

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.config import DPConfig

#: From the name to the module and class.
NAMES: Final = {
    "private": ("private", "PrivateStrategy"),
    "private_ddp": ("ddp", "PrivateDDPStrategy"),
    "private_fsdp": ("fsdp", "PrivateFSDPStrategy"),
}


def register_strategies(config: DPConfig, **options: Any) -> None:
    """Let ``Trainer(strategy="private")`` and the other names train under ``config``.

    Args:
        config: The promise of every Trainer that is made with one of the names from now on, in this
            process; a later call replaces it.
        options: Further arguments of the strategies, such as ``public_metrics``.

    There is no default: the data's owner decides how much may be revealed, where it can be read
    and reviewed. Without it the names raise an error that says so. In a file of
    LightningCLI, name the class instead: ``class_path: lightning_secure.PrivateStrategy``, with
    ``config`` among its ``init_args``.

    Raises:
        ConfigError: if ``config`` is no :class:`~lightning_secure.privacy.config.DPConfig`.

    >>> import lightning.pytorch as pl
    >>> register_strategies(DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0))
    >>> type(pl.Trainer(strategy="private", logger=False).strategy).__name__
    'PrivateStrategy'
    """
    if not isinstance(config, DPConfig):
        raise ConfigError(
            f"register_strategies takes a DPConfig, not {type(config).__name__}. Nothing was "
            "registered."
        )
    for name in NAMES:
        _register(name, partial(_made, name, config, **options))


def register_names() -> None:
    """Make the names known, so that they fail with an error that says what is missing."""
    for name in NAMES:
        if name not in StrategyRegistry:
            _register(name, partial(_unconfigured, name))


def _register(name: str, make: Any) -> None:
    StrategyRegistry.register(name, make, description=f"lightning_secure: {name}", override=True)


def _made(name: str, config: DPConfig, **options: Any) -> Strategy:
    module, strategy = NAMES[name]
    home = importlib.import_module(f"lightning_secure.strategies.{module}")
    made: Strategy = getattr(home, strategy)(config, **options)
    return made


def _unconfigured(name: str) -> Strategy:
    strategy = NAMES[name][1]
    raise ConfigError(
        f"Trainer(strategy={name!r}) does not say how much may be revealed, and there is no "
        f"default. Pass Trainer(strategy={strategy}(DPConfig(target_epsilon=..., delta=..., "
        "max_grad_norm=...))), or call register_strategies(DPConfig(...)) first."
    )
