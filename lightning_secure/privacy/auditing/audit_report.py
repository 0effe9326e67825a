"""The result of an audit, beside the account's claim."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lightning_secure.errors import PrivacyError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A lower bound on epsilon that an attack has shown, and the upper bound that was claimed.

    A bound above the claim disproves it, which is logged as an error as soon as it is known. One
    below it proves nothing but that this attack did not succeed.

    Attributes:
        method: ``"canary"`` or ``"one-run"``.
        lower_bound: Epsilon is at least this, with the given confidence, whatever the mechanism.
        lower_bound_gaussian: The same if the mechanism is Gaussian noise on all rows, which is much
            tighter; None where that is not what is claimed.
        claimed: Epsilon by the account; infinite if the run does not claim to be private.
        delta: At which all of them hold.
        confidence: Probability, over coins and noise, that the bounds hold.
        trials: Canaries that were guessed about.

    >>> report = AuditReport(
    ...     method="canary", lower_bound=0.7, claimed=3.0, delta=1e-5, confidence=0.95, trials=1000
    ... )
    >>> report.holds
    True
    """

    method: str
    lower_bound: float
    claimed: float
    delta: float
    confidence: float
    trials: int
    lower_bound_gaussian: float | None = None

    def __post_init__(self) -> None:
        if not self.holds:
            log.error("%s", self._finding())

    @property
    def largest(self) -> float:
        """The larger of the lower bounds."""
        return max(self.lower_bound, self.lower_bound_gaussian or 0.0)

    @property
    def holds(self) -> bool:
        """Whether the claim is not disproved; a bound that is no number disproves it."""
        return self.largest <= self.claimed

    def require(self) -> None:
        """Raise if the claim is disproved.

        Raises:
            PrivacyError: if the claim is disproved.

        >>> settings = {"claimed": 3.0, "delta": 1e-5, "confidence": 0.95, "trials": 1000}
        >>> AuditReport(method="canary", lower_bound=0.7, **settings).require()
        """
        if not self.holds:
            raise PrivacyError(self._finding())

    def _finding(self) -> str:
        return (
            f"the {self.method} audit shows an epsilon of at least {self.largest:.4g} at delta "
            f"{self.delta:g} with confidence {self.confidence:g}, and {self.claimed:.4g} is "
            "claimed: the claim is false. Something adds too little noise, clips too little, draws "
            "too often or counts too few steps; publish nothing that was trained this way."
        )
