"""Private training in several processes that take each step together."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_secure.compat.lightning import bring_processes_together, leave_processes_apart
from lightning_secure.errors import (
    ConfigError,
    LightningSecureError,
    PrivacyError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.rules.layer_rule import widened
from lightning_secure.privacy.sampling import Chunk, seed_of_rank
from lightning_secure.strategies.randomness import FreshRandomness
from lightning_secure.strategies.reduction import add_over_processes, answered
from lightning_secure.strategies.same_rows import (
    describe_rows,
    different_rows,
    read_rows,
    rows_apart,
    split_by_rank,
)
from lightning_secure.strategies.statements import (
    loader_statement,
    model_statement,
    optimizer_statement,
    run_statement,
)
from lightning_secure.strategies.steps import required
from lightning_secure.strategies.training import PrivateTraining
from lightning_secure.util.agreement import Statement, compared, gathered, ranks

T = TypeVar("T")

log = logging.getLogger(__name__)

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
    """The parts of private training that several processes of one step need.

    Each process draws from its own part of the rows, clips, and adds up. The first one adds the
    noise to its sum; then the sums of all are added up, and all have the same noised gradient.
    There is one account: the first process keeps the journal, gives the others its account at the
    start, and all enter the same steps.

    Args:
        config: The privacy configuration.
        public_metrics: Names of metrics, logged while training, that do not depend on the rows.
        journal: Directory of the run's journal; None for the default.
        accelerator: For Lightning's strategy, like the others.
        parallel_devices: The same.
        cluster_environment: The same.
        checkpoint_io: The same.
        precision_plugin: The same.
        process_group_backend: The same.
        timeout: How long a process waits for the others before it fails.
        unknown: Refused.

    Raises:
        ConfigError: if an argument is unknown.

    Attributes:
        asks_checkpoint_io: Every checkpoint goes through the CheckpointIO.

    Guarantees:
        The noise is in the gradient exactly once: in every step the processes count who added it.
        If preparing or taking a step fails in one process, it fails in all, and nothing is
        released. One that fails elsewhere ends its connection, so that the others fail when they
        next wait for it.
    """

    asks_checkpoint_io: ClassVar[bool] = True

    _shared_failure: BaseException | None = None
    _in_chunk = False

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

    # Setting up

    def setup(self, trainer: pl.Trainer) -> None:
        """Set up as in one process, with this one's part of the rows and its own randomness."""
        self._shared_failure = None
        if trainer.state.fn == TrainerFn.FITTING:
            seed = seed_of_rank(self.config.insecure_seed, self.global_rank)
            self._randomness = FreshRandomness(seed, stream=1)
            leave_processes_apart(trainer)
        # Before weights are sent around, which takes the same shapes in every process.
        self._agree(lambda: model_statement(self._module))
        super().setup(trainer)

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
        self._agree(lambda: run_statement(self._module.trainer, self.config, self._public_metrics))

    def _part(self, loader: DataLoader[Any]) -> tuple[int, int]:
        if self.world_size > 1:
            self._require_same_rows(loader)
        return self.global_rank, self.world_size

    def _require_same_optimizer(self) -> None:
        self._agree(
            lambda: optimizer_statement(self.optimizers, self.lr_scheduler_configs, self._module)
        )

    def _require_same_rows(self, loader: DataLoader[Any]) -> None:
        rows = len(loader.dataset)  # type: ignore[arg-type] # require_plain_loader saw to it
        begins = self._ledger is None
        self._agree(lambda: loader_statement(loader, begins=begins, config=self.config))
        with self._together():
            described = describe_rows(loader.dataset)
        found = answered(lambda: compared(described.statement))
        if described.complete and not found:
            return
        with self._together():
            read = read_rows(loader)
        by_rank = answered(lambda: gathered((described.indices, read, rows)))
        indices, reads, counts = zip(*by_rank, strict=True)
        if not found:
            apart, places = rows_apart(reads)
            if apart:
                found = [f"rows of the training dataset ({ranks(apart)} read others than rank 0)"]
            elif not places:
                log.warning(
                    "no row of the training dataset could be read twice alike, so the processes "
                    "could not compare their rows. The epsilon holds only if each process has the "
                    "same rows in the same order."
                )
        if found:
            self._fail_together(different_rows(found, split_by_rank(indices, reads, counts)))

    def _agree(self, statement: Callable[[], Statement]) -> None:
        """Compare a statement over all processes.

        Raises:
            UnsupportedTrainerOptionError: if they differ.
        """
        if self.world_size == 1:
            return
        with self._together():
            own = statement()
        if found := answered(lambda: compared(own)):
            self._fail_together(
                UnsupportedTrainerOptionError(
                    f"the processes of this run were not given the same: {'; '.join(found)}. Run "
                    "the same script with the same settings in every process. No step was taken."
                )
            )

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint in every process, or in none.

        Raises:
            LedgerError: if the checkpoint is to be trained further and has no account.
        """
        with self._together():
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    # Going on, or failing, together

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        with self._telling(lambda: self._added([1])):
            yield
        if self._added([0])[0]:
            self._fail_together(_failed_elsewhere())

    def _once(self, action: Callable[[], T]) -> T:
        result: Any = None
        with self._together():
            if self.is_global_zero:
                result = action()
        shared: T = self.broadcast(result)
        return shared

    def _charge(self, ledger: Ledger, release: Release) -> None:
        self._require_no_chunk()

        def charged() -> PrivacyError | None:
            try:
                ledger.charge(release)
            except PrivacyError as error:
                return error
            return None

        # The first process has the journal. What it cannot charge, all refuse for its reason.
        if (refused := self._once(charged)) is not None:
            self._fail_together(refused)
        if not self.is_global_zero:
            ledger.enter(release)

    @contextlib.contextmanager
    def _until_combined(self) -> Iterator[None]:
        with self._telling(self._tell_where_sums_are_due):
            yield

    @contextlib.contextmanager
    def _telling(self, tell: Callable[[], Any]) -> Iterator[None]:
        """Tell the others if the block fails, where they will next look for it."""
        try:
            yield
        except Exception as error:
            self._shared_failure = error
            with contextlib.suppress(PrivacyError):  # who has gone already need not be told
                tell()
            raise

    def _tell_where_sums_are_due(self) -> None:
        sums = [
            torch.zeros_like(parameter, dtype=widened(parameter.dtype))
            for parameter in required(self._engine).parameters
        ]
        self._added([1, 0], sums)

    def _added(self, counts: Sequence[int], tensors: Sequence[Tensor] = ()) -> list[int]:
        return add_over_processes(tensors, counts, device=self.root_device)

    def _fail_together(self, error: LightningSecureError) -> NoReturn:
        self._shared_failure = error
        raise error

    def on_exception(self, exception: BaseException) -> None:
        """End the connection if the others do not know of this failure."""
        super().on_exception(exception)
        if exception is not self._shared_failure and distributed.is_initialized():
            with contextlib.suppress(Exception):
                _disconnect()

    # One step

    def _noise_multiplier(self) -> float:
        return super()._noise_multiplier() if self.is_global_zero else 0.0

    def _combine(self, sums: dict[nn.Parameter, Tensor], noised: bool) -> None:
        tensors = [sums[parameter] for parameter in required(self._engine).parameters]
        self._require_noised_once(*self._added([0, int(noised)], tensors))

    def _require_noised_once(self, failed: int, noises: int) -> None:
        if failed:
            self._fail_together(_failed_elsewhere())
        if noises != int(required(self._ledger).noise_multiplier > 0):
            self._fail_together(
                PrivacyError(
                    f"{noises} processes added noise in this step, and exactly one has to. The "
                    "step was not taken."
                )
            )

    def _chunk(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._in_chunk = True
        try:
            with _metrics_of_this_process(self._module):
                return super()._chunk(chunk, rest, kwargs)
        finally:
            self._in_chunk = False

    def release(self, *args: Any, **kwargs: Any) -> float:
        """Publish nothing: each process has its own noise, which could be averaged away.

        Raises:
            UnsupportedTrainerOptionError: if called: always.
        """
        raise UnsupportedTrainerOptionError(
            "a strategy in several processes releases no values: each process would add noise of "
            "its own to the same rows. Use PrivateMean or PrivateAccuracy. Nothing was released."
        )

    # ``safe-super``: ParallelStrategy leaves these abstract, and Lightning's strategy for several
    # processes, which comes after this class among the bases, has them.

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Do as Lightning's strategy does; refuse within a training step."""
        self._require_no_chunk()
        return answered(partial(super().reduce, *args, **kwargs))  # type: ignore[safe-super]

    def all_gather(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do as Lightning's strategy does; refuse within a training step."""
        self._require_no_chunk()
        return answered(partial(super().all_gather, *args, **kwargs))

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Do as Lightning's strategy does; refuse within a training step."""
        self._require_no_chunk()
        return answered(partial(super().broadcast, obj, src))  # type: ignore[safe-super]

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Do as Lightning's strategy does; refuse within a training step."""
        self._require_no_chunk()
        answered(partial(super().barrier, *args, **kwargs))  # type: ignore[safe-super]

    def _require_no_chunk(self) -> None:
        if self._in_chunk:
            raise UnsupportedModelError(
                "training_step exchanges something with other processes (all_gather, reduce, "
                "broadcast or barrier). Clipping bounds a row only if its gradient depends on "
                "nothing else, and each process has its own number of chunks, so the others would "
                "wait in vain. Exchange in hooks outside of the step. This step was not taken."
            )

    def teardown(self) -> None:
        """Take everything off again."""
        if self._lightning_module is not None:
            bring_processes_together(self._lightning_module)
        super().teardown()
        self._shared_failure = None


def unknown_arguments(strategy: str, names: Iterable[str]) -> ConfigError:
    """Return the error for arguments that a strategy does not have."""
    found = sorted(names)
    reasons = [f"{name}: {_NOT_TAKEN[name]}" for name in found if name in _NOT_TAKEN]
    return ConfigError(
        f"{strategy} has no argument {', '.join(map(repr, found))}. "
        f"{''.join(f'{reason} ' for reason in reasons)}Leave it out. Nothing was started."
    )


def _failed_elsewhere() -> PrivacyError:
    return PrivacyError(
        "another process of this run has failed, so nothing was released here either; its own "
        "message says why. The last checkpoint holds the weights and the account."
    )


@contextlib.contextmanager
def _metrics_of_this_process(model: nn.Module) -> Iterator[None]:
    """Have metrics not wait for those of other processes, which have their own number of chunks."""
    metrics = [module for module in model.modules() if isinstance(module, Metric)]
    names = ("dist_sync_on_step", "sync_on_compute", "_to_sync")  # the last is what it goes by
    settings = [{name: getattr(metric, name) for name in names} for metric in metrics]
    try:
        for metric in metrics:
            metric.dist_sync_on_step = metric.sync_on_compute = metric._to_sync = False
        yield
    finally:
        for metric, setting in zip(metrics, settings, strict=True):
            vars(metric).update(setting)


def _disconnect() -> None:
    """End the connections to the other processes, without waiting for them."""
    if distributed.get_backend() == "nccl":
        distributed.distributed_c10d._abort_process_group()
    else:
        distributed.destroy_process_group()
