"""The private step: draw, clip, sum, charge, add noise, publish. It knows no Lightning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_secure.errors import (
    BudgetExhaustedError,
    ConfigError,
    LedgerError,
    PrivacyError,
    UnsupportedModelError,
    UnsupportedTrainerOptionError,
)
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.checks.collate_fn import require_rows_kept_apart
from lightning_secure.privacy.checks.metric_isolation import metrics_kept_apart
from lightning_secure.privacy.checks.preflight import preflight
from lightning_secure.privacy.checks.repeat_trials import Repeats
from lightning_secure.privacy.checks.snapshot import return_freed_memory
from lightning_secure.privacy.checks.stranger_rows import try_again
from lightning_secure.privacy.checks.trial_run import Trial
from lightning_secure.privacy.checks.trial_seeds import Seeds
from lightning_secure.privacy.collective import Collective
from lightning_secure.privacy.config import DPConfig
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.noise.banded.fit import BandedFit
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.randomness import FreshRandomness
from lightning_secure.privacy.released.adaptive_bound import clip_bound, follow, with_count
from lightning_secure.privacy.released.step_metrics import (
    ReleasedMetric,
    StepMetrics,
    require_rows_apart,
)
from lightning_secure.privacy.sampling import Chunk, LogicalBatch, seed_of_rank

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Surroundings:
    """The training around one step: it runs the module, and says what trial rows look at.

    Attributes:
        model: The module that is trained.
        device: Where the step runs.
        require_turn: Makes sure that this step is due, for the rows that were drawn.
        on_device: Returns a chunk as the training step gets it.
        run: Returns the output of the training step for a chunk that is on the device.
        run_trial: Returns the output of the training step for trial rows as they were collated.
        backward: Runs a backward pass.
        optimized: Returns the parameters of the optimizer.
        muted: Returns a context in which nothing that is logged is seen.
        fetch: Returns rows of the dataset, by number, as the user's own function collates them.
        stateful: Returns optimizers and schedules, which trial rows must leave as they are.
        checkpoint: Returns what a checkpoint would hold.
        checkpoint_alone: Returns what it would hold, as far as that takes no other process.
    """

    model: nn.Module
    device: torch.device
    require_turn: Callable[[], None]
    on_device: Callable[[Any], Any]
    run: Callable[[Any], Any]
    run_trial: Callable[[Any], Any]
    backward: Callable[[Tensor], None]
    optimized: Callable[[], list[nn.Parameter]]
    muted: Callable[[], AbstractContextManager[None]]
    fetch: Callable[..., Any]
    stateful: Callable[[], list[Any]]
    checkpoint: Callable[[], dict[str, Any]]
    checkpoint_alone: Callable[[], dict[str, Any]]


class PrivateStep:
    """The steps of DP-SGD for one model after another.

    Args:
        config: The privacy configuration.
        collective: The processes that take each step together.
        public: Names of entries of a training step's dict that do not depend on the rows.
        released: Metrics of each step that are published with noise, by name.

    Attributes:
        ledger: The account of the model's weights; None before the first fit.
        engine: Clips and sums in a fit; None outside of it.
        banded: The noise of a fit with ``mechanism="banded"``.
        drawn: The rows of the next step.

    Raises:
        ConfigError: if a metric is both public and released.

    Guarantees:
        The account is charged before the noised gradient is released. A draw is gone once it is
        taken. A step that fails in one process is taken in none.

    Source:
        Abadi et al. 2016, arXiv:1607.00133.
    """

    def __init__(
        self,
        config: DPConfig,
        collective: Collective,
        *,
        public: Iterable[str],
        released: Mapping[str, ReleasedMetric],
    ) -> None:
        self.config, self.collective = config, collective
        self.public = frozenset(public)
        released = with_count(config.clipping_rule, released)
        self.released = StepMetrics(released, max_grad_norm=config.max_grad_norm)
        if both := self.public & set(self.released.metrics):
            raise ConfigError(
                f"metrics {sorted(both)} are both public_metrics and released_metrics: under one "
                "name, the module's own value would pass without noise. Name each in one of them."
            )
        self.noise = GaussianNoise(config.insecure_seed, secure=config.secure_noise)
        self.ledger: Ledger | None = None
        self.engine: GradientEngine | None = None
        self.banded: BandedFit | None = None
        self.drawn: LogicalBatch | None = None
        # Of the last step that drew a row; a step without one tells hooks the same.
        self._told: Any = None
        self._preflight_due = True
        self._repeats = Repeats()
        self._randomness = FreshRandomness(config.insecure_seed, stream=1)

    def begin_fit(self, engine: GradientEngine) -> None:
        """Put the engine's hooks on the model, which is checked before its first step."""
        seed = seed_of_rank(self.config.insecure_seed, self.collective.rank)
        self._randomness = FreshRandomness(seed, stream=1)
        self._preflight_due, self._repeats = True, Repeats()
        self.engine = engine
        engine.attach()

    def end_fit(self) -> bool:
        """Take the hooks off, forget everything un-noised, and return whether there were any."""
        self.banded = None  # and the noise in it, which must not be kept
        self.drawn = self._told = None
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.detach()
        return engine is not None

    def take(self, around: Surroundings) -> Iterator[Any]:
        """Take one step of DP-SGD, in two parts; the caller's hooks run between them.

        Args:
            around: Runs the model.

        Yields:
            The output that hooks may see, before anything is released. Then the released metrics
            of the step, by name, with the noised gradient in ``.grad`` of the parameters.

        Raises:
            BudgetExhaustedError: if the step would exceed ``target_epsilon``.
            UnsupportedModelError: if the model or its loss cannot be made private.
            UnsupportedTrainerOptionError: if the step is not the one that is due.
            LedgerError: if the account cannot be charged.
            PrivacyError: if another process has failed.
        """
        engine, collective = required(self.engine), self.collective
        with collective.unsharded(around.model), collective.until_summed(engine.parameters):
            told = self._clip_and_sum(self._draw(around), around)
        yield told
        with collective.until_summed(engine.parameters):
            self._charge(around)
        self._add_noise(around)
        yield self._publish(around)

    def _draw(self, around: Surroundings) -> Sequence[Chunk]:
        """Return the rows of this step, in chunks, and begin its sums."""
        around.require_turn()
        # Gone once it is taken: a second gradient would be a second look at the same draw, which
        # no account of independent draws covers.
        drawn, self.drawn = self.drawn, None
        if drawn is None:
            raise UnsupportedTrainerOptionError(
                "the closure was evaluated twice on one batch, by the optimizer or by an "
                "optimizer_step of the module's own, and each evaluation is a release of its own. "
                "Use an optimizer that does so once. The second was not released."
            )
        ledger, engine = required(self.ledger), required(self.engine)
        if self.banded is not None:
            self.banded.require_turn()
        self._require_affordable(ledger)
        bound = clip_bound(self.config, ledger)
        engine.begin_step(bound)
        self._repeats.begin_step()
        self.released.begin_step(bound)
        return drawn.chunks

    def _clip_and_sum(self, chunks: Sequence[Chunk], around: Surroundings) -> Any:
        """Add up the clipped gradients of all rows, and return the output that hooks may see."""
        output: Any = None
        with self._randomness.apart(around.device):
            for chunk in chunks:
                with self.collective.alone(around.model):
                    output = self._add_chunk(chunk, around)
        told = public_output(output, around.device, self.public)
        if chunks:
            self._told = told
        return told if self._told is None else self._told

    def _add_chunk(self, chunk: Chunk, around: Surroundings) -> Any:
        """Run a chunk forward and backward, and add its clipped gradients to the sums."""
        engine = required(self.engine)
        if self._preflight_due:
            self._preflight(chunk, around)
            self._preflight_due = False
            self._repeats.begin()
        with metrics_kept_apart(around.model):
            data = around.on_device(chunk.data)
            with engine.recording(rows=chunk.size):
                output = around.run(data)
                loss = loss_of(output)
                graph = self._repeats.look(loss, chunk.size)
                around.backward(engine.scaled(loss, chunk.size))
        self.released.add_chunk(output, engine.add_chunk(chunk.size))
        del loss
        if self._repeats.note(graph, chunk.data, rows=chunk.size, layers=engine.called):
            self._try_again(chunk, around)
        return output

    def _charge(self, around: Surroundings) -> None:
        """Enter the step in the account, before anything of it is released."""
        ledger, engine = required(self.ledger), required(self.engine)
        engine.require_covered(around.model.named_parameters())
        engine.require_covered(("of the optimizer", p) for p in around.optimized())
        # Again: training_step may have released something, and left less than a step takes.
        self._require_affordable(ledger)
        ledger.record()

    def _add_noise(self, around: Surroundings) -> None:
        """Add noise in one process, sum up those of all, and release the mean into ``.grad``."""
        ledger, engine = required(self.ledger), required(self.engine)
        banded = self.banded
        engine.release(
            self.noise if banded is None else banded.next_noise(engine.parameters),
            noise_multiplier=ledger.noise_multiplier if self.collective.adds_noise else 0.0,
            expected_batch_size=ledger.public.expected_batch_size,
            combine=lambda sums, noised: self.collective.sum(
                sums, engine.homes, noised=noised, noises=int(ledger.noise_multiplier > 0)
            ),
        )
        for parameter in around.optimized():
            if not parameter.requires_grad:  # thawed in training_step only, it has one of autograd
                parameter.grad = None

    def _publish(self, around: Surroundings) -> dict[str, Tensor]:
        """Return the metrics of the draw, which the step's entry in the account has covered."""
        ledger = required(self.ledger)
        if self.released.noise_multipliers != ledger.beside:
            raise LedgerError(
                "the account of this run does not cover the metrics that are to be released with "
                "each step. They were not released."
            )
        if not self.released.metrics:
            return {}
        metrics = self.released.release(
            self.released.take(around.device),
            self.noise,
            expected_batch_size=ledger.public.expected_batch_size,
            on=ledger.noise_multiplier > 0,
        )
        return {**metrics, **follow(self.config, ledger, metrics)}

    # The account

    def _require_affordable(self, ledger: Ledger) -> None:
        if not ledger.affords_a_step(self.config.target_epsilon):
            raise BudgetExhaustedError(
                f"epsilon {ledger.epsilon():.4g} of {self.config.target_epsilon:.4g} is spent "
                f"after {ledger.steps} steps, and one more would exceed it. The step was not "
                "taken; the last checkpoint holds the weights and the account."
            )

    def is_last(self) -> bool:
        """Return whether the fit allows no further step, and say so in the log."""
        ledger, fitting = required(self.ledger), self.engine is not None
        if self.banded is not None and self.banded.over:
            return True
        if not fitting or ledger.affords_a_step(self.config.target_epsilon):
            return False
        log.warning(
            "the privacy budget of epsilon %g is spent after %d steps: training stops here",
            self.config.target_epsilon,
            ledger.steps,
        )
        return True

    def charge(self, release: Release) -> None:
        """Enter a single release of the same rows in every process, or in none.

        Raises:
            BudgetExhaustedError: if the release would exceed the budget.
            LedgerError: if there is no account, or it cannot be charged.
        """
        ledger = self.ledger
        if ledger is None:
            raise LedgerError("there is no account before the first fit. Nothing was released.")

        def charged() -> PrivacyError | None:
            try:
                ledger.charge(release)
            except PrivacyError as error:
                return error
            return None

        # The first process has the journal. What it cannot charge, all refuse for its reason.
        if (refused := self.collective.once(charged)) is not None:
            self.collective.fail(refused)
        if self.collective.rank > 0:
            ledger.enter(release)

    # Trial rows

    def _preflight(self, chunk: Chunk, around: Surroundings) -> None:
        """Check the module on trial rows, before its first step."""
        engine, model = required(self.engine), around.model
        isolated, seed = self.config.isolate_rows, self.config.insecure_seed

        def loss(batch: Any) -> Tensor:
            return loss_of(around.run_trial(batch))

        def fetched() -> None:
            for row in range(5):  # each by itself, as they run
                around.fetch([row])

        def kept_apart() -> None:
            require_rows_kept_apart(
                around.fetch, engine, model, loss, backward=around.backward, seed=seed
            )

        with self.collective.trial(model), around.muted():
            preflight(
                engine,
                model,
                loss,
                chunk.data,
                size=chunk.size,
                backward=around.backward,
                checkpoint=around.checkpoint,
                stateful=around.stateful(),
                first=fetched if isolated else kept_apart,
                isolated=isolated,
                seed=seed,
            )
            entries = () if isolated else self.released.entries
            require_rows_apart(
                entries, model, around.run_trial, chunk.data, size=chunk.size, seed=seed
            )
        # What the first step takes would come on top of it.
        return_freed_memory()

    def _try_again(self, chunk: Chunk, around: Surroundings) -> None:
        """Run trial rows in a later step that is due, or is unlike those before."""
        trial = Trial(
            required(self.engine),
            around.model,
            lambda batch: loss_of(around.run_trial(batch)),
            around.backward,
            outcome="This step was not taken.",
        )
        with self.collective.trial(around.model), around.muted(), self._repeats.again():
            try_again(
                trial,
                chunk.data,
                chunk.size,
                stateful=around.stateful(),
                seeds=Seeds(self.config.insecure_seed),
                checkpoint=around.checkpoint_alone,
            )


