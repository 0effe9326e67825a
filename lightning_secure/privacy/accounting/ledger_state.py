"""A ledger as it stands in checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from lightning_secure.privacy.accounting.pld import Release, require_accountant
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.util.validate import open_unit_interval, positive, positive_int

if TYPE_CHECKING:
    from lightning_secure.privacy.accounting.ledger import Ledger

__all__ = ["parsed", "state_of"]

L = TypeVar("L", bound="Ledger")

# 2 brought the journal; a reader that knows only 1 would resume without it. 3 is written for
# mechanisms other than Poisson sampling, which a reader that knows only 2 would go on with as such.
_VERSION: Final = 2
_VERSION_OF_OTHERS: Final = 3
_SAMPLING: Final = {"poisson": "poisson", "banded": "fixed-order"}


def state_of(ledger: Ledger) -> dict[str, Any]:
    """Return plain numbers, strings, lists and dicts."""
    return {
        "version": _VERSION if ledger.mechanism == "poisson" else _VERSION_OF_OTHERS,
        "run_id": ledger.run_id,
        "delta": ledger.delta,
        "max_grad_norm": ledger.max_grad_norm,
        "noise_multiplier": ledger.noise_multiplier,
        "public": dataclasses.asdict(ledger.public),
        "releases": [list(release) for release in ledger.releases],
        "insecure": list(ledger.insecure),
        "secure_noise": ledger.secure_noise,
        "accountant": ledger.accountant,
        "beside": list(ledger.beside),
        "clip_bound": ledger.clip_bound,
        "abandoned": ledger.abandoned,
        "declared_public": ledger.declared_public,
        "journaled": ledger.journaled,
        "journal_key": ledger.journal_key().hex(),
        **({} if ledger.mechanism == "poisson" else {"mechanism": ledger.mechanism}),
        "sampling": _SAMPLING[ledger.mechanism],
        "adjacency": ledger.adjacency,
    }


def parsed(kind: type[L], state: Any) -> L | None:
    """Return the ledger of a state; None if it is none.

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
    ledger = kind(
        delta=state["delta"],
        max_grad_norm=state["max_grad_norm"],
        noise_multiplier=state["noise_multiplier"],
        public=PublicNumbers(**state["public"]),
        run_id=run_id,
        releases=[Release(*release) for release in state["releases"]],
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
        _journal_key=state["journal_key"],
    )
    public = ledger.public
    # ConfigError is a ValueError: any number that cannot be is a ledger that cannot be.
    open_unit_interval(delta=ledger.delta)
    positive(max_grad_norm=ledger.max_grad_norm, clip_bound=ledger.clip_bound)
    positive_int(
        dataset_size=public.dataset_size,
        expected_batch_size=public.expected_batch_size,
        steps_per_epoch=public.steps_per_epoch,
    )
    mechanisms = [(n, public.sample_rate) for n in (ledger.noise_multiplier, *ledger.beside)]
    for noise, rate, steps in ledger.releases:
        positive_int(steps=steps)
        mechanisms.append((noise, rate))
    for noise, rate in mechanisms:
        if not (0 <= noise < math.inf and 0 < rate <= 1):
            return None
    return ledger
