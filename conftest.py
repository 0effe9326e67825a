"""Names that every docstring example may use: an empty folder, and a key provider in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from lightning_secure import LocalKeyProvider
from lightning_secure.util import events


@pytest.fixture(autouse=True)
def _example_names(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]
) -> Iterator[None]:
    """Give an example its own ``folder`` and ``keys``, and undo what it registers."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    folder: Path = request.getfixturevalue("tmp_path")
    keys = LocalKeyProvider.generate(folder / "project.kek")
    doctest_namespace.update(folder=folder, keys=keys)
    registries: list[dict[str, Any]] = [events._listeners, StrategyRegistry]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
