"""Weights that ``fully_shard`` (FSDP2) has spread over processes: whole, sharded, and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from lightning_secure.compat.torch import fsdp_precision, state_dict_hooks
from lightning_secure.errors import (
    PrivacyError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.collective import Parameters, Processes, answered

_WHERE: Final = "in configure_model, as in fully_shard(self.net, mesh=self.device_mesh[...])"


class Sharded(Processes):
    """Several processes, over which ``fully_shard`` (FSDP2) has spread the weights of the model.

    During a training step every process has all weights, gathered once. So processes need not run
    as many chunks as others, and nothing is exchanged for a chunk.

    Attributes:
        trying: Whether this process runs trial rows: it looks at the state it has itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trying = False
        self._model: nn.Module | None = None
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []

    def connect(self, device: torch.device) -> None:
        """Begin a run."""
        super().connect(device)
        self._model = None

    @contextlib.contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        """Have all weights whole while a block runs, in which nothing is exchanged for them.

        In the block forward passes gather nothing, and backward passes neither reduce gradients
        nor let go of weights: so processes need not run as many of them as others.

        Raises:
            UnsupportedModelError: if a trainable weight is not sharded over all processes alike.
            UnsupportedTrainerOptionError: if ``fully_shard`` was given a policy.
            PrivacyError: if another process has gone.
        """
        put_back(model)
        if model is not self._model:  # before the first step
            with self.together():
                require_alike(model, size=self.size)
                require_on(model, self._device)
            self._model, self._places = model, _places(model)
        modules = _sharding(model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.set_reshard_after_forward(False, recurse=False)
        try:
            # Gathered anew in any case: what an earlier pass has left may be older weights, and
            # whether they require grad is taken over now.
            answered(lambda: [module.unshard() for module in modules])
            yield
        finally:
            put_back(model)

    def homes(self) -> Parameters:
        """Return the sharded parameter for each whole one; within :meth:`unsharded`.

        Raises:
            PrivacyError: if a parameter was not gathered.
        """
        homes: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, parameter in self._places:
            stand_in = module._parameters[name]
            if stand_in is None or isinstance(stand_in, DTensor):
                raise PrivacyError(f"parameter {name!r} was not gathered. No step was taken.")
            homes[stand_in] = parameter
        return homes

    @contextlib.contextmanager
    def trial(self, model: nn.Module) -> Iterator[None]:
        """Run trial rows, to which other processes come in other steps."""
        self.trying = True
        try:
            with left_whole(model):
                yield
        finally:
            self.trying = False

    def _tell_where_sums_are_due(self, parameters: Iterable[nn.Parameter]) -> None:
        self._added([1, 0])

    def sum(
        self, sums: dict[nn.Parameter, Tensor], homes: Parameters, *, noised: bool, noises: int
    ) -> None:
        """Add up the sums of all processes; each process gets its shard of them.

        Raises:
            PrivacyError: if another process has failed, or not as many added noise as must.
        """
        # Before any sum leaves its process, all know that there is one noise in them.
        self._require_noised(noises, *self._added([0, int(noised)]))
        for parameter, home in homes.items():
            sums[parameter] = added_shard(sums[parameter], home)


def require_alike(model: nn.Module, *, size: int) -> None:
    """Make sure that every trainable weight is sharded over all processes, and in no other way.

    Args:
        model: Sharded by ``fully_shard``.
        size: Number of processes.

    Raises:
        UnsupportedModelError: if a trainable weight is not sharded so.
        UnsupportedTrainerOptionError: if ``fully_shard`` was given a policy.
    """
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise UnsupportedModelError(
                    f"parameter {name!r} is trainable and not sharded. Call fully_shard on the "
                    f"module that holds all of them, {_WHERE}. No step was taken."
                )
            continue
        mesh = parameter.device_mesh
        if mesh.ndim != 1 or mesh.size() != size or not parameter.placements[0].is_shard():
            raise UnsupportedModelError(
                f"parameter {name!r} is laid out as {parameter.placements} on a mesh of shape "
                f"{tuple(mesh.shape)}, with {size} processes. Private training shards "
                "over all of them and in no second way: no tensor parallelism, and no "
                f"replicas of shards (HSDP). Pass a mesh of one dimension, {_WHERE}. No step "
                "was taken."
            )
    for module in _sharding(model):
        policy = fsdp_precision(module)
        if any((policy.param_dtype, policy.reduce_dtype, policy.output_dtype)):
            raise UnsupportedTrainerOptionError(
                f"fully_shard was given a {MixedPrecisionPolicy.__name__}, by which weights "
                "and gradients have other types than the checks before the first step look "
                "for. Use Trainer(precision='bf16-mixed') or 'bf16-true'. No step was taken."
            )


def require_on(model: nn.Module, device: torch.device) -> None:
    """Make sure that shards are where the sums are.

    Raises:
        UnsupportedTrainerOptionError: if the shards are offloaded.
    """
    for _, name, parameter in _places(model):
        if parameter.device.type != device.type:
            raise UnsupportedTrainerOptionError(
                f"parameter {name!r} is on {parameter.device.type}, and the strategy trains on "
                f"{device.type}. Leave CPUOffloadPolicy out. No step was taken."
            )


def put_back(model: nn.Module) -> None:
    """Have all weights sharded, and gathered and let go of by each pass from now on."""
    for module in _sharding(model):
        # First, because it also counts for one whose forward pass has failed midway.
        module.set_reshard_after_forward(True, recurse=False)
        module.set_reshard_after_backward(True, recurse=False)
        module.set_requires_gradient_sync(True, recurse=False)
        module.reshard()


def _sharding(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]


def share_unsharded(model: nn.Module) -> None:
    """Give every process the buffers, and weights that are not sharded, of the first one.

    Raises:
        PrivacyError: if another process has gone.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            answered(partial(distributed.broadcast, tensor.detach(), 0))


def added_shard(total: Tensor, home: nn.Parameter) -> Tensor:
    """Add up a whole sum over all processes; each gets the part of its shard.

    Args:
        total: This process's sum.
        home: The sharded parameter.

    Raises:
        PrivacyError: if another process has gone.
    """
    assert isinstance(home, DTensor)  # noqa: S101 # homes saw to it
    partial = DTensor.from_local(total, home.device_mesh, [Partial()], run_check=False)
    return answered(lambda: partial.redistribute(placements=home.placements))


def gathered(state: Any, *, keep: bool) -> Any:
    """Return a state dict with whole tensors on the CPU.

    All processes must do it at once.

    Args:
        state: Tensors and collections of them, in the same order in every process.
        keep: Whether this process keeps what it gathers; the others get nothing in its place.
    """
    if isinstance(state, DTensor):
        whole: Tensor = state.full_tensor().detach()
        return whole.cpu() if keep else None
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        items = {name: gathered(item, keep=keep) for name, item in state.items()}
        return type(state)(items)
    if isinstance(state, list | tuple):
        return type(state)(gathered(item, keep=keep) for item in state)
    return state


def like_parameter(value: Any, parameter: Tensor | None) -> Any:
    """Return this process's shard of a whole tensor, if the parameter it is for is sharded."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape or isinstance(value, DTensor):
        return value
    # No source: every process has read it all, and takes its part.
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None)


def require_gatherable(state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Make sure that what an optimizer keeps is of one number, or sharded as its parameter is.

    Args:
        state: Of each parameter.

    Raises:
        UnsupportedTrainerOptionError: if a state of the optimizer is neither, so that a checkpoint
            would hold one process's part.
    """
    for entries in state.values():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.numel() > 1 and not isinstance(value, DTensor):
                raise UnsupportedTrainerOptionError(
                    f"the optimizer keeps a tensor {name!r} that is not sharded, so no checkpoint "
                    "can hold it for all processes. Use an optimizer of torch.optim that keeps "
                    "one number for each weight, such as AdamW. Nothing was written."
                )


@contextlib.contextmanager
def left_whole(model: nn.Module) -> Iterator[None]:
    """Have ``state_dict`` leave weights whole while a block runs, which FSDP2 shards for it."""
    hooks = [state_dict_hooks(module) for module in model.modules()]
    before = [dict(item) for item in hooks]
    try:
        for item in hooks:
            for key, hook in list(item.items()):
                if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
                    del item[key]
        yield
    finally:
        for item, kept in zip(hooks, before, strict=True):
            item.clear()
            item.update(kept)
