"""White-box canary audit: the real clipping, sampling, noise and account, attacked many times.

A canary is a row whose gradient points into one coordinate of its own, and is far too long. Of each
a fair coin decides whether it is among the rows. The attacker sees every released gradient and
looks at the canary's coordinate. One run has thousands of canaries, so a few runs, of milliseconds,
are hundreds of thousands of trials: enough to come near the true epsilon from below.

Source:
    Nasr et al. 2023, arXiv:2302.07956 (canary gradients with the whole norm in one coordinate);
    Jagielski et al. 2020, arXiv:2006.07709 (Clopper-Pearson bounds).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.auditing.audit_report import AuditReport
from lightning_secure.privacy.auditing.bounds import (
    above,
    best_threshold,
    epsilon_gaussian,
    epsilon_of_rates,
    mu_of_rates,
    rates,
)
from lightning_secure.privacy.gradients.engine import GradientEngine
from lightning_secure.privacy.noise.gaussian import GaussianNoise
from lightning_secure.privacy.sampling import LogicalCollate, PoissonBatchSampler
from lightning_secure.util.validate import open_unit_interval, positive, positive_int

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


class AttackedRun(Protocol):
    """A training on the included canaries that lets an attacker watch."""

    def __call__(self, included: Bools) -> Floats:
        """Train anew, and return a score for each canary, higher for those that seem included."""


class CanaryRun:
    """A run on nothing but canaries, by the parts that every private run is made of.

    Args:
        canaries: How many there are.
        noise_multiplier: Of the run.
        delta: Of the run.
        max_grad_norm: Of the run.
        steps: Of the run.
        expected_batch_size: Of the run, out of ``canaries``; by default all of them.
        norm: Of a canary's gradient before clipping, in units of ``max_grad_norm``.
        insecure_seed: Makes draws and noise repeatable, for tests.

    Attributes:
        ledger: The account of the last run.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        canaries: int,
        *,
        noise_multiplier: float,
        delta: float,
        max_grad_norm: float = 1.0,
        steps: int = 1,
        expected_batch_size: int | None = None,
        norm: float = 1e4,
        insecure_seed: int | None = None,
    ) -> None:
        positive_int(canaries=canaries, steps=steps, expected_batch_size=expected_batch_size)
        positive(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, norm=norm)
        if expected_batch_size is not None and expected_batch_size > canaries:
            raise ConfigError(
                f"expected_batch_size={expected_batch_size} is more than the {canaries} canaries."
            )
        self.canaries = canaries
        self._public = PublicNumbers(
            dataset_size=canaries,
            dataset_size_declared=True,
            expected_batch_size=expected_batch_size or canaries,
            steps_per_epoch=steps,
        )
        self._settings: dict[str, Any] = {
            "delta": delta,
            "max_grad_norm": max_grad_norm,
            "noise_multiplier": noise_multiplier,
        }
        self._length = norm * max_grad_norm
        self._noise = GaussianNoise(insecure_seed)
        self._draws = PoissonBatchSampler(
            canaries, sample_rate=self._public.sample_rate, steps=steps, seed=insecure_seed
        )
        self.ledger = self._opened()

    def epsilon(self) -> float:
        """Return what the last run's account says that it has spent."""
        return self.ledger.epsilon()

    def _opened(self) -> Ledger:
        return Ledger(public=self._public, **self._settings)

    def __call__(self, included: Bools) -> Floats:
        """Train anew, and return what each canary's coordinate has gained, in clipping norms."""
        self.ledger = ledger = self._opened()
        public = self._public
        model = _Coordinates(self.canaries, self._length)
        engine = GradientEngine(model, max_grad_norm=ledger.max_grad_norm)
        # Two chunks a step, so that what is added up over chunks is attacked as well.
        collate = LogicalCollate(
            torch.as_tensor, max_physical_batch_size=public.expected_batch_size // 2 + 1
        )
        released = torch.zeros(self.canaries, dtype=torch.float64)
        engine.attach()
        try:
            for draw in self._draws:
                engine.begin_step()
                drawn: Any = np.array(draw, int)[included[draw]]  # collate only slices it
                for size, tokens in collate(drawn).chunks:
                    with engine.recording():
                        model(tokens).mean().backward()
                    engine.add_chunk(size)
                ledger.record()
                engine.release(
                    self._noise,
                    noise_multiplier=ledger.noise_multiplier,
                    expected_batch_size=public.expected_batch_size,
                )
                gradient = model.table.weight.grad
                assert gradient is not None  # noqa: S101 # release has put it there
                released += gradient.double().flatten()
        finally:
            engine.detach()
        scale = public.expected_batch_size / ledger.max_grad_norm
        return (released * scale).numpy()


