"""Private attributes of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils.data._utils.pin_memory import pin_memory as _pin_memory

#: Where ``torch.nn.functional`` finds its compiled functions, however it was imported.
FUNCTIONS: Final[Any] = torch._C._nn
#: Pins the tensors of nested containers, and returns them in containers of the same kinds.
pin_memory: Final[Callable[[Any], Any]] = _pin_memory


def is_view(tensor: Tensor) -> bool:
    """Return whether a tensor shares its memory with another one, as autograd knows it.

    >>> weight = torch.ones(4)
    >>> is_view(weight), is_view(weight[:2])
    (False, True)
    """
    return tensor._is_view()


def writes(tensor: Tensor) -> int:
    """Return how often a tensor was written in place; 0 of one made in inference mode.

    >>> weight = torch.ones(4)
    >>> writes(weight), writes(weight.zero_())
    (0, 1)
    """
    return 0 if tensor.is_inference() else tensor._version


def put_hook_first(parameter: nn.Parameter, handle: Any) -> None:
    """Have a hook of a parameter's gradient run before all others of it."""
    hooks: Any = parameter._backward_hooks
    others = {key: hook for key, hook in hooks.items() if key != handle.id}
    for key in others:  # put in again: torch does not ask for the order of an OrderedDict
        del hooks[key]
    hooks.update(others)


def mps_generator(module: Any) -> torch.Generator:
    """Return the default generator of ``torch.mps``."""
    generator: torch.Generator = module._get_default_mps_generator()
    return generator


def fsdp_precision(module: Any) -> Any:
    """Return the ``MixedPrecisionPolicy`` that ``fully_shard`` was given for a module."""
    return module._get_fsdp_state()._mp_policy


def state_dict_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that run before a module's ``state_dict``, to be changed in place."""
    return module._state_dict_pre_hooks
