"""The account of a module's weights, from one fit to the next."""

from __future__ import annotations

from collections.abc import Callable

from lightning.fabric.plugins import CheckpointIO
from torch.nn import Module

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.accounting.carried_ledger import drop_ledger, keep_ledger, ledger_of
from lightning_secure.privacy.accounting.ledger import Ledger
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.weight_notes import noted_weights
from lightning_secure.privacy.released.sums import Chargeable, ChargesAccount
from lightning_secure.util import events


def account_of(module: Module) -> Ledger | None:
    """Return the account of a module's weights; None for a ledger without releases."""
    ledger = ledger_of(module)
    if ledger is not None and not ledger.releases:
        drop_ledger(module)
        return None
    return ledger


class RunAccount:
    """The account that metrics and other single releases of a module charge.

    Args:
        trying: Returns whether the module is only being tried out, by the preflight or by the
            Trainer's sanity check.
        charge: Charges the account of its weights for a release, in every process.
        charged: Is called after each release: it may have left nothing for another step.
    """

    def __init__(
        self,
        *,
        trying: Callable[[], bool],
        charge: Callable[[Release], None],
        charged: Callable[[], None],
    ) -> None:
        self._trying = trying
        self._charge = charge
        self._charged = charged

    def charge(self, release: Release) -> None:
        """Enter a release that is about to happen.

        Raises:
            PrivacyError: if the module is only being tried out.
            BudgetExhaustedError: if the release would exceed the budget.
            LedgerError: if there is no account, or it cannot be charged.
        """
        if self._trying():
            raise PrivacyError(
                "the module is only being tried out, by the preflight or the sanity check. Nothing "
                "was released. What training_step computes is released by released_metrics."
            )
        self._charge(release)
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
        ledger.weights = noted_weights(module)
        if ledger_of(module) is ledger:
            keep_ledger(module, ledger, covers=trainable_names(module))


def trainable_names(module: Module) -> frozenset[str]:
    """Return the names of the parameters that a fit trains."""
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if parameter.requires_grad)


def announce_plain(checkpoint_io: CheckpointIO, path: str, step: int) -> None:
    """Announce a checkpoint that is about to be written in the clear.

    A plugin that ``announces`` its checkpoints does so by itself, when they are written.
    """
    while (inner := getattr(checkpoint_io, "checkpoint_io", None)) is not None:
        checkpoint_io = inner  # of AsyncCheckpointIO and its like
    if not getattr(checkpoint_io, "announces", False):
        events.announce("checkpoint.save", {"path": path, "step": step, "encrypted": "no"})
