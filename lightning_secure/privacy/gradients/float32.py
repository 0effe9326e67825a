"""Float32 that is float32, whatever the user allows for the model.

``torch.set_float32_matmul_precision("medium")``, which Lightning advises, has products rounded to
TF32 or bfloat16, convolutions on CUDA are TF32 by default, and a backward pass may run under
autocast. The bounds on rounding, by which no row is clipped too little, hold for none of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch

_PRODUCTS: Final = (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
_ARITHMETIC: Final = (*_PRODUCTS, ("cudnn", "rnn"))
_DEVICES: Final = ("cpu", "cuda")


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Have products and convolutions of float32 rounded to float32 in the block, and no autocast.

    What was set is put back afterwards. It is set for the process, not for the thread.
    """
    with contextlib.ExitStack() as stack:
        _set_exact(stack, _PRODUCTS)
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.callback(torch.set_autocast_enabled, device, True)
                torch.set_autocast_enabled(device, False)
        yield


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Have float32 be float32 in a block that runs the model, recurrent layers included.

    Rounded to TF32, batches of other sizes differ by their kernels. torch's older settings are set
    as well, and agree with the newer ones in the block: reading them, as ``cudnn.flags`` does,
    raises where they do not.
    """
    with contextlib.ExitStack() as stack:
        for setting in _settings(_ARITHMETIC):
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
        # They do not agree where the newer ones were used alone; what holds then are those.
        with contextlib.suppress(RuntimeError):
            before = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, before)
        with contextlib.suppress(RuntimeError):
            stack.callback(
                setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32
            )
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        _set_exact(stack, _ARITHMETIC)
        yield


def _settings(names: Iterable[tuple[str, str]]) -> Iterator[Any]:
    for backend, kind in names:
        yield getattr(getattr(torch.backends, backend), kind)


def _set_exact(stack: contextlib.ExitStack, names: Iterable[tuple[str, str]]) -> None:
    for setting in _settings(names):
        if setting.fp32_precision not in ("ieee", "none"):
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"
