"""Float32 that is float32, whatever the user allows for the model.

``torch.set_float32_matmul_precision("medium")``, which Lightning advises, has products rounded to
TF32 or bfloat16, convolutions on CUDA are TF32 by default, and a backward pass may run under
autocast. The bounds on rounding, by which no row is clipped too little, hold for none of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, cast

import torch

__all__ = ["exact_products"]

_BACKENDS: Final = (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
_DEVICES: Final = ("cpu", "cuda")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Have products and convolutions of float32 rounded to float32 in the block, and no autocast.

    What was set is put back afterwards. It is set for the process, not for the thread.
    """
    with contextlib.ExitStack() as stack:
        for backend, kind in _BACKENDS:
            setting = cast("Any", getattr(getattr(torch.backends, backend), kind))
            if setting.fp32_precision not in ("ieee", "none"):
                stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
                setting.fp32_precision = "ieee"
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.callback(torch.set_autocast_enabled, device, True)
                torch.set_autocast_enabled(device, False)
        yield
