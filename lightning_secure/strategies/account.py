"""Which account a module's weights have, from one fit to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.nn import Module

from lightning_secure import events
from lightning_secure.errors import LedgerError, PrivacyError
from lightning_secure.privacy.accounting import Release
from lightning_secure.privacy.ledger import Ledger, drop_ledger, ledger_of
from lightning_secure.privacy.leftovers import local_part
from lightning_secure.privacy.released.sums import Chargeable, ChargesAccount

__all__ = [
    "RunAccount",
    "account_of",
    "announce_plain",
    "lend_account",
    "note_weights",
    "require_same_weights",
    "settle_account",
]

_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def account_of(module: Module) -> Ledger | None:
    """Return the account of a module's weights; one without a release binds nobody to anything."""
    ledger = ledger_of(module)
    if ledger is not None and not ledger.releases:
        drop_ledger(module)
        return None
    return ledger


class RunAccount:
    """What metrics and other single releases of a module charge.

    Args:
        trying: Returns whether the module is only being tried out, by the preflight or by the
            Trainer's sanity check.
        ledger: Returns the account of its weights, once there is one.
        charge: Charges an account for a release, in every process that has it.
        charged: Is called after each release: it may have left nothing for another step.
    """

    def __init__(
        self,
        *,
        trying: Callable[[], bool],
        ledger: Callable[[], Ledger | None],
        charge: Callable[[Ledger, Release], None],
        charged: Callable[[], None],
    ) -> None:
        self._trying = trying
        self._ledger = ledger
        self._charge = charge
        self._charged = charged

    def charge(self, release: Release) -> None:
        """Enter a release that is about to happen.

        Raises:
            PrivacyError: The module is only being tried out.
            BudgetExhaustedError: It would exceed the budget.
            LedgerError: There is no account, or it cannot be charged.
        """
        if self._trying():
            raise PrivacyError(
                "the module is only being tried out, by the preflight or the sanity check. Nothing "
                "was released. What training_step computes is released by released_metrics."
            )
        ledger = self._ledger()
        if ledger is None:
            raise LedgerError("there is no account before the first fit. Nothing was released.")
        self._charge(ledger, release)
        self._charged()


def lend_account(module: Module, account: Chargeable) -> None:
    """Let the metrics among a module's modules that release something of the rows charge this."""
    for metric in module.modules():
        if isinstance(metric, ChargesAccount):
            metric.charge_to(account)


def settle_account(module: Module, ledger: Ledger, *, fitted: bool) -> None:
    """Leave a module with the account of its weights, at the end of a fit.

    Args:
        module: Which was to be trained.
        ledger: Of the fit.
        fitted: Whether the weights are those that the account is about.
    """
    ledger.close_journal()
    if not ledger.releases and ledger_of(module) is ledger:
        drop_ledger(module)
    elif fitted:
        note_weights(module, ledger)


def note_weights(module: Module, ledger: Ledger) -> None:
    """Note what the trainable weights are when the account is complete."""
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ledger.weights = {name: _digest(weight) for name, weight in trainable.items()}


def require_same_weights(module: Module, ledger: Ledger) -> None:
    """Make sure that nothing else has trained a module since its account was last complete.

    Weights that were added, removed, or given another shape or type since are not compared. What
    was noted does not travel in checkpoints. It shows mistakes, and is no cryptographic digest.

    Raises:
        LedgerError: Weights have changed. They may have been trained without noise.
    """
    noted = ledger.weights or {}
    now = {n: _digest(p) for n, p in module.named_parameters() if n in noted}
    changed = [
        name
        for name, (bits, *form) in now.items()
        if form == list(noted[name][1:]) and bits != noted[name][0]
    ]
    if changed:
        raise LedgerError(
            f"{len(changed)} weights, {changed[0]!r} first, have changed since the module was last "
            "trained privately, and nobody knows by what: if rows were used, its account is too "
            "small. To go on with a checkpoint of the run, pass it as ckpt_path; to start from "
            "public weights, load them into a new module. No step was taken."
        )


def announce_plain(checkpoint_io: CheckpointIO, path: str, step: int) -> None:
    """Announce a checkpoint that is about to be written in the clear.

    A plugin that ``announces`` its checkpoints does so by itself, when they are written.
    """
    while (inner := getattr(checkpoint_io, "checkpoint_io", None)) is not None:
        checkpoint_io = inner  # of AsyncCheckpointIO and its like
    if not getattr(checkpoint_io, "announces", False):
        events.announce("checkpoint.save", {"path": path, "step": step, "encrypted": "no"})


def _digest(weight: Tensor) -> tuple[int, str, torch.Size]:
    """Return the sum over the bits that are held here, the same on every device, and their form."""
    weight = local_part(weight.detach())
    integer = _INTEGERS.get(weight.dtype.itemsize)
    bits = 0
    if integer is not None and weight.device.type != "meta":
        bits = int(weight.view(integer).sum(dtype=torch.int64))
    return bits, str(weight.dtype), weight.shape
