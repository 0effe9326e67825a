"""The private step: clipped sums over chunks, the account, the noise, the optimizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_secure.compat.lightning import (
    before_batch_transfer,
    checkpoint_content,
    training_loaders,
)
from lightning_secure.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.checks.collate_fn import require_rows_kept_apart
from lightning_secure.privacy.checks.metric_isolation import metrics_kept_apart
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.checks.repeat_trials import Repeats
from lightning_secure.privacy.checks.snapshot import return_freed_memory
from lightning_secure.privacy.checks.stranger_rows import try_again
from lightning_secure.privacy.checks.trial_run import Trial
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.clipping.rules import ClippingRule, FlatClipping
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.noise.banded.noise import BandedNoise
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.randomness import FreshRandomness
from lightning_secure.privacy.released.adaptive_bound import clip_bound, follow, with_count
from lightning_secure.privacy.released.step_metrics import (
    ReleasedMetric,
    StepMetrics,
    require_rows_apart,
)
from lightning_secure.privacy.released.sums import PrivateSum
from lightning_secure.privacy.sampling import Chunk, LogicalBatch
from lightning_secure.strategies.account import RunAccount
from lightning_secure.strategies.accounted import AccountedStrategy
from lightning_secure.strategies.banded import BandedFit
from lightning_secure.strategies.expected import ExpectedBatch
from lightning_secure.strategies.measurements import uncounted
from lightning_secure.strategies.options import require_no_accumulation
from lightning_secure.strategies.steps import loss_of, required, withheld
from lightning_secure.strategies.telemetry import PUBLIC_METRICS, GuardedResults

log = logging.getLogger(__name__)


class SteppingStrategy(AccountedStrategy):
    """Takes the steps of DP-SGD where Lightning takes ordinary ones.

    Args:
        config: The privacy configuration.
        public_metrics: Names of metrics, logged while training, that do not depend on the rows.
        released_metrics: Metrics of each step that are published with noise, by name.
        options: For the bases.

    Raises:
        UnsupportedModelError: if the model or its loss cannot be made private.
        UnsupportedTrainerOptionError: if a step would be taken that no account covers.
        BudgetExhaustedError: if the next step would exceed ``target_epsilon``.
    """

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
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
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
        released = with_count(config.clipping_rule, released_metrics or {})
        self._released = StepMetrics(released, max_grad_norm=config.max_grad_norm)
        self._public_metrics = PUBLIC_METRICS | frozenset(public_metrics)
        if both := self._public_metrics & set(self._released.metrics):
            raise ConfigError(
                f"metrics {sorted(both)} are both public_metrics and released_metrics: under one "
                "name, the module's own value would pass without noise. Name each in one of them."
            )
        self._engine: GradientEngine | None = None
        self._noise = GaussianNoise(config.insecure_seed, secure=config.secure_noise)
        self._banded: BandedFit | None = None
        self._randomness = FreshRandomness(config.insecure_seed, stream=1)
        self._results: GuardedResults | None = None
        self._preflight_due = True
        self._expected: ExpectedBatch | None = None
        self._drawn: LogicalBatch | None = None
        # Of the last step that drew a row; a step without one tells hooks the same.
        self._told: Any = None
        self._repeats = Repeats()

    @property
    def published_metrics(self) -> dict[str, bool]:
        """The metrics that pass while training, and whether they are released with noise."""
        public = dict.fromkeys(self._public_metrics, False)
        return {**public, **dict.fromkeys(self._released.metrics, True)}

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Keep a logical batch, whose chunks are moved one at a time, and hand out a stand-in.

        Lightning gives the returned value to hooks, callbacks and :meth:`training_step`.
        """
        if isinstance(batch, LogicalBatch):
            self._drawn = batch
            return required(self._expected)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step and backward on each chunk, and sum clipped gradients.

        Returns:
            Not a number: a loss without noise is a release that no account contains, and Lightning
            hands it to callbacks, ``optimizer_step`` and ``on_before_backward``. With it, entries
            of the module's dict that ``public_metrics`` names.
        """
        engine = required(self._engine)
        with (
            self._collective.unsharded(self._module),
            self._collective.until_summed(engine.parameters),
        ):
            return self._sum_chunks(*args, **kwargs)

    def _sum_chunks(self, batch: Any, *rest: Any, **kwargs: Any) -> Any:
        if not isinstance(batch, ExpectedBatch):
            raise UnsupportedModelError(
                "training_step does not get a batch of this strategy's own sampling: it takes a "
                "dataloader_iter, or a hook exchanged the batch. No step was taken."
            )
        # Gone once it is taken: a second gradient would be a second look at the same draw, which
        # no account of independent draws covers.
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            raise UnsupportedTrainerOptionError(
                "the closure was evaluated twice on one batch, by the optimizer or by an "
                "optimizer_step of the module's own, and each evaluation is a release of its own. "
                "Use an optimizer that does so once. The second was not released."
            )
        ledger, engine = required(self._ledger), required(self._engine)
        if self._banded is not None:
            self._banded.require_turn()
        self._require_affordable(ledger)
        require_no_accumulation(self._module.trainer)
        bound = clip_bound(self.config, ledger)
        engine.begin_step(bound)
        self._repeats.begin_step()
        self._released.begin_step(bound)
        with self._randomness.apart(self.root_device), uncounted(self._module.trainer):
            outputs = (self._chunk(chunk, rest, kwargs) for chunk in drawn.chunks)
            told = withheld(outputs, self.root_device, self._public_metrics)
        if drawn.chunks:
            required(self._results).again = False
            self._told = told
        else:
            required(self._results).repeat()
        return told if self._told is None else self._told

    def _chunk(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        with self._collective.alone(self._module):
            return self._clip(chunk, rest, kwargs)

    def _clip(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        engine = required(self._engine)
        if self._preflight_due:
            self._preflight(chunk, rest, kwargs)
            self._preflight_due = False
            self._repeats.begin()
        with metrics_kept_apart(self._module):
            data = self._on_device(chunk.data)
            with engine.recording(rows=chunk.size):
                output = super().training_step(data, *rest, **kwargs)
                loss = loss_of(output)
                graph = self._repeats.look(loss, chunk.size)
                self._backward(engine.scaled(loss, chunk.size))
        self._released.add_chunk(output, engine.add_chunk(chunk.size))
        required(self._results).again = True
        del loss
        if self._repeats.note(graph, chunk.data, rows=chunk.size, layers=engine.called):
            self._try_again(chunk, rest, kwargs)
        return output

    def _require_affordable(self, ledger: Ledger) -> None:
        if not ledger.affords_a_step(self.config.target_epsilon):
            raise BudgetExhaustedError(
                f"epsilon {ledger.epsilon():.4g} of {self.config.target_epsilon:.4g} is spent "
                f"after {ledger.steps} steps, and one more would exceed it. The step was not "
                "taken; the last checkpoint holds the weights and the account."
            )

    def _backward(self, loss: Tensor) -> None:
        self.precision_plugin.backward(loss, self._module, self.optimizers[0])

    def _on_device(self, data: Any) -> Any:
        module = self._module
        data = self.precision_plugin.convert_input(data)
        return super().batch_to_device(before_batch_transfer(module, data))

    def _tried(self, rest: Sequence[Any], kwargs: dict[str, Any]) -> Callable[[Any], Any]:
        """Return what runs a trial batch, and returns what the training step returns."""

        def output(batch: Any) -> Any:
            # From before the transfer hooks, which can mix rows as well. Without autocast:
            # rounding to 8 bits would hide what is looked for.
            return self._module.training_step(self._on_device(batch), *rest, **kwargs)

        return output

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Let nothing that trial runs log be seen."""
        results = required(self._results)
        results.muted = True
        try:
            with self._collective.trial(self._module):
                yield
        finally:
            results.muted = False

    @property
    def _stateful(self) -> list[Any]:
        return [*self.optimizers, *(c.scheduler for c in self.lr_scheduler_configs)]

    def _preflight(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> None:
        engine, trainer = required(self._engine), self._module.trainer
        output = self._tried(rest, kwargs)

        def loss(batch: Any) -> Tensor:
            return loss_of(output(batch))

        (loader,) = training_loaders(trainer)  # on_train_start has seen to that

        def fetched() -> None:
            for row in range(5):  # each by itself, as they run
                loader.trial_batch([row])

        def kept_apart() -> None:
            require_rows_kept_apart(
                loader.trial_batch,
                engine,
                self._module,
                loss,
                backward=self._backward,
                seed=self.config.insecure_seed,
            )

        isolated, seed = self.config.isolate_rows, self.config.insecure_seed
        with self._trying():
            preflight(
                engine,
                self._module,
                loss,
                chunk.data,
                size=chunk.size,
                backward=self._backward,
                checkpoint=partial(checkpoint_content, trainer),
                stateful=self._stateful,
                first=fetched if isolated else kept_apart,
                isolated=isolated,
                seed=seed,
            )
            entries = () if isolated else self._released.entries
            require_rows_apart(
                entries, self._module, output, chunk.data, size=chunk.size, seed=seed
            )
        # What the first step takes would come on top of it.
        return_freed_memory()

    def _try_again(self, chunk: Chunk, rest: Sequence[Any], kwargs: dict[str, Any]) -> None:
        output = self._tried(rest, kwargs)
        trial = Trial(
            required(self._engine),
            self._module,
            lambda batch: loss_of(output(batch)),
            self._backward,
            outcome="This step was not taken.",
        )
        with self._trying(), self._repeats.again():
            try_again(
                trial,
                chunk.data,
                chunk.size,
                stateful=self._stateful,
                seeds=Seeds(self.config.insecure_seed),
                checkpoint=self._held_alone,
            )

    def _held_alone(self) -> dict[str, Any]:
        """Return what a checkpoint would hold, as far as that takes no other process."""
        trainer = self._module.trainer
        if trainer.world_size > 1:  # which may not run trial rows in this step
            return {"hyper_parameters": dict(self._module.hparams)}
        return checkpoint_content(trainer)

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Account for the step, then release its noised gradient into ``.grad``.

        The chunks went backward already; this is where Lightning expects gradients to appear.
        """
        ledger, engine = required(self._ledger), required(self._engine)
        with self._collective.until_summed(engine.parameters):
            self.precision_plugin.pre_backward(closure_loss, self._module)
            engine.require_covered(self._module.named_parameters())
            groups = self.optimizers[0].param_groups
            engine.require_covered(("of the optimizer", p) for g in groups for p in g["params"])
            # Again: training_step may have released something, and left less than a step takes.
            self._require_affordable(ledger)
            ledger.record()
        engine.release(
            self._gradient_noise(),
            noise_multiplier=ledger.noise_multiplier if self._collective.adds_noise else 0.0,
            expected_batch_size=ledger.public.expected_batch_size,
            combine=lambda sums, noised: self._collective.sum(
                sums, engine.homes, noised=noised, noises=int(ledger.noise_multiplier > 0)
            ),
        )
        for parameter in (p for group in groups for p in group["params"]):
            if not parameter.requires_grad:  # thawed in training_step only, it has one of autograd
                parameter.grad = None
        self._publish(ledger)
        return self.precision_plugin.post_backward(closure_loss, self._module)

    def _gradient_noise(self) -> GaussianNoise | BandedNoise:
        if self._banded is None:
            return self._noise
        return self._banded.next_noise(required(self._engine).parameters)

    def _publish(self, ledger: Ledger) -> None:
        """Publish the metrics of the draw, which the step's entry in the account has covered."""
        if self._released.noise_multipliers != ledger.beside:
            raise LedgerError(
                "the account of this run does not cover the metrics that are to be released with "
                "each step. They were not released."
            )
        if not self._released.metrics:
            return
        sums, public = self._released.take(self.root_device), ledger.public
        metrics = self._released.release(
            sums,
            self._noise,
            expected_batch_size=public.expected_batch_size,
            on=ledger.noise_multiplier > 0,
        )
        required(self._results).publish({**metrics, **follow(self.config, ledger, metrics)})

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
        return float(metric.released(total, count, account=self._account(), noise=self._noise))

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
        ledger, fitting = required(self._ledger), self._engine is not None
        if self._banded is not None and self._banded.over:
            self.stop_training()
        elif fitting and not ledger.affords_a_step(self.config.target_epsilon):
            log.warning(
                "the privacy budget of epsilon %g is spent after %d steps: training stops here",
                self.config.target_epsilon,
                ledger.steps,
            )
            self.stop_training()

    def _account(self) -> RunAccount:
        """Return what single releases of the rows charge."""
        return RunAccount(
            trying=lambda: (
                self._module.trainer.sanity_checking
                or (self._results is not None and self._results.muted)
            ),
            ledger=lambda: self._ledger,
            charge=self._charge,
            charged=self._stop_if_spent,
        )
