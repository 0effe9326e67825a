"""Runs in the peers' environment: imports what cannot be imported the usual way.

``import streaming`` imports ``streaming.vision``, and that torchvision, whose build on PyPI does
not import beside a CPU build of torch. All of MDS lies in ``streaming.base``, which does not need
it. So the package is made known without running its ``__init__``; every line of it that runs is
the library's own.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any


def mosaicml_streaming() -> Any:
    """Return ``streaming.base``, with ``MDSWriter`` and ``StreamingDataset``."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError("mosaicml-streaming is not installed: make peers")
        package = types.ModuleType("streaming")
        package.__spec__ = spec
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    import streaming.base

    return streaming.base
