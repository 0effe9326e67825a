"""The account of what a run has revealed. It travels in every checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self, runtime_checkable

from lightning_secure.errors import ConfigError, LedgerError
from lightning_secure.privacy.accounting import (
    Release,
    affordable_steps,
    calibrate_noise,
    epsilon_pld,
    epsilon_rdp,
)
from lightning_secure.privacy.config import DPConfig
from lightning_secure.validate import open_unit_interval, positive, positive_int

__all__ = [
    "CHECKPOINT_KEY",
    "HasLedger",
    "Ledger",
    "PublicNumbers",
    "begin_ledger",
    "keep_ledger",
    "ledger_of",
    "require_same_promise",
]

log = logging.getLogger(__name__)
CHECKPOINT_KEY: Final = "lightning_secure"
_VERSION: Final = 1
_ATTRIBUTE: Final = "_lightning_secure_ledger"


@dataclass(frozen=True, kw_only=True)
class PublicNumbers:
    """What is fixed at the first fit and never derived from the data again.

    Attributes:
        dataset_size: Number of rows.
        dataset_size_declared: Whether the user declared it public. Otherwise it was read off the
            dataset and is treated as public from then on.
        expected_batch_size: Rows a step draws on average; the divisor of the noised sum.
        steps_per_epoch: Draws an epoch.
    """

    dataset_size: int
    dataset_size_declared: bool
    expected_batch_size: int
    steps_per_epoch: int

    @property
    def sample_rate(self) -> float:
        """Probability with which each row is drawn."""
        return self.expected_batch_size / self.dataset_size


@dataclass(kw_only=True)
class Ledger:
    """What was released so far, and under which public numbers.

    Attributes:
        delta: Probability with which the epsilon may fail to hold.
        max_grad_norm: The clipping norm.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        public: The public numbers.
        run_id: 32 hexadecimal digits, the same in every checkpoint of a run.
        releases: Steps taken, equal ones together.
        insecure: Why the run is not private; empty if it is.
    """

    delta: float
    max_grad_norm: float
    noise_multiplier: float
    public: PublicNumbers
    run_id: str = field(default_factory=lambda: secrets.token_hex(16))
    releases: list[Release] = field(default_factory=list)
    insecure: tuple[str, ...] = ()
    _certified: dict[float, int] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return sum(release.steps for release in self.releases)

    @property
    def private(self) -> bool:
        """Whether the epsilon means anything."""
        return not self.insecure

    def record(self) -> None:
        """Enter one step. Call it before its result is released."""
        noise, rate = self.noise_multiplier, self.public.sample_rate
        if self.releases and self.releases[-1][:2] == (noise, rate):
            self.releases[-1] = Release(noise, rate, self.releases[-1].steps + 1)
        else:
            self.releases.append(Release(noise, rate, 1))

    def epsilon(self, *, more_steps: int = 0) -> float:
        """Return the epsilon spent, or that after ``more_steps`` more; infinite if not private."""
        if not self.private:
            return math.inf
        return epsilon_pld(self._with(more_steps), delta=self.delta)

    def epsilon_rdp(self) -> float:
        """Return the looser bound by Rényi DP, for comparison with other tools."""
        return epsilon_rdp(self.releases, delta=self.delta) if self.private else math.inf

    def affords_a_step(self, target_epsilon: float | None) -> bool:
        """Return whether one more step stays within the budget.

        The answer is looked up, and computed again only when the steps that are known to fit are
        used up.
        """
        if target_epsilon is None or not self.private:
            return True
        steps = self.steps
        if steps >= self._certified.get(target_epsilon, 0):
            more = affordable_steps(
                target_epsilon=target_epsilon,
                delta=self.delta,
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.public.sample_rate,
                before=self.releases,
            )
            self._certified[target_epsilon] = steps + more
        return steps < self._certified[target_epsilon]

    def certify(self, target_epsilon: float, *, steps: int) -> None:
        """Note that ``steps`` steps in all stay within the budget, as calibration has shown."""
        self._certified[target_epsilon] = steps

    def _with(self, more_steps: int) -> list[Release]:
        more = Release(self.noise_multiplier, self.public.sample_rate, more_steps)
        return [*self.releases, more]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, for a checkpoint."""
        return {
            "version": _VERSION,
            "run_id": self.run_id,
            "delta": self.delta,
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "public": dataclasses.asdict(self.public),
            "releases": [list(release) for release in self.releases],
            "insecure": list(self.insecure),
            "sampling": "poisson",
            "adjacency": "add-or-remove-one-row",
        }

    @classmethod
    def from_state_dict(cls, state: Any) -> Self:
        """Read what :meth:`state_dict` wrote.

        Raises:
            LedgerError: It is something else.
        """
        ledger: Self | None = None
        with contextlib.suppress(TypeError, KeyError, ValueError):
            ledger = cls._parse(state)
        if ledger is None:
            raise LedgerError(
                "the checkpoint's privacy ledger cannot be read, so nobody knows what was spent. "
                "Nothing was resumed."
            )
        return ledger

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Self | None:
        """Read the account of a checkpoint; None if it has none.

        Raises:
            LedgerError: It has one that cannot be read.
        """
        state = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(state, dict) or "privacy" not in state:
            return None
        return cls.from_state_dict(state["privacy"])

    @classmethod
    def _parse(cls, state: Any) -> Self | None:
        if state["version"] != _VERSION:
            return None
        ledger = cls(
            delta=state["delta"],
            max_grad_norm=state["max_grad_norm"],
            noise_multiplier=state["noise_multiplier"],
            public=PublicNumbers(**state["public"]),
            run_id=str(state["run_id"]),
            releases=[Release(*release) for release in state["releases"]],
            insecure=tuple(state["insecure"]),
        )
        public = ledger.public
        # ConfigError is a ValueError: any number that cannot be is a ledger that cannot be.
        open_unit_interval(delta=ledger.delta)
        positive(max_grad_norm=ledger.max_grad_norm)
        positive_int(
            dataset_size=public.dataset_size,
            expected_batch_size=public.expected_batch_size,
            steps_per_epoch=public.steps_per_epoch,
        )
        mechanisms = [(ledger.noise_multiplier, public.sample_rate)]
        for noise, rate, steps in ledger.releases:
            positive_int(steps=steps)
            mechanisms.append((noise, rate))
        for noise, rate in mechanisms:
            if not (0 <= noise < math.inf and 0 < rate <= 1):
                return None
        return ledger


