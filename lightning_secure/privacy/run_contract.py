"""The promise of a run: fixed at its first fit, and kept to when it goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lightning_secure.errors import ConfigError, LedgerError, PrivacyError
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.mechanism import joint_noise
from lightning_secure.privacy.accounting.pld import calibrate_noise
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.config import DPConfig

log = logging.getLogger(__name__)


def begin_ledger(
    config: DPConfig,
    *,
    rows: int,
    batch_size: int,
    planned_steps: Callable[[int], int],
    beside: Sequence[float] = (),
) -> Ledger:
    """Fix a run's public numbers and its noise, and open its account.

    Args:
        config: The privacy configuration.
        rows: Rows of the dataset; used only if the configuration declares no number.
        batch_size: Of the user's loader; used only if the configuration declares none.
        planned_steps: From the steps of an epoch to those that the budget must last for.
        beside: Noise multipliers of the metrics that each step is to release.

    Raises:
        ConfigError: if more rows are expected in a step than there are.
        PrivacyError: if the metrics alone would spend the budget.

    >>> config = DPConfig(
    ...     noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, public_dataset_size=10_000
    ... )
    >>> ledger = begin_ledger(config, rows=9876, batch_size=100, planned_steps=lambda steps: steps)
    >>> ledger.public.sample_rate, ledger.public.steps_per_epoch
    (0.01, 100)
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
    if not (public.dataset_size_declared or config.mechanism == "banded" or config.insecure):
        log.warning(
            "DPConfig(public_dataset_size=) declares no number of rows, so the sampling rate "
            "follows the %d rows that were counted. Epsilon then compares datasets of equally many "
            "rows, of which one has no gradient (zero-out-one-row), and says nothing of how many "
            "rows there are. Declare a number that is public; it may be a round one.",
            dataset_size,
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
        secure_noise=config.secure_noise,
        accountant=config.accountant,
        mechanism=config.mechanism,
        beside=tuple(beside),
        budget=config.target_epsilon,
    )
    if config.noise_multiplier is None and config.target_epsilon is not None:
        banded = config.mechanism == "banded"
        steps = 1 if banded else planned_steps(public.steps_per_epoch)
        together = calibrate_noise(
            target_epsilon=config.target_epsilon,
            delta=config.delta,
            sample_rate=ledger.step.sample_rate,
            steps=steps,
            accountant=config.accountant,
        )
        ledger.noise_multiplier = _left_for_the_gradient(together, beside)
        ledger.certify(config.target_epsilon, steps=steps)
        log.info(
            "noise_multiplier %.4f spends epsilon %g in %d steps",
            ledger.noise_multiplier,
            config.target_epsilon,
            steps,
        )
    return ledger


def _left_for_the_gradient(together: float, beside: Sequence[float]) -> float:
    """Return the gradient's noise multiplier, with which all that a step releases has ``together``.

    Raises:
        PrivacyError: if nothing is left: without any gradient, too much is released.
    """
    if not beside:
        return together
    left = together**-2 - sum(noise**-2 for noise in beside)
    if left <= 1e-6 * together**-2:
        raise PrivacyError(
            f"the released metrics alone spend the budget: a step's releases need a joint noise "
            f"multiplier of at least {together:.4g}, and the metrics alone have "
            f"{joint_noise(*beside):.4g}. Give them more noise, or release fewer. No step was "
            "taken."
        )
    return float(left**-0.5)


def require_same_promise(config: DPConfig, ledger: Ledger) -> None:
    """Compare a configuration with the promise that a run was begun with.

    The budget itself may change: it is compared with what was spent before each step. Noise may
    become secure; the account of the run does not say so, because its first part was not.

    Raises:
        LedgerError: if the two differ; the message says in what.
    """
    pairs = {
        "delta": (config.delta, ledger.delta),
        "max_grad_norm": (config.max_grad_norm, ledger.max_grad_norm),
        "noise_multiplier": (config.noise_multiplier, ledger.noise_multiplier),
        "expected_batch_size": (config.expected_batch_size, ledger.public.expected_batch_size),
        "public_dataset_size": (config.public_dataset_size, ledger.public.dataset_size),
        "mechanism": (config.mechanism, ledger.mechanism),
        "accountant": (config.accountant, ledger.accountant),
    }
    changed = [
        f"{name} was {old} and is {new}"
        for name, (new, old) in pairs.items()
        if new is not None and new != old
    ]
    if config.insecure != ledger.insecure:
        changed.append(f"insecure settings were {ledger.insecure} and are {config.insecure}")
    if ledger.secure_noise and not config.secure_noise:
        changed.append("secure_noise was True and is False")
    if changed:
        raise LedgerError(
            f"the run cannot go on under another promise: {'; '.join(changed)}. Resume with the "
            "values it was begun with, or begin a new run. No step was taken."
        )
