"""How a module carries the ledger of its weights, whichever strategy saves, loads or trains it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lightning_secure import events
from lightning_secure.errors import LedgerError
from lightning_secure.privacy.weights import changed_weights, noted_weights

if TYPE_CHECKING:
    from lightning_secure.privacy.ledger import Ledger

__all__ = [
    "CHECKPOINT_KEY",
    "declare_public_weights",
    "drop_ledger",
    "keep_ledger",
    "ledger_of",
    "require_same_weights",
    "write_ledger",
]

log = logging.getLogger(__name__)

CHECKPOINT_KEY: Final = "lightning_secure"
_ATTRIBUTE: Final = "_lightning_secure_ledger"
_CHANGED: Final = "weights_changed_without_noise"


def keep_ledger(module: Any, ledger: Ledger) -> None:
    """Let a module carry the ledger of its weights.

    A LightningModule then writes it into each checkpoint that a Trainer saves of it, with any
    strategy and any CheckpointIO.
    """
    setattr(module, _ATTRIBUTE, ledger)
    for name, hook in _HOOKS.items():
        own = vars(module).get(name)
        if hasattr(type(module), name) and getattr(own, "func", None) is not hook:
            vars(module)[name] = partial(hook, module, own)


def drop_ledger(module: Any) -> None:
    """Let a module forget a ledger, because its weights have none."""
    vars(module).pop(_ATTRIBUTE, None)
    for name, hook in _HOOKS.items():
        wrapped = vars(module).get(name)
        if getattr(wrapped, "func", None) is hook:
            del vars(module)[name]
            if (own := wrapped.args[1]) is not None:
                vars(module)[name] = own


def ledger_of(module: object) -> Ledger | None:
    """Return the ledger that a module carries; None if it was never trained privately."""
    ledger: Ledger | None = getattr(module, _ATTRIBUTE, None)
    return ledger


def write_ledger(module: Any, checkpoint: dict[str, Any]) -> None:
    """Write the ledger of a module into a checkpoint of it, if it carries one.

    Of weights that have changed since the ledger was complete, the ledger in the checkpoint says
    so: it is not private, and its epsilon is infinite.
    """
    ledger = ledger_of(module)
    if ledger is not None:
        if changed := changed_weights(module, ledger.weights or {}):
            ledger = _marked(ledger, changed)
        checkpoint[CHECKPOINT_KEY] = {"privacy": ledger.state_dict()}


def require_same_weights(module: Any, ledger: Ledger) -> None:
    """Make sure that nothing else has trained a module since its ledger was last complete.

    Raises:
        LedgerError: Weights have changed. They may have been trained without noise.
    """
    changed = changed_weights(module, ledger.weights or {})
    if changed or _CHANGED in ledger.insecure:
        which = f"{len(changed)} weights, {changed[0]!r} first, have" if changed else "weights have"
        raise LedgerError(
            f"{which} changed since the module was last trained privately, by training without "
            "noise or otherwise: if rows were used, its ledger is too small. To go on with an "
            "earlier checkpoint of the run, pass it as ckpt_path. If the change depends on no row "
            "of the training set (weights that were pruned, merged, replaced by public ones, or "
            "trained on public rows), call declare_public_weights(module). No step was taken."
        )


def declare_public_weights(module: Any) -> None:
    """Declare that changes of a privately trained module's weights depend on none of its rows.

    A private fit refuses weights that have changed since the last one. Call this for changes that
    used no row of the training set, such as merging adapters, pruning, loading public weights, or
    training on public rows. It covers all changes until now. The ledger counts the declarations,
    and each is announced as ``privacy.declare``.

    Args:
        module: Carries the ledger of its weights.

    Raises:
        LedgerError: It carries none.
    """
    ledger = ledger_of(module)
    if ledger is None:
        raise LedgerError(
            f"{type(module).__name__} carries no privacy ledger, so its weights need no "
            "declaration. Nothing was declared."
        )
    changed = changed_weights(module, ledger.weights or {})
    events.announce("privacy.declare", {"run_id": ledger.run_id, "changed_weights": len(changed)})
    ledger = copy.deepcopy(ledger)
    ledger.insecure = tuple(reason for reason in ledger.insecure if reason != _CHANGED)
    ledger.declared_public += 1
    ledger.weights = noted_weights(module)
    keep_ledger(module, ledger)


def _marked(ledger: Ledger, changed: list[str]) -> Ledger:
    """Return a copy of a ledger that claims nothing for the weights it is about."""
    marked = copy.deepcopy(ledger)
    if _CHANGED not in marked.insecure:
        marked.insecure = (*marked.insecure, _CHANGED)
        log.warning(
            "%d weights, %r first, have changed since the last private fit: the ledger says so, "
            "and its epsilon is infinite. If no training row was used, call "
            "declare_public_weights(module).",
            len(changed),
            changed[0],
        )
    return marked


# Hooks of a module that carries a ledger. Lightning calls a module's own attribute.


def _saving(module: Any, own: Callable[..., Any] | None, checkpoint: dict[str, Any]) -> None:
    """``on_save_checkpoint``, which comes last of all that add to a checkpoint."""
    _own_hook(module, "on_save_checkpoint", own)(checkpoint)
    write_ledger(module, checkpoint)


def _fit_begins(module: Any, own: Callable[..., Any] | None) -> None:
    """``on_fit_start``: before a fit without noise, weights that were added are noted too."""
    _compare(module)
    _own_hook(module, "on_fit_start", own)()


def _fit_ends(module: Any, own: Callable[..., Any] | None) -> None:
    """``on_fit_end``: what has changed is remembered, whatever becomes of the weights later."""
    _own_hook(module, "on_fit_end", own)()
    _compare(module)


def _compare(module: Any) -> None:
    """Note the weights of a module, or mark its ledger if they have changed."""
    ledger = ledger_of(module)
    if ledger is None or _fits_privately(module):
        return
    if changed := changed_weights(module, ledger.weights or {}):
        keep_ledger(module, _marked(ledger, changed))
    else:
        ledger.weights = noted_weights(module)


def _fits_privately(module: Any) -> bool:
    """Return whether a private strategy trains it, which notes the weights itself."""
    trainer = getattr(module, "_trainer", None)
    return hasattr(getattr(trainer, "strategy", None), "ledger")


def _own_hook(module: Any, name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    return own if own is not None else partial(getattr(type(module), name), module)


_HOOKS: Final[dict[str, Callable[..., None]]] = {
    "on_save_checkpoint": _saving,
    "on_fit_start": _fit_begins,
    "on_fit_end": _fit_ends,
}
