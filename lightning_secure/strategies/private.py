"""``Trainer(strategy=PrivateStrategy(...))``: DP-SGD for an unmodified LightningModule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_secure.errors import (
    BudgetExhaustedError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.engine import GradientEngine
from lightning_secure.privacy.ledger import (
    CHECKPOINT_KEY,
    Ledger,
    bring_ledger,
    ledger_of,
    require_account,
)
from lightning_secure.privacy.metrics import metrics_kept_apart
from lightning_secure.privacy.noise import GaussianNoise
from lightning_secure.privacy.preflight import preflight, require_rows_kept_apart
from lightning_secure.privacy.promise import begin_ledger
from lightning_secure.privacy.sampling import Chunk, LogicalBatch
from lightning_secure.strategies.account import (
    account_of,
    announce_plain,
    require_same_weights,
    settle_account,
)
from lightning_secure.strategies.loader import PrivateDataLoader, require_plain_loader
from lightning_secure.strategies.options import (
    carry_ledger,
    planned_steps,
    require_no_accumulation,
    require_optimizers,
    require_trainer_options,
)
from lightning_secure.strategies.randomness import FreshRandomness
from lightning_secure.strategies.single import OneDeviceStrategy
from lightning_secure.strategies.steps import (
    loss_of,
    required,
    spare_logical_batch,
    stop_before_any_minimum,
    withheld,
)
from lightning_secure.strategies.telemetry import PUBLIC_METRICS, GuardedResults

__all__ = ["PrivateStrategy"]

log = logging.getLogger(__name__)


class PrivateStrategy(OneDeviceStrategy):
    """Trains on one device so that the weights reveal at most ``epsilon`` about any one row.

    Args:
        config: The budget, the clipping norm and the rest of what the promise depends on.
        public_metrics: Names of metrics, logged while training, that do not depend on the rows.
            All others are withheld from loggers, callbacks and the progress bar; metrics of
            validation and test are not touched.
        journal: Local directory where the run notes each release before it happens, so that no old
            checkpoint, second branch or crash makes the account forget one; keep it with the
            checkpoints. By default ``privacy_journal`` in the Trainer's ``default_root_dir``.
        accelerator: As for any strategy; normally left to the Trainer.
        checkpoint_io: As for any strategy; normally a plugin of the Trainer.
        precision_plugin: As for any strategy; normally left to the Trainer.

    The module stays as it is: ``training_step`` returns a mean loss, ``configure_optimizers`` one
    optimizer. A step draws rows by Poisson sampling, takes each row's gradient, clips it, adds the
    clipped ones up, adds Gaussian noise, and divides by the public expected batch size. That, and
    nothing before it, is what ``on_after_backward``, ``on_before_optimizer_step``, the optimizer
    and every checkpoint see.

    Raises:
        UnsupportedModelError: Something about the model or its loss cannot be made private.
        UnsupportedTrainerOptionError: A Trainer option would break the promise.
        BudgetExhaustedError: The next step would exceed ``target_epsilon``. Training is asked to
            stop one step earlier; this is for when something made it go on.
        LedgerError: A checkpoint is resumed without its ledger or without its run's journal.

    Guarantees:
        (epsilon, delta)-differential privacy of the weights after each step, for neighbouring
        training sets that differ by one row added or removed, with the epsilon of :attr:`ledger`.
        It does not cover validation data, the number of rows, hyperparameters chosen by looking at
        the data, nor what the module writes itself past ``self.log``.

    Source:
        Abadi et al. 2016, arXiv:1607.00133; Bu et al. 2023, arXiv:2210.00038.
    """

    strategy_name = "private"

    def __init__(
        self,
        config: DPConfig,
        *,
        public_metrics: Sequence[str] = (),
        journal: str | Path | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.config = config
        self._journal = journal
        self._public_metrics = PUBLIC_METRICS | frozenset(public_metrics)
        self._ledger: Ledger | None = None
        self._restored: Ledger | None = None
        self._engine: GradientEngine | None = None
        self._noise = GaussianNoise(config.insecure_seed)
        self._randomness = FreshRandomness(config.insecure_seed, stream=1)
        self._results: GuardedResults | None = None
        self._preflight_due = True

    @property
    def ledger(self) -> Ledger | None:
        """What the weights of the module at hand have spent; None before its first fit."""
        return self._ledger

    # Setting up

    def connect(self, model: pl.LightningModule) -> None:
        """Take a model, and forget what an earlier attempt may have left behind."""
        self._restored = None
        super().connect(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Check the Trainer's options, prepare the model, and put the hooks on it."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self._module
        restored, self._restored = self._restored, None
        # A module that was trained privately before goes on with its own account.
        self._ledger = restored or account_of(module)
        if fitting:
            require_trainer_options(trainer, module, self.precision_plugin, self.config)
            if self._ledger is not None:
                require_same_weights(module, self._ledger)
                carry_ledger(trainer, self._ledger, self.config, self._journal)
        super().setup(trainer)
        if not fitting:
            return
        require_optimizers(self.optimizers)
        self._engine = GradientEngine(module, max_grad_norm=self.config.max_grad_norm)
        self._engine.attach()
        self._preflight_due = True
        self._results = GuardedResults(self._public_metrics)
        trainer.fit_loop.epoch_loop._results = self._results
        selector = trainer._data_connector._datahook_selector
        assert selector is not None  # noqa: S101 # set by the Trainer before any strategy's setup
        if is_overridden(
            "on_before_batch_transfer", selector.get_instance("on_before_batch_transfer")
        ):
            # Lightning calls this hook once a batch, and here it is due once a chunk.
            vars(module)["_on_before_batch_transfer"] = partial(spare_logical_batch, module)

    def process_dataloader(self, dataloader: object) -> object:
        """Exchange the training loader for one that draws by Poisson sampling."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        loader = require_plain_loader(dataloader)
        ledger = self._open_ledger(trainer, loader)
        public = ledger.public
        return PrivateDataLoader(
            loader,
            sample_rate=public.sample_rate,
            steps=public.steps_per_epoch,
            max_physical_batch_size=self.config.max_physical_batch_size
            or public.expected_batch_size + 4 * int(public.expected_batch_size**0.5 + 1),
            seed=self.config.insecure_seed,
        )

    def on_train_start(self) -> None:
        """Make sure that the rows come from the one loader that this strategy has put in place."""
        loader = self._module.trainer.fit_loop._combined_loader
        if loader is None or [type(item) for item in loader.flattened] != [PrivateDataLoader]:
            raise UnsupportedTrainerOptionError(
                "private training takes its rows from one training DataLoader, and there are "
                "several, or something exchanged it. No step was taken."
            )

    def _open_ledger(self, trainer: pl.Trainer, loader: DataLoader[Any]) -> Ledger:
        """Return the account, begun with the first fit's public numbers."""
        if self._ledger is None:
            self._ledger = begin_ledger(
                self.config,
                rows=len(loader.dataset),  # type: ignore[arg-type] # require_plain_loader saw to it
                batch_size=loader.batch_size or 1,
                planned_steps=partial(planned_steps, trainer, self.config),
            )
            carry_ledger(trainer, self._ledger, self.config, self._journal)
        return self._ledger

    # One step

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Leave a logical batch where it is; its chunks are moved one at a time."""
        if isinstance(batch, LogicalBatch):
            return batch
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step and backward on each chunk, and sum clipped gradients.

        Returns:
            Not a number: a loss without noise is a release that no account contains, and Lightning
            hands it to callbacks, ``optimizer_step`` and ``on_before_backward``. With it, entries
            of the module's dict that ``public_metrics`` names.
        """
        batch, *rest = args
        if not isinstance(batch, LogicalBatch):
            raise UnsupportedModelError(
                "training_step does not get a batch of this strategy's own sampling: it takes a "
                "dataloader_iter, or a hook exchanged the batch. No step was taken."
            )
        if batch.spent:
            raise UnsupportedTrainerOptionError(
                "the closure was evaluated twice on one batch, by the optimizer or by an "
                "optimizer_step of the module's own, and each evaluation is a release of its own. "
                "Use an optimizer that does so once. The second was not released."
            )
        batch.spent = True
        ledger, engine = required(self._ledger), required(self._engine)
        if not ledger.affords_a_step(self.config.target_epsilon):
            raise BudgetExhaustedError(
                f"epsilon {ledger.epsilon():.4g} of {self.config.target_epsilon:.4g} is spent "
                f"after {ledger.steps} steps, and one more would exceed it. The step was not "
                "taken; the last checkpoint holds the weights and the account."
            )
        require_no_accumulation(self._module.trainer)
        engine.begin_step()
        with self._randomness.apart(self.root_device):
            outputs = (self._chunk(chunk, rest, kwargs) for chunk in batch.chunks)
            return withheld(outputs, self.root_device, self._public_metrics)

    def _chunk(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        engine, results = required(self._engine), required(self._results)
        if self._preflight_due:
            self._preflight(chunk, rest, kwargs)
            self._preflight_due = False
        data = self._on_device(chunk.data)
        results.batch, results.batch_size = data, None
        with engine.recording(), metrics_kept_apart(self._module):
            output = super().training_step(data, *rest, **kwargs)
            self._backward(loss_of(output))
        engine.add_chunk(chunk.size)
        return output

    def _backward(self, loss: Tensor) -> None:
        self.precision_plugin.backward(loss, self._module, self.optimizers[0])

    def _on_device(self, data: Any) -> Any:
        module = self._module
        data = self.precision_plugin.convert_input(data)
        data = pl.LightningModule._on_before_batch_transfer(module, data, dataloader_idx=0)
        return super().batch_to_device(data)

    def _preflight(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> None:
        engine, results = required(self._engine), required(self._results)

        def loss(batch: Any) -> Tensor:
            # From before the transfer hooks, which can mix rows as well. Without autocast:
            # rounding to 8 bits would hide what is looked for.
            data = self._on_device(batch)
            return loss_of(self._module.training_step(data, *rest, **kwargs))

        trainer = self._module.trainer
        results.muted = True
        try:
            loader: Any = required(trainer.fit_loop._combined_loader).flattened[0]
            require_rows_kept_apart(
                loader.trial_batch, engine, self._module, loss, backward=self._backward
            )
            preflight(
                engine,
                self._module,
                loss,
                chunk.data,
                size=chunk.size,
                backward=self._backward,
                checkpoint=partial(trainer._checkpoint_connector.dump_checkpoint, False),
                stateful=(*self.optimizers, *(c.scheduler for c in self.lr_scheduler_configs)),
            )
        finally:
            results.muted = False

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Account for the step, then release its noised gradient into ``.grad``.

        The chunks went backward already; this is where Lightning expects gradients to appear.
        """
        ledger, engine = required(self._ledger), required(self._engine)
        self.precision_plugin.pre_backward(closure_loss, self._module)
        engine.require_covered(self._module.named_parameters())
        groups = self.optimizers[0].param_groups
        engine.require_covered(("of the optimizer", p) for g in groups for p in g["params"])
        ledger.record()
        engine.release(
            self._noise,
            noise_multiplier=ledger.noise_multiplier,
            expected_batch_size=ledger.public.expected_batch_size,
        )
        return self.precision_plugin.post_backward(closure_loss, self._module)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take the step, and ask the Trainer to stop if the budget allows no other."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        ledger = required(self._ledger)
        if not ledger.affords_a_step(self.config.target_epsilon):
            log.warning(
                "the privacy budget of epsilon %g is spent after %d steps: training stops here",
                self.config.target_epsilon,
                ledger.steps,
            )
            self.stop_training()
        return result

    def stop_training(self) -> None:
        """Make the Trainer take no further step; its ``min_epochs`` and ``min_steps`` give way."""
        stop_before_any_minimum(self._module.trainer)

    # Checkpoints

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the account into every checkpoint, weights-only ones too."""
        ledger = ledger_of(self._module)
        if ledger is not None:
            checkpoint[CHECKPOINT_KEY] = {"privacy": ledger.state_dict()}
        announce_plain(self.checkpoint_io, str(filepath), int(checkpoint.get("global_step", 0)))
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, and the account with it if the run is to go on.

        Raises:
            LedgerError: It is to be trained further and has no account.
        """
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._restored = require_account(checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over weights and their account together, also where the run is then refused."""
        bring_ledger(self._module, checkpoint)
        super().load_model_state_dict(checkpoint, strict=strict)

    def teardown(self) -> None:
        """Take the hooks off the model again, and settle the journal."""
        if fitted := self._engine is not None:
            required(self._engine).detach()
            self._engine = None
        if self._ledger is not None and self._lightning_module is not None:
            settle_account(self._lightning_module, self._ledger, fitted=fitted)
        if self._lightning_module is not None:
            vars(self._lightning_module).pop("_on_before_batch_transfer", None)
        super().teardown()

    @property
    def _module(self) -> pl.LightningModule:
        return required(self.lightning_module)
