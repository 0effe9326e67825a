"""The configuration of a private run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.accounting.pld import require_accountant
from lightning_secure.privacy.gradients.clipping.rules import (
    AdaptiveClipping,
    ClippingRule,
    PerLayerClipping,
    rule_of,
)
from lightning_secure.util.validate import open_unit_interval, positive, positive_int


@dataclass(frozen=True, kw_only=True)
class DPConfig:
    """Settings of differentially private SGD.

    Options that the promise depends on:

    Attributes:
        target_epsilon: The budget: no step is taken that would exceed it. Without
            ``noise_multiplier`` the noise is calibrated so that the planned run spends it.
        noise_multiplier: Standard deviation of the noise divided by ``max_grad_norm``.
        mechanism: ``poisson``, DP-SGD; or ``banded``, DP-FTRL with a banded matrix, for rows that
            come in a fixed order: each step's noise takes back a part of the last ones', and all
            steps of a fit are one release. Neighbouring datasets then differ by one row that is
            made to have no gradient, and ``noise_multiplier`` is that of the whole fit.
        bands: Over how many steps ``banded`` noise hangs together; at most the steps of an epoch.
            Each takes as much memory as the parameters.
        delta: Probability with which the epsilon may fail to hold. Choose it well below one in
            the number of people.
        max_grad_norm: The L2 norm to which each sample's gradient is clipped.
        clipping: ``flat``, in one piece; ``per_layer`` or
            :class:`~lightning_secure.PerLayerClipping`, each layer to its
            share of ``max_grad_norm``; ``adaptive`` or
            :class:`~lightning_secure.AdaptiveClipping`, to a bound that
            begins at ``max_grad_norm`` and follows the norms, for which each step pays.
        expected_batch_size: Rows that a step draws on average; each row is drawn by itself with
            probability ``expected_batch_size / dataset size``. By default the DataLoader's
            ``batch_size``.
        public_dataset_size: A public number of rows, which need not be the exact one. Epsilon
            then holds for one row added or removed. Without it the rows are counted once, and the
            number is treated as public: epsilon then holds for what is in a row, but not for how
            many rows there are.
        planned_epochs: Epochs that the budget must last for, if the run is to be continued later.
            By default those of the Trainer.
        accountant: By which epsilon is reported and the budget kept: ``pld``, the tightest, or
            ``rdp``, by dp_accounting; ``opacus-rdp`` or ``opacus-prv``, to compare with runs
            of Opacus. All are upper bounds. Opacus' GDP is none and is refused.
        secure_noise: Whether noise, on every device, and the draws of rows come from an AES-256-CTR
            keystream under keys of the operating system, and each noise value is made of four in
            double precision, against reading its last bits. Made on the CPU, some 25 ns a number
            and core. A run that was begun with it goes on with it only.

    Options that only speed and memory depend on:

    Attributes:
        max_physical_batch_size: Most rows that go through the model at once. A larger draw is
            processed in several chunks and is still one step. By default four standard
            deviations above the expected batch.
        isolate_rows: Whether each row runs by itself: it is collated, goes through the transfer
            hooks, the model and the loss, and back, as a batch of one. No code can then mix rows
            of a batch, so losses of any form train, and no trial looks for mixing. A step takes
            about as long as its rows one after another: with 64 rows on a CPU 4 times as long
            for two convolutions and 21 times for three dense layers, and more on a GPU. What a
            module keeps from one row to the next in its attributes is not covered.
        loss_scale: Factor of the loss before the backward pass, a power of two: per-row
            gradients that would round to zero in float16 then do not. ``16-mixed`` needs it, such
            as ``2**12``, because Lightning's own scale depends on the rows. It never changes.
            Rows that overflow by it are left out, so choose it smaller if little is learned.

    Options that break the promise, for tests:

    Attributes:
        insecure_seed: Makes draws and noise repeatable. With it, the noise can be subtracted.
        insecure_noise_off: Clips without adding noise.

    Both mark the run, its ledger and its checkpoints as not private; epsilon is then infinite.

    Raises:
        ConfigError: if a value is out of range, or neither budget nor noise is given.

    The unit of protection is one row. With ``public_dataset_size``, neighbouring datasets differ
    by one row added or removed, under the same declared number. Without it they have the same
    number of rows, and one row has no gradient in one of them: the sampling rate is
    ``expected_batch_size`` over the number of rows, so one row more changes the rate of all. Who
    compares datasets of different sizes can then see more than epsilon. No row may be listed under
    two indices.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, with Poisson sampling.

    >>> config = DPConfig(target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0)
    >>> config.accountant, config.insecure
    ('pld', ())
    """

    delta: float
    max_grad_norm: float
    mechanism: str = "poisson"
    bands: int | None = None
    clipping: str | PerLayerClipping | AdaptiveClipping = "flat"
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    expected_batch_size: int | None = None
    max_physical_batch_size: int | None = None
    isolate_rows: bool = False
    loss_scale: float | None = None
    public_dataset_size: int | None = None
    planned_epochs: int | None = None
    accountant: str = "pld"
    secure_noise: bool = False
    insecure_seed: int | None = None
    insecure_noise_off: bool = False

    def __post_init__(self) -> None:
        open_unit_interval(delta=self.delta)
        positive(
            max_grad_norm=self.max_grad_norm,
            target_epsilon=self.target_epsilon,
            noise_multiplier=self.noise_multiplier,
            loss_scale=self.loss_scale,
        )
        if self.loss_scale is not None and math.frexp(self.loss_scale)[0] != 0.5:
            raise ConfigError(
                f"loss_scale={self.loss_scale} is not a power of two, so taking it out of the "
                "gradients again would round them. Use for example 2**12."
            )
        positive_int(
            expected_batch_size=self.expected_batch_size,
            max_physical_batch_size=self.max_physical_batch_size,
            public_dataset_size=self.public_dataset_size,
            planned_epochs=self.planned_epochs,
            bands=self.bands,
        )
        if self.isolate_rows and self.max_physical_batch_size not in (None, 1):
            raise ConfigError(
                f"max_physical_batch_size={self.max_physical_batch_size} contradicts isolate_rows, "
                "with which one row goes through the model at once. Leave it out."
            )
        self._require_mechanism()
        require_accountant(self.accountant, bound=True)
        if self.secure_noise and self.insecure:
            raise ConfigError(
                f"secure_noise contradicts {' and '.join(self.insecure)}, which makes the noise "
                "absent or known. Leave secure_noise out, or the others."
            )
        rule_of(self.clipping)
        if self.target_epsilon is None and self.noise_multiplier is None:
            if not self.insecure_noise_off:
                raise ConfigError(
                    "DPConfig needs target_epsilon, noise_multiplier or both: without either there "
                    "is no privacy to account for."
                )
        elif self.insecure_noise_off:
            raise ConfigError(
                "insecure_noise_off contradicts target_epsilon and noise_multiplier: a run without "
                "noise has no epsilon."
            )

    def _require_mechanism(self) -> None:
        if self.mechanism not in ("poisson", "banded"):
            raise ConfigError(f"mechanism must be 'poisson' or 'banded', not {self.mechanism!r}.")
        if (self.mechanism == "banded") != (self.bands is not None):
            raise ConfigError(
                "bands and mechanism='banded' belong together: give both, such as bands=8, or none."
            )
        if self.mechanism == "banded" and isinstance(self.clipping_rule, AdaptiveClipping):
            raise ConfigError(
                "adaptive clipping releases a count with each step, and banded noise belongs to "
                "one bound. Use flat or per-layer clipping, or mechanism='poisson'."
            )

    @property
    def clipping_rule(self) -> ClippingRule:
        """The rule that ``clipping`` names.

        >>> DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0).clipping_rule
        FlatClipping()
        """
        return rule_of(self.clipping)

    @property
    def insecure(self) -> tuple[str, ...]:
        """Names of the settings that break the promise; empty for a private run.

        >>> DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, insecure_seed=7).insecure
        ('insecure_seed',)
        """
        reasons = []
        if self.insecure_seed is not None:
            reasons.append("insecure_seed")
        if self.insecure_noise_off:
            reasons.append("insecure_noise_off")
        return tuple(reasons)
