"""``Trainer(strategy=PrivateFSDPStrategy(...))``: DP-SGD with weights sharded over devices."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lightning_secure.compat.lightning import bare_optimizer
from lightning_secure.privacy.sharding import (
    Sharded,
    gathered,
    like_parameter,
    put_back,
    require_gatherable,
    share_unsharded,
)
from lightning_secure.privacy.step import required
from lightning_secure.strategies.processes import SeveralProcesses


class WholeCheckpointsStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models, with checkpoints like those of one device.

    Weights and optimizer states are gathered and go through the ``CheckpointIO``, which Lightning's
    own strategy passes by when it reads, and when it writes one file a process.

    Args:
        timeout: How long a process waits for the others.
        process_group_backend: As for Lightning's.
        options: For ``ParallelStrategy``.

    Attributes:
        asks_checkpoint_io: Every checkpoint goes through the CheckpointIO.
    """

    asks_checkpoint_io: ClassVar[bool] = True
    _collective: Sharded

    def __init__(
        self, *, timeout: timedelta, process_group_backend: str | None, **options: Any
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        for name, value in options.items():
            if value is not None:
                setattr(self, name, value)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: whether and how a run may go on is decided when it is set up."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes, as on one device."""
        return True

    def setup_environment(self) -> None:
        """Connect the processes; ``device_mesh["data_parallel"]`` is all of them.

        Weights are gathered by the connection that everything else goes by, so that no process
        waits for them longer than ``timeout``: the groups of Lightning's own mesh have a time of
        theirs.
        """
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        alone = distributed.new_group([self.global_rank], use_local_synchronization=True)
        self._device_mesh = DeviceMesh.from_group(
            [required(distributed.group.WORLD), alone],
            self.root_device.type,
            mesh=torch.arange(self.world_size).view(-1, 1),
            mesh_dim_names=("data_parallel", "tensor_parallel"),
        )
        required(self.lightning_module)._device_mesh = self._device_mesh

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return whole weights in the first process, and none in the others."""
        state: dict[str, Any] = required(self.lightning_module).state_dict()
        if self._collective.trying:  # trying, by this process alone, with its weights whole
            return state
        whole: dict[str, Any] = gathered(state, keep=self.is_global_zero)
        return whole if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's whole state in the first process, and none in the others.

        Raises:
            UnsupportedTrainerOptionError: if the optimizer keeps a state that is not sharded as
                weights are.
        """
        optimizer = bare_optimizer(optimizer)
        state = optimizer.state_dict()
        if self._collective.trying:
            return state
        require_gatherable(state["state"])
        whole: dict[str, Any] = gathered(state, keep=self.is_global_zero)
        return whole if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint through the ``CheckpointIO``, in the first process."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint through the ``CheckpointIO``, in every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Let the module take over whole weights; each process keeps its shards."""
        module = required(self.lightning_module)
        _materialize_distributed_module(module, self.root_device)
        put_back(module)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = {
            name: like_parameter(value, own.get(name))
            for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Let the optimizers take over whole states; each process keeps its shards."""
        states = []
        for optimizer, whole in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [number for group in whole["param_groups"] for number in group["params"]]
            own = dict(zip(numbers, parameters, strict=True))
            entries = {
                number: {name: like_parameter(item, own[number]) for name, item in kept.items()}
                for number, kept in whole["state"].items()
            }
            states.append({**whole, "state": entries})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})


class PrivateFSDPStrategy(SeveralProcesses, WholeCheckpointsStrategy):
    """Like ``PrivateDDPStrategy``, for a model that ``fully_shard`` (FSDP2) spreads over devices.

    Args:
        config: As for one device; ``expected_batch_size`` is that of all processes together.
        public_metrics: As for one device.
        journal: As for one device. The first process alone reads and writes it.
        accelerator: As for any strategy; normally left to the Trainer.
        parallel_devices: As for any strategy; normally left to the Trainer.
        cluster_environment: As for any strategy; normally found by the Trainer.
        checkpoint_io: As for any strategy; normally a plugin of the Trainer.
        precision_plugin: As for any strategy; normally left to the Trainer.
        process_group_backend: As for ``ModelParallelStrategy``.
        timeout: How long a process waits for the others before it fails.

    As with Lightning's ``ModelParallelStrategy``, the module calls ``fully_shard`` itself, in
    ``configure_model`` and with ``mesh=self.device_mesh["data_parallel"]``, which is all processes.
    Optimizer states, gradients, and weights between steps are sharded. During a training step
    every process has all weights, gathered once, and its clipped sums of all in float32:
    4 bytes a weight and its own size. So processes need not run as many chunks as others, and
    nothing is exchanged for a chunk. ``reshard_after_forward`` has no effect within a step, and is
    True outside of it.

    Checkpoints are single files like those of the other strategies, which can read them, and go
    through the ``CheckpointIO``. To write one, all weights are gathered in the first process.

    Raises:
        UnsupportedModelError: if ``PrivateDDPStrategy`` raises it, or a trainable weight is not
            sharded, or not over all processes alike: no tensor parallelism, no HSDP.
        UnsupportedTrainerOptionError: if ``PrivateDDPStrategy`` raises it, or ``fully_shard`` was
            given a ``MixedPrecisionPolicy`` or a ``CPUOffloadPolicy``.
        PrivacyError: if another process has failed, or the noise is not in the sum exactly once.

    Guarantees:
        Those of ``PrivateDDPStrategy``.

    Source:
        Abadi et al. 2016, arXiv:1607.00133; Bu et al. 2023, arXiv:2210.00038.

    >>> from lightning_secure import DPConfig
    >>> config = DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    >>> PrivateFSDPStrategy(config).ledger is None  # Trainer(strategy=..., devices=2) opens it
    True
    """

    strategy_name = "private_fsdp"

    talks_to = Sharded
    _collective: Sharded
    _gatherable = False

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as with ``PrivateDDPStrategy``, with the weights sharded as they are."""
        self._gatherable = False
        put_back(self._module)  # a validation may have left weights whole
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            share_unsharded(self._module)

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Take the step; after the first one, look whether checkpoints can hold the optimizer.

        Raises:
            UnsupportedTrainerOptionError: if the optimizer keeps a state that is not sharded as
                weights are.
        """
        result = super().optimizer_step(optimizer, *args, **kwargs)
        if not self._gatherable:
            with self._collective.together():
                require_gatherable(optimizer.state)
            self._gatherable = True
        return result

    def teardown(self) -> None:
        """Take everything off again."""
        if self._lightning_module is not None:
            put_back(self._module)
        super().teardown()
