"""A ledger as it stands in checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Final, Self

from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import require_accountant
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.util.validate import open_unit_interval, positive, positive_int

CHECKPOINT_KEY: Final = "lightning_secure"
# 2 brought the journal; a reader that knows only 1 would resume without it. 3 is written for
# mechanisms other than Poisson sampling, which a reader that knows only 2 would go on with as such.
_VERSION: Final = 2
_VERSION_OF_OTHERS: Final = 3
_SAMPLING: Final = {"poisson": "poisson", "banded": "fixed-order"}


@dataclass(frozen=True, kw_only=True)
class LedgerState:
    """The state of a ledger in checkpoints, see :class:`~.ledger.Ledger` for its attributes."""

    delta: float
    max_grad_norm: float
    noise_multiplier: float
    public: PublicNumbers
    run_id: str
    releases: tuple[Release, ...]
    insecure: tuple[str, ...]
    secure_noise: bool
    accountant: str
    beside: tuple[float, ...]
    mechanism: str
    clip_bound: float | None
    abandoned: int
    declared_public: int
    journaled: bool
    journal_key: str = field(repr=False)

    @property
    def adjacency(self) -> str:
        """Between which datasets epsilon holds."""
        declared = self.mechanism == "poisson" and self.public.dataset_size_declared
        return "add-or-remove-one-row" if declared else "zero-out-one-row"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        return {
            "version": _VERSION if self.mechanism == "poisson" else _VERSION_OF_OTHERS,
            "run_id": self.run_id,
            "delta": self.delta,
            "max_grad_norm": self.max_grad_norm,
            "noise_multiplier": self.noise_multiplier,
            "public": dataclasses.asdict(self.public),
            "releases": [list(release) for release in self.releases],
            "insecure": list(self.insecure),
            "secure_noise": self.secure_noise,
            "accountant": self.accountant,
            "beside": list(self.beside),
            "clip_bound": self.clip_bound,
            "abandoned": self.abandoned,
            "declared_public": self.declared_public,
            "journaled": self.journaled,
            "journal_key": self.journal_key,
            **({} if self.mechanism == "poisson" else {"mechanism": self.mechanism}),
            "sampling": _SAMPLING[self.mechanism],
            "adjacency": self.adjacency,
        }

    @classmethod
    def from_dict(cls, state: Any) -> Self | None:
        """Read what :meth:`to_dict` wrote; None if it is something else.

        Raises:
            TypeError: if the state is no ledger.
            KeyError: if the state is no ledger.
            ValueError: if the state is no ledger.
        """
        if state["version"] not in (1, _VERSION, _VERSION_OF_OTHERS):
            return None
        run_id = state["run_id"]
        if not re.fullmatch("[0-9a-f]{32}", run_id):  # it names a file
            return None
        if state["version"] == 1:
            # Journals came later. Every resume of such a checkpoint must find the same one, so its
            # key can be no secret: accidents are seen, and other branches, but not a forger.
            key = hashlib.sha256(b"lightning_secure journal of " + run_id.encode()).hexdigest()
            state = {**state, "accountant": "pld", "abandoned": 0}
            state = {**state, "journaled": False, "journal_key": key}
        if not re.fullmatch("[0-9a-f]{64}", state["journal_key"]):
            return None
        mechanism = "poisson"
        if state["version"] == _VERSION_OF_OTHERS:
            mechanism = state["mechanism"]
            promised = state["sampling"], state["adjacency"]
            if mechanism == "poisson" or promised != (_SAMPLING[mechanism], "zero-out-one-row"):
                return None
        require_accountant(state["accountant"], bound=True)
        read = cls(
            delta=state["delta"],
            max_grad_norm=state["max_grad_norm"],
            noise_multiplier=state["noise_multiplier"],
            public=PublicNumbers(**state["public"]),
            run_id=run_id,
            releases=tuple(Release(*release) for release in state["releases"]),
            insecure=tuple(state["insecure"]),
            # Ledgers from before there was such noise do not have it.
            secure_noise=bool(state.get("secure_noise", False)),
            accountant=state["accountant"],
            beside=tuple(state.get("beside", ())),  # since metrics can be released
            clip_bound=state.get("clip_bound"),  # since it may follow
            mechanism=mechanism,
            abandoned=int(state["abandoned"]),
            declared_public=int(state.get("declared_public", 0)),  # since changes can be declared
            journaled=bool(state["journaled"]),
            journal_key=state["journal_key"],
        )
        public = read.public
        # ConfigError is a ValueError: any number that cannot be is a ledger that cannot be.
        open_unit_interval(delta=read.delta)
        positive(max_grad_norm=read.max_grad_norm, clip_bound=read.clip_bound)
        positive_int(
            dataset_size=public.dataset_size,
            expected_batch_size=public.expected_batch_size,
            steps_per_epoch=public.steps_per_epoch,
        )
        mechanisms = [(n, public.sample_rate) for n in (read.noise_multiplier, *read.beside)]
        for noise, rate, steps in read.releases:
            positive_int(steps=steps)
            mechanisms.append((noise, rate))
        for noise, rate in mechanisms:
            if not (0 <= noise < math.inf and 0 < rate <= 1):
                return None
        return read