def keep_ledger(module: object, ledger: Ledger) -> None:
    """Let a module carry the account of its weights, for whoever trains it next."""
    setattr(module, _ATTRIBUTE, ledger)


def ledger_of(module: object) -> Ledger | None:
    """Return the account that a module carries; None if it was never trained privately."""
    ledger: Ledger | None = getattr(module, _ATTRIBUTE, None)
    return ledger


@runtime_checkable
class HasLedger(Protocol):
    """A strategy that accounts for the privacy it spends."""

    @property
    def ledger(self) -> Ledger | None:
        """The account, from the first fit on."""

    def stop_training(self) -> None:
        """Make the Trainer take no further step, whatever minimum it was given."""


def begin_ledger(
    config: DPConfig, *, rows: int, batch_size: int, planned_steps: Callable[[int], int]
) -> Ledger:
    """Fix a run's public numbers and its noise, and open its account.

    Args:
        config: What privacy is asked for.
        rows: Rows of the dataset; used only if the configuration declares no number.
        batch_size: Of the user's loader; used only if the configuration declares none.
        planned_steps: From the steps of an epoch to those that the budget must last for.

    Raises:
        ConfigError: More rows are expected in a step than there are.
    """
    dataset_size = config.public_dataset_size or rows
    expected = config.expected_batch_size or min(batch_size, dataset_size)
    if expected > dataset_size:
        raise ConfigError(
            f"expected_batch_size={expected} is more than the {dataset_size} rows there are. No "
            "step was taken."
        )
    public = PublicNumbers(
        dataset_size=dataset_size,
        dataset_size_declared=config.public_dataset_size is not None,
        expected_batch_size=expected,
        steps_per_epoch=-(-dataset_size // expected),
    )
    if config.delta > 1 / dataset_size:
        log.warning(
            "delta=%g is larger than one in the number of rows; such a promise allows publishing "
            "some rows outright. Choose it well below 1/%d.",
            config.delta,
            dataset_size,
        )
    ledger = Ledger(
        delta=config.delta,
        max_grad_norm=config.max_grad_norm,
        noise_multiplier=config.noise_multiplier or 0.0,
        public=public,
        insecure=config.insecure,
    )
    if config.noise_multiplier is None and config.target_epsilon is not None:
        steps = planned_steps(public.steps_per_epoch)
        ledger.noise_multiplier = calibrate_noise(
            target_epsilon=config.target_epsilon,
            delta=config.delta,
            sample_rate=public.sample_rate,
            steps=steps,
        )
        ledger.certify(config.target_epsilon, steps=steps)
        log.info(
            "noise_multiplier %.4f spends epsilon %g in %d steps",
            ledger.noise_multiplier,
            config.target_epsilon,
            steps,
        )
    return ledger


def require_same_promise(config: DPConfig, ledger: Ledger) -> None:
    """Compare a configuration with the promise that a run was begun with.

    The budget itself may change: it is compared with what was spent before each step.

    Raises:
        LedgerError: They differ; the message says in what.
    """
    pairs = {
        "delta": (config.delta, ledger.delta),
        "max_grad_norm": (config.max_grad_norm, ledger.max_grad_norm),
        "noise_multiplier": (config.noise_multiplier, ledger.noise_multiplier),
        "expected_batch_size": (config.expected_batch_size, ledger.public.expected_batch_size),
        "public_dataset_size": (config.public_dataset_size, ledger.public.dataset_size),
    }
    changed = [
        f"{name} was {old} and is {new}"
        for name, (new, old) in pairs.items()
        if new is not None and new != old
    ]
    if config.insecure != ledger.insecure:
        changed.append(f"insecure settings were {ledger.insecure} and are {config.insecure}")
    if changed:
        raise LedgerError(
            f"the run cannot go on under another promise: {'; '.join(changed)}. Resume with the "
            "values it was begun with, or begin a new run. No step was taken."
        )
