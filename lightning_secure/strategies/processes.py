"""Private training in several processes that take each step together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed

from lightning_secure.compat.lightning import bring_processes_together, leave_processes_apart
from lightning_secure.errors import ConfigError, PrivacyError, UnsupportedTrainerOptionError
from lightning_secure.privacy.collective import Processes
from lightning_secure.privacy.config import DPConfig
from lightning_secure.strategies.statements import require_same, run_statement
from lightning_secure.strategies.training import PrivateTraining

T = TypeVar("T")

_NO_WRAPPER: Final = "the private strategy adds up clipped sums itself and wraps no torch DDP."
#: Arguments that users know from other strategies, and why these have none.
_NOT_TAKEN: Final = {
    "released_metrics": "metrics of each step are released in one process only, PrivateStrategy.",
    "start_method": "processes are started as scripts only.",
    "save_distributed_checkpoint": "checkpoints are whole, in one file.",
    "tensor_parallel_size": "all processes shard the model, and none of them a layer.",
    "data_parallel_size": "all processes shard the model, and none of them a layer.",
    **dict.fromkeys(
        (
            "bucket_cap_mb",
            "ddp_comm_hook",
            "ddp_comm_state",
            "ddp_comm_wrapper",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "model_averaging_period",
            "static_graph",
        ),
        _NO_WRAPPER,
    ),
}


class SeveralProcesses(PrivateTraining, ParallelStrategy):
    """Lightning's side of several processes, before and after the steps that they take together.

    :class:`~lightning_secure.privacy.collective.Processes` says how they take one. There is one
    account: the first process keeps the journal, gives the others its account at the start, and
    all enter the same steps.

    Raises:
        ConfigError: if an argument is unknown.

    Attributes:
        asks_checkpoint_io: Every checkpoint goes through the CheckpointIO.

    Guarantees:
        Those of ``Processes``. A process that fails outside of what all do together ends its
        connection, so that the others fail when they next wait for it.
    """

    asks_checkpoint_io: ClassVar[bool] = True
    talks_to: ClassVar[type[Processes]] = Processes
    _collective: Processes

    def __init__(
        self,
        config: DPConfig,
        *,
        public_metrics: Sequence[str] = (),
        journal: str | Path | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        **unknown: Any,
    ) -> None:
        if unknown:
            raise unknown_arguments(type(self).__name__, unknown)
        # Processes are started as scripts only: a process that was forked or spawned would hand
        # its weights back to this one, and their account would stay behind.
        super().__init__(
            config,
            public_metrics=public_metrics,
            journal=journal,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Connect the processes, and make sure that they are about to do the same.

        Raises:
            PrivacyError: if another process does not start in time.
            UnsupportedTrainerOptionError: if they are about to do different things.
        """
        started = True
        try:
            super().setup_environment()
        except distributed.DistError:
            started = False
        if not started:  # raised out here: the text of the other one names machines
            raise PrivacyError(
                f"not all {self.world_size} processes of this run started in time. No step was "
                "taken. Start the script in every process, and see what the others say."
            )
        self._collective.connect(self.root_device)
        require_same(
            self._collective,
            lambda: run_statement(self._module.trainer, self.config, self._step.public),
        )

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as in one process, and leave the training loaders as the user made them."""
        if trainer.state.fn == TrainerFn.FITTING:
            leave_processes_apart(trainer)
        super().setup(trainer)

    def on_exception(self, exception: BaseException) -> None:
        """End the connection if the others do not know of this failure."""
        super().on_exception(exception)
        self._collective.leave(exception)

    def release(self, *args: Any, **kwargs: Any) -> float:
        """Publish nothing: each process has its own noise, which could be averaged away.

        Raises:
            UnsupportedTrainerOptionError: if called: always.
        """
        raise UnsupportedTrainerOptionError(
            "a strategy in several processes releases no values: each process would add noise of "
            "its own to the same rows. Use PrivateMean or PrivateAccuracy. Nothing was released."
        )

    # Within a training step these are refused. ``safe-super``: ParallelStrategy leaves them
    # abstract, and Lightning's strategy, which comes after this class among the bases, has them.

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Do as Lightning's strategy does."""
        return self._collective.exchange(
            partial(super().reduce, *args, **kwargs)  # type: ignore[safe-super]
        )

    def all_gather(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do as Lightning's strategy does."""
        gathered: Tensor = self._collective.exchange(partial(super().all_gather, *args, **kwargs))
        return gathered

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Do as Lightning's strategy does."""
        return self._collective.exchange(
            partial(super().broadcast, obj, src)  # type: ignore[safe-super]
        )

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Do as Lightning's strategy does."""
        self._collective.exchange(
            partial(super().barrier, *args, **kwargs)  # type: ignore[safe-super]
        )

    def teardown(self) -> None:
        """Take everything off again."""
        if self._lightning_module is not None:
            bring_processes_together(self._lightning_module)
        super().teardown()


def unknown_arguments(strategy: str, names: Iterable[str]) -> ConfigError:
    """Return the error for arguments that a strategy does not have."""
    found = sorted(names)
    reasons = [f"{name}: {_NOT_TAKEN[name]}" for name in found if name in _NOT_TAKEN]
    return ConfigError(
        f"{strategy} has no argument {', '.join(map(repr, found))}. "
        f"{''.join(f'{reason} ' for reason in reasons)}Leave it out. Nothing was started."
    )
