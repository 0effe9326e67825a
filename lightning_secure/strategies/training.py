"""The Lightning side of private training: it holds a step and the processes that take it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_secure.compat.lightning import (
    before_batch_transfer,
    checkpoint_content,
    exchange_before_transfer,
    exchange_epoch_results,
    has_before_transfer_hook,
    restore_before_transfer,
    training_loaders,
)
from lightning_secure.errors import UnsupportedModelError, UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.carried_ledger import (
    bring_ledger,
    keep_ledger,
    require_same_weights,
    write_ledger,
)
from lightning_secure.privacy.accounting.ledger import Ledger, require_account
from lightning_secure.privacy.accounting.ledger_state import CHECKPOINT_KEY
from lightning_secure.privacy.checks.repeated_rows import require_distinct_rows
from lightning_secure.privacy.collective import Collective, Single
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import ClippingRule, FlatClipping
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.noise.banded.fit import BandedFit
from lightning_secure.privacy.released.step_metrics import ReleasedMetric
from lightning_secure.privacy.released.sums import PrivateSum
from lightning_secure.privacy.run_contract import begin_ledger, require_same_promise
from lightning_secure.privacy.sampling import LogicalBatch
from lightning_secure.privacy.step import PrivateStep, Surroundings, required
from lightning_secure.strategies.account import (
    RunAccount,
    account_of,
    announce_plain,
    lend_account,
    settle_account,
    trainable_names,
)
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.strategies.measurements import (
    require_public_throughput,
    stop_system_metrics,
    uncounted,
)
from lightning_secure.strategies.options import (
    carry_ledger,
    fixed_scale,
    planned_steps,
    require_no_accumulation,
    require_optimizers,
    require_trainer_options,
)
from lightning_secure.strategies.private_loader import PrivateDataLoader, require_plain_loader
from lightning_secure.strategies.same_rows import require_same_rows
from lightning_secure.strategies.statements import (
    model_statement,
    optimizer_statement,
    require_same,
)
from lightning_secure.strategies.telemetry import PUBLIC_METRICS, GuardedResults


class PrivateTraining(Strategy):
    """DP-SGD for a strategy of Lightning's, which comes after this one among the bases.

    The step is told by :class:`~lightning_secure.privacy.step.PrivateStep`. This class sets it up
    for a Trainer, takes it where Lightning takes ordinary ones, and carries the account of the
    weights through fits and checkpoints.

    Args:
        config: The privacy configuration.
        public_metrics: Names of metrics, logged while training, that do not depend on the rows.
        released_metrics: Metrics of each step that are published with noise, by name.
        journal: Directory of the run's journal; None for the default.
        options: For Lightning's own strategy.

    Attributes:
        asks_checkpoint_io: Every checkpoint goes through the CheckpointIO.

    Raises:
        UnsupportedModelError: if the model or its loss cannot be made private.
        UnsupportedTrainerOptionError: if a Trainer option would break the promise, or a step would
            be taken that no account covers.
        BudgetExhaustedError: if the next step would exceed ``target_epsilon``.
        LedgerError: if a run goes on without its account or its journal, or under another promise.

    Guarantees:
        Every checkpoint holds the account of the weights in it, weights-only ones too.
    """

    asks_checkpoint_io: ClassVar[bool] = True
    #: The processes that train together.
    talks_to: ClassVar[type[Collective]] = Single
    #: What it was shown to clip by; where several processes train, counts must be added up too.
    clippings: ClassVar[tuple[type[ClippingRule], ...]] = (FlatClipping,)
    #: Whether it was shown to train with banded noise.
    banded: ClassVar[bool] = False

    def __init__(
        self,
        config: DPConfig,
        *,
        public_metrics: Iterable[str] = (),
        released_metrics: Mapping[str, ReleasedMetric] | None = None,
        journal: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not isinstance(config.clipping_rule, self.clippings):
            raise UnsupportedTrainerOptionError(
                f"{type(self).__name__} does not clip by DPConfig(clipping={config.clipping!r}). "
                "Use PrivateStrategy, or flat clipping."
            )
        if config.mechanism == "banded" and (released_metrics or not self.banded):
            raise UnsupportedTrainerOptionError(
                "metrics cannot be released with the steps of mechanism='banded', which are one "
                "release of all rows. Use PrivateMean, or mechanism='poisson'."
                if released_metrics
                else f"{type(self).__name__} does not train with mechanism='banded'. Use "
                "PrivateStrategy."
            )
        self.config = config
        self._journal = journal
        self._restored: Ledger | None = None
        self._collective = self.talks_to()
        self._step = PrivateStep(
            config,
            self._collective,
            public=PUBLIC_METRICS | frozenset(public_metrics),
            released=released_metrics or {},
        )
        # The step between its two parts: Lightning's hooks run there.
        self._taking: Iterator[Any] | None = None
        self._results: GuardedResults | None = None
        self._expected: ExpectedBatch | None = None

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the module's weights; None before its first fit."""
        return self._step.ledger

    @property
    def published_metrics(self) -> dict[str, bool]:
        """The metrics that pass while training, and whether they are released with noise."""
        public = dict.fromkeys(self._step.public, False)
        return {**public, **dict.fromkeys(self._step.released.metrics, True)}

    @property
    def _module(self) -> pl.LightningModule:
        return required(self.lightning_module)

    # Setting up a fit

    def connect(self, model: pl.LightningModule) -> None:
        """Take a model, and forget what an earlier attempt may have left behind."""
        self._restored = None
        super().connect(model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Check the Trainer's options, prepare the model, and put the hooks on it."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        module, step, collective = self._module, self._step, self._collective
        # Before weights are sent around, which takes the same shapes in every process.
        require_same(collective, lambda: model_statement(module))
        restored, self._restored = self._restored, None
        # A module that was trained privately before goes on with its own account.
        step.ledger = restored or account_of(module)
        if fitting:
            with collective.together():
                self.precision_plugin = fixed_scale(self.precision_plugin, self.config)
                require_trainer_options(trainer, module, self.precision_plugin, self.config)
                stop_system_metrics()
            with collective.together():  # apart: sharded weights are gathered
                if step.ledger is not None:
                    require_same_weights(module, step.ledger)
                    step.ledger.release_beside(step.released.noise_multipliers)
            self._carry(lambda: step.ledger)
        if step.ledger is not None:
            step.ledger.budget = self.config.target_epsilon
        lend_account(module, self._account())
        super().setup(trainer)
        if fitting:
            self._begin_fit(trainer)

    def _begin_fit(self, trainer: pl.Trainer) -> None:
        module, step, collective = self._module, self._step, self._collective
        with collective.together():
            require_optimizers(self.optimizers)
        require_same(
            collective,
            lambda: optimizer_statement(self.optimizers, self.lr_scheduler_configs, module),
        )
        with collective.unsharded(module), collective.together():
            engine = GradientEngine(
                module,
                max_grad_norm=self.config.max_grad_norm,
                loss_scale=self.config.loss_scale or 1.0,
                clipping=self.config.clipping_rule,
                homes=collective.homes(),
            )
            step.begin_fit(engine)
            if step.ledger is not None:
                step.ledger.weights = None
        self._results = GuardedResults(step.public, step.released.metrics)
        exchange_epoch_results(trainer, self._results)
        if has_before_transfer_hook(trainer):
            # Lightning calls this hook once a batch, and here it is due once a chunk.
            exchange_before_transfer(module, _spare_logical_batch)

    def process_dataloader(self, dataloader: object) -> object:
        """Exchange the training loader for one that draws by Poisson sampling."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        with self._collective.together():
            loader = require_plain_loader(dataloader)
            require_distinct_rows(loader.dataset)
        require_same_rows(
            self._collective, loader, begins=self._step.ledger is None, config=self.config
        )
        rows = len(loader.dataset)  # type: ignore[arg-type] # require_plain_loader saw to it
        if self._step.ledger is None:
            batch_size = (loader.batch_size or 1) * self._collective.size
            self._carry(partial(self._begun, rows, batch_size))
        public = required(self._step.ledger).public
        if self.config.mechanism == "banded":
            self._begin_banded(trainer, rows)
        expected = -(-public.expected_batch_size // self._collective.size)
        self._expected = ExpectedBatch(expected)
        with self._collective.together():
            require_public_throughput(trainer, self._expected)
        return PrivateDataLoader(
            loader,
            sample_rate=public.sample_rate,
            steps=public.steps_per_epoch,
            max_physical_batch_size=1
            if self.config.isolate_rows
            else self.config.max_physical_batch_size or _rarely_exceeded(expected),
            seed=self.config.insecure_seed,
            secure=self.config.secure_noise,
            rank=self._collective.rank,
            world_size=self._collective.size,
            order=None if self._step.banded is None else self._step.banded.sampler,
        )

    def _begin_banded(self, trainer: pl.Trainer, rows: int) -> None:
        ledger = required(self._step.ledger)
        epoch = ledger.public.steps_per_epoch
        if self._step.banded is not None:
            raise UnsupportedTrainerOptionError(
                "mechanism='banded' takes rows in one order for the whole fit, and there are "
                "several training DataLoaders, or it is to be loaded anew "
                "(reload_dataloaders_every_n_epochs). The next step was not taken."
            )
        limit = trainer.limit_train_batches
        if limit < epoch if isinstance(limit, int) else limit != 1.0:
            raise UnsupportedTrainerOptionError(
                f"limit_train_batches={limit} would bring some rows back before the others had "
                "their turn. Leave it out, or use mechanism='poisson'. No step was taken."
            )
        # At least one, so that it can be said what the noise would have been.
        steps = max(1, planned_steps(trainer, self.config, epoch) - trainer.global_step)
        self._step.banded = BandedFit(
            self._step.noise,
            bands=self.config.bands or 1,
            rows=rows,
            steps=steps,
            epoch=epoch,
            seed=self.config.insecure_seed,
            secure=self.config.secure_noise,
            batch=lambda: trainer.fit_loop.epoch_loop.batch_idx,
        )
        ledger.plan(steps)

    def on_train_start(self) -> None:
        """Make sure that the rows come from the one loader that this strategy has put in place."""
        loaders = training_loaders(self._module.trainer)
        if [type(loader) for loader in loaders] != [PrivateDataLoader]:
            raise UnsupportedTrainerOptionError(
                "private training takes its rows from one training DataLoader, and there are "
                "several, or something exchanged it. No step was taken."
            )

    def _begun(self, rows: int, batch_size: int) -> Ledger:
        """Return a new account, with the public numbers of the first fit."""
        return begin_ledger(
            self.config,
            rows=rows,
            batch_size=batch_size,
            planned_steps=partial(planned_steps, self._module.trainer, self.config),
            beside=self._step.released.noise_multipliers,
        )

    def _carry(self, ledger_of_run: Callable[[], Ledger | None]) -> None:
        """Let the module carry an account, and its run's journal cover it.

        Where the run is refused, weights of a checkpoint have the account that came with them.
        """

        def covered() -> Ledger | None:
            ledger = ledger_of_run()
            if ledger is not None:
                carry_ledger(self._module.trainer, ledger, self.config, self._journal)
                # What this finds out is part of the account that others are given.
                ledger.affords_a_step(self.config.target_epsilon)
            return ledger

        self._step.ledger = ledger = self._collective.once(covered)
        if ledger is not None:
            keep_ledger(self._module, ledger, covers=trainable_names(self._module))
            with self._collective.together():
                require_same_promise(self.config, ledger)

    # One step

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Keep a logical batch, whose chunks are moved one at a time, and hand out a stand-in.

        Lightning gives the returned value to hooks, callbacks and :meth:`training_step`.
        """
        if isinstance(batch, LogicalBatch):
            self._step.drawn = batch
            return required(self._expected)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, batch: Any, *rest: Any, **named: Any) -> Any:
        """Take the first part of a step: draw, clip and sum.

        Returns:
            Not a number: a loss without noise is a release that no account contains, and Lightning
            hands it to callbacks, ``optimizer_step`` and ``on_before_backward``. With it, entries
            of the module's dict that ``public_metrics`` names.
        """
        self._taking = None
        taking = self._step.take(self._around(batch, rest, named))
        with uncounted(self._module.trainer):
            told = next(taking)
        required(self._results).end_step()
        self._taking = taking
        return told

    def _around(self, batch: Any, rest: Sequence[Any], named: dict[str, Any]) -> Surroundings:
        """Return what is around a step; ``rest`` is what the training step gets beside rows."""
        module, trainer, results = self._module, self._module.trainer, required(self._results)
        training_step, to_device = super().training_step, super().batch_to_device

        def require_turn() -> None:
            if not isinstance(batch, ExpectedBatch):
                raise UnsupportedModelError(
                    "training_step does not get a batch of this strategy's own sampling: it takes "
                    "a dataloader_iter, or a hook exchanged the batch. No step was taken."
                )
            require_no_accumulation(trainer)

        def moved(data: Any) -> Any:
            return to_device(
                before_batch_transfer(module, self.precision_plugin.convert_input(data))
            )

        def on_device(data: Any) -> Any:
            results.begin_chunk()
            return moved(data)

        def checkpoint_alone() -> dict[str, Any]:
            if trainer.world_size > 1:  # which may not run trial rows in this step
                return {"hyper_parameters": dict(module.hparams)}
            return checkpoint_content(trainer)

        return Surroundings(
            model=module,
            device=self.root_device,
            require_turn=require_turn,
            on_device=on_device,
            run=lambda data: training_step(data, *rest, **named),
            # From before the transfer hooks, which can mix rows as well. Without autocast:
            # rounding to 8 bits would hide what is looked for.
            run_trial=lambda data: module.training_step(moved(data), *rest, **named),
            backward=lambda loss: self.precision_plugin.backward(loss, module, self.optimizers[0]),
            optimized=lambda: [p for g in self.optimizers[0].param_groups for p in g["params"]],
            muted=results.muting,
            # There is one loader: on_train_start has seen to that.
            fetch=lambda *rows: training_loaders(trainer)[0].trial_batch(*rows),
            stateful=lambda: [
                *self.optimizers,
                *(item.scheduler for item in self.lr_scheduler_configs),
            ],
            checkpoint=partial(checkpoint_content, trainer),
            checkpoint_alone=checkpoint_alone,
        )

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Take the second part of a step: charge, add noise and publish.

        The chunks went backward already; this is where Lightning expects gradients to appear.
        """
        with self._collective.until_summed(required(self._step.engine).parameters):
            taking, self._taking = self._taking, None
            if taking is None:
                raise UnsupportedTrainerOptionError(
                    "backward runs a second time for one training step, or without one, and the "
                    "sums of a step are released once. Call it once after each training step. "
                    "Nothing more was released."
                )
            self.precision_plugin.pre_backward(closure_loss, self._module)
        required(self._results).publish(next(taking))
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
        self._stop_if_spent()
        return result

    def _stop_if_spent(self) -> None:
        if self._step.is_last():
            self.stop_training()

    def stop_training(self) -> None:
        """Make the Trainer take no further step; its ``min_epochs`` and ``min_steps`` give way."""
        _stop_before_any_minimum(self._module.trainer)

    # Single releases

    def release(
        self,
        values: Tensor,
        *,
        bounds: tuple[float, float],
        noise_multiplier: float,
        public_rows: int | None = None,
    ) -> float:
        """Publish the mean of one number a row, with noise, and charge the run's account for it.

        Args:
            values: One number for each row of the training set, shape ``(rows,)``.
            bounds: Between which values are moved.
            noise_multiplier: Standard deviation of the noise, in units of what one row can change.
            public_rows: Their number, if it is public; otherwise it is charged as well.

        For values that each step computes of its draw, ``released_metrics`` costs less.

        Raises:
            ConfigError: if a number is out of range, or there is not one number a row.
            PrivacyError: if the module is only being tried out, as ``training_step`` is before the
                first step. Nothing was released.
            BudgetExhaustedError: if the release would exceed ``target_epsilon``. Nothing was
                released.
            LedgerError: if there is no account yet, or it cannot be charged. Nothing was released.
        """
        metric = PrivateSum(bounds, noise_multiplier=noise_multiplier, public_rows=public_rows)
        total, count = metric.summed(values)
        return float(metric.released(total, count, account=self._account(), noise=self._step.noise))

    def _account(self) -> RunAccount:
        """Return the account that single releases of the rows charge."""
        return RunAccount(
            trying=lambda: (
                self._module.trainer.sanity_checking
                or (self._results is not None and self._results.muted)
            ),
            charge=self._step.charge,
            charged=self._stop_if_spent,
        )

    # Checkpoints

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None
    ) -> None:
        """Write the account into every checkpoint, weights-only ones too."""
        if CHECKPOINT_KEY not in checkpoint:  # the module's own hook does it, unless exchanged
            write_ledger(self._module, checkpoint)
        if self.is_global_zero:  # which alone writes it
            step = int(checkpoint.get("global_step", 0))
            announce_plain(self.checkpoint_io, str(filepath), step)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, and the account with it if the run is to go on.

        Raises:
            LedgerError: if the checkpoint is to be trained further and has no account.
        """
        with self._collective.together():
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only=weights_only)
            if self._module.trainer.state.fn == TrainerFn.FITTING:
                self._restored = require_account(checkpoint)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over weights and their account together, also where the run is then refused."""
        load = partial(super().load_model_state_dict, checkpoint, strict=strict)
        bring_ledger(self._module, checkpoint, load)

    def teardown(self) -> None:
        """Take the hooks off the model again, and settle the journal."""
        module, ledger = self._lightning_module, self._step.ledger
        self._expected = self._taking = None
        fitted = self._step.end_fit()
        if module is not None:
            if ledger is not None:
                settle_account(module, ledger, fitted=fitted)
            restore_before_transfer(module)
        super().teardown()


def _rarely_exceeded(expected: int) -> int:
    return expected + 4 * int(expected**0.5 + 1)


def _spare_logical_batch(module: pl.LightningModule, batch: Any, dataloader_idx: int = 0) -> Any:
    """Run the module's hook on ordinary batches only; a logical one's chunks have their turn."""
    if isinstance(batch, LogicalBatch):
        return batch
    return before_batch_transfer(module, batch, dataloader_idx)


def _stop_before_any_minimum(trainer: pl.Trainer) -> None:
    """Make the Trainer stop after this step.

    Lightning passes over ``should_stop`` until ``min_epochs`` and ``min_steps`` are met. A budget
    that is spent before them is spent all the same, so they are given up.
    """
    trainer.fit_loop.min_epochs = None
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True