class _Coordinates(nn.Module):
    """A number for each canary, whose gradient by its own canary is ``length``."""

    def __init__(self, canaries: int, length: float) -> None:
        super().__init__()
        # Zeros, so that no random numbers of the process are used.
        self.table = nn.Embedding(canaries, 1, _weight=torch.zeros(canaries, 1))
        self._length = length

    def forward(self, tokens: Tensor) -> Tensor:
        scaled: Tensor = self.table(tokens) * self._length
        return scaled


def canary_audit(
    run: AttackedRun,
    *,
    canaries: int,
    claimed: float | Callable[[], float],
    delta: float,
    runs: int = 4,
    confidence: float = 0.95,
    gaussian: bool = False,
    insecure_seed: int | None = None,
) -> AuditReport:
    """Attack a run several times, and compare what that shows with what it claims.

    Args:
        run: What is attacked, a :class:`CanaryRun` or another one, for example a whole Trainer.
        canaries: How many it has.
        claimed: Its epsilon, or what returns it once it has run.
        delta: Of the claim.
        runs: How often it is run, at least twice: the attack learns on a quarter of the runs what
            it is then tried with on the others.
        confidence: Probability with which the bounds are to hold.
        gaussian: Whether all rows take part in each step, so that what is claimed is noise of one
            width, and :attr:`AuditReport.lower_bound_gaussian` means something.
        insecure_seed: Makes the coins repeatable, for tests. By default the operating system tosses
            them.

    The bound without that assumption cannot exceed the logarithm of the number of trials: that is
    all that can be told from never having been wrong. The canaries of one run are taken for
    independent trials, as they are where noise and clipping are right.

    Raises:
        ConfigError: if a number is out of range.

    >>> run = CanaryRun(20_000, noise_multiplier=1.0, delta=1e-5, insecure_seed=1)
    >>> settings = {"canaries": 20_000, "claimed": run.epsilon, "delta": 1e-5}
    >>> report = canary_audit(run, **settings, gaussian=True)
    >>> round(report.claimed, 4), report.holds, 4.0 < report.lower_bound_gaussian < 4.3772
    (4.3772, True, True)
    """
    open_unit_interval(delta=delta, confidence=confidence)
    positive_int(canaries=canaries, runs=runs)
    if runs < 2:
        raise ConfigError("runs must be at least 2: one to learn on, another to try with.")
    coins = np.random.default_rng(insecure_seed)
    scores: list[tuple[Floats, Floats]] = []
    for _ in range(runs):
        included = coins.random(canaries) < 0.5
        found = np.asarray(run(included.copy()), dtype=np.float64)
        if found.shape != (canaries,):
            raise ConfigError(f"the run returned scores of shape {found.shape}, not {(canaries,)}.")
        found = np.nan_to_num(found, nan=np.inf, posinf=np.inf, neginf=-np.inf)
        scores.append((found[included], found[~included]))
    first = max(1, runs // 4)
    learned, tried = scores[:first], scores[first:]
    alpha = (1 - confidence) / (2 if gaussian else 1)

    def bound(convert: Callable[[Any, Any], Any]) -> float:
        members, others = (np.concatenate(side) for side in zip(*learned, strict=True))

        def by(hits: Any, alarms: Any) -> Any:
            # Stricter than the bound itself, lest the luck of a few scores choose the threshold.
            return convert(*rates(hits, len(members), alarms, len(others), alpha=alpha / 100))

        threshold = best_threshold(members, others, by=by)
        fresh = [np.concatenate(side) for side in zip(*tried, strict=True)]
        hits, alarms = (above(side, threshold) for side in fresh)
        return float(convert(*rates(hits, len(fresh[0]), alarms, len(fresh[1]), alpha=alpha)))

    epsilon = bound(lambda tpr, fpr: epsilon_of_rates(tpr, fpr, delta=delta))
    mu = bound(mu_of_rates) if gaussian else None
    return AuditReport(
        method="canary",
        lower_bound=epsilon,
        lower_bound_gaussian=None if mu is None else epsilon_gaussian(mu, delta=delta),
        claimed=claimed() if callable(claimed) else claimed,
        delta=delta,
        confidence=confidence,
        trials=canaries * len(tried),
    )