def loss_of(output: Any) -> Tensor:
    """Return the scalar that a training step wants minimised.

    Raises:
        UnsupportedModelError: if the step returned no loss.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise UnsupportedModelError(
            "training_step must return the mean loss of the batch as a scalar tensor, or a dict "
            "with it under 'loss'. Returning None to skip a batch would let the rows decide "
            "whether a step is taken. No step was taken."
        )
    return loss.reshape(())


def public_output(output: Any, device: torch.device, public: Container[str]) -> Any:
    """Return what hooks may see of the output of a training step.

    Args:
        output: Of the last chunk; None if there was none.
        device: Where the loss is expected.
        public: Names of entries that do not depend on the rows.

    Returns:
        Not a number for the loss, which is computed from rows without noise: code that decides by
        it fails visibly. A dict with the public entries, if the output had any.

    >>> told = public_output({"loss": 1.5, "lr": 0.1}, torch.device("cpu"), {"lr"})
    >>> told["lr"], bool(told["loss"].isnan())
    (0.1, True)
    """
    loss = torch.full((), float("nan"), device=device)
    entries = output.items() if isinstance(output, dict) else ()
    told = {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in entries
        if name in public
    }
    return {**told, "loss": loss} if told else loss


def required(value: T | None) -> T:
    """Return what is there while a Trainer fits, and only then.

    Raises:
        PrivacyError: if the value is missing.
    """
    if value is None:
        raise PrivacyError("private training is not set up; it runs only inside Trainer.fit.")
    return value
