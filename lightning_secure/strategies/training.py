"""The common part of private strategies around a step: options, loader, hooks, account."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_secure.compat.lightning import (
    exchange_before_transfer,
    exchange_epoch_results,
    has_before_transfer_hook,
    restore_before_transfer,
    training_loaders,
)
from lightning_secure.errors import UnsupportedTrainerOptionError
from lightning_secure.privacy.accounting.carried_ledger import keep_ledger, require_same_weights
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.checks.repeat_trials import Repeats
from lightning_secure.privacy.checks.repeated_rows import require_distinct_rows
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.randomness import FreshRandomness
from lightning_secure.privacy.run_contract import begin_ledger, require_same_promise
from lightning_secure.privacy.sampling import seed_of_rank
from lightning_secure.strategies.account import (
    account_of,
    lend_account,
    settle_account,
    trainable_names,
)
from lightning_secure.strategies.banded import BandedFit
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.strategies.measurements import (
    require_public_throughput,
    stop_system_metrics,
)
from lightning_secure.strategies.options import (
    carry_ledger,
    fixed_scale,
    planned_steps,
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
from lightning_secure.strategies.stepping import SteppingStrategy
from lightning_secure.strategies.steps import required, spare_logical_batch
from lightning_secure.strategies.telemetry import GuardedResults


class PrivateTraining(SteppingStrategy):
    """DP-SGD for a strategy of Lightning's, which comes after this one among the bases.

    Raises:
        UnsupportedTrainerOptionError: if a Trainer option would break the promise.
        LedgerError: if a run goes on without its account or its journal, or under another promise.
    """

    def setup(self, trainer: pl.Trainer) -> None:
        """Check the Trainer's options, prepare the model, and put the hooks on it."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        module = self._module
        # Before weights are sent around, which takes the same shapes in every process.
        require_same(self._collective, lambda: model_statement(module))
        restored, self._restored = self._restored, None
        # A module that was trained privately before goes on with its own account.
        self._ledger = restored or account_of(module)
        if fitting:
            seed = seed_of_rank(self.config.insecure_seed, self._collective.rank)
            self._randomness = FreshRandomness(seed, stream=1)
            with self._collective.together():
                self.precision_plugin = fixed_scale(self.precision_plugin, self.config)
                require_trainer_options(trainer, module, self.precision_plugin, self.config)
                stop_system_metrics()
            with self._collective.together():  # apart: sharded weights are gathered
                if self._ledger is not None:
                    require_same_weights(module, self._ledger)
                    self._ledger.release_beside(self._released.noise_multipliers)
            self._carry(lambda: self._ledger)
        if self._ledger is not None:
            self._ledger.budget = self.config.target_epsilon
        lend_account(module, self._account())
        super().setup(trainer)
        if not fitting:
            return
        with self._collective.together():
            require_optimizers(self.optimizers)
        require_same(
            self._collective,
            lambda: optimizer_statement(self.optimizers, self.lr_scheduler_configs, module),
        )
        with self._collective.unsharded(module), self._collective.together():
            self._engine = GradientEngine(
                module,
                max_grad_norm=self.config.max_grad_norm,
                loss_scale=self.config.loss_scale or 1.0,
                clipping=self.config.clipping_rule,
                homes=self._collective.homes(),
            )
            self._engine.attach()
            if self._ledger is not None:
                self._ledger.weights = None
        self._preflight_due = True
        self._repeats = Repeats()
        self._results = GuardedResults(self._public_metrics, self._released.metrics)
        exchange_epoch_results(trainer, self._results)
        if has_before_transfer_hook(trainer):
            # Lightning calls this hook once a batch, and here it is due once a chunk.
            exchange_before_transfer(module, spare_logical_batch)

    def process_dataloader(self, dataloader: object) -> object:
        """Exchange the training loader for one that draws by Poisson sampling."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        with self._collective.together():
            loader = require_plain_loader(dataloader)
            require_distinct_rows(loader.dataset)
        require_same_rows(self._collective, loader, begins=self._ledger is None, config=self.config)
        rows = len(loader.dataset)  # type: ignore[arg-type] # require_plain_loader saw to it
        if self._ledger is None:
            batch_size = (loader.batch_size or 1) * self._collective.size
            self._carry(partial(self._begun, rows, batch_size))
        public = required(self._ledger).public
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
            order=None if self._banded is None else self._banded.sampler,
        )

    def _begin_banded(self, trainer: pl.Trainer, rows: int) -> None:
        if self._banded is not None:
            raise UnsupportedTrainerOptionError(
                "mechanism='banded' takes rows in one order for the whole fit, and there are "
                "several training DataLoaders, or it is to be loaded anew "
                "(reload_dataloaders_every_n_epochs). The next step was not taken."
            )
        self._banded = BandedFit(
            trainer,
            self.config,
            required(self._ledger),
            rows=rows,
            noise=self._noise,
            planned_steps=partial(planned_steps, trainer, self.config),
        )

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
            beside=self._released.noise_multipliers,
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

        self._ledger = ledger = self._collective.once(covered)
        if ledger is not None:
            keep_ledger(self._module, ledger, covers=trainable_names(self._module))
            with self._collective.together():
                require_same_promise(self.config, ledger)

    def teardown(self) -> None:
        """Take the hooks off the model again, and settle the journal."""
        self._banded = None  # and the noise in it, which must not be kept
        self._expected = self._drawn = self._told = None
        if fitted := self._engine is not None:
            required(self._engine).detach()
            self._engine = None
        if self._ledger is not None and self._lightning_module is not None:
            settle_account(self._lightning_module, self._ledger, fitted=fitted)
        if self._lightning_module is not None:
            restore_before_transfer(self._lightning_module)
        super().teardown()


def _rarely_exceeded(expected: int) -> int:
    return expected + 4 * int(expected**0.5 + 1)
