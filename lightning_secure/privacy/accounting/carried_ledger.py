"""The ledger that a module carries, whichever strategy saves, loads or trains it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from torch import nn

from lightning_secure.errors import LedgerError
from lightning_secure.privacy.accounting.ledger import HasLedger, Ledger
from lightning_secure.privacy.accounting.ledger_state import CHECKPOINT_KEY
from lightning_secure.privacy.accounting.weight_notes import (
    WeightNote,
    changed_weights,
    noted_weights,
)
from lightning_secure.util import events

log = logging.getLogger(__name__)

_ATTRIBUTE: Final = "_lightning_secure_ledger"
#: Of a part of a module that carries a ledger: that ledger, and the name of the part there.
_PART: Final = "_lightning_secure_part"
_CHANGED: Final = "weights_changed_without_noise"
_SEVERAL: Final = "weights_of_several_private_runs"


def keep_ledger(module: Any, ledger: Ledger, *, covers: Collection[str] | None = None) -> None:
    """Let a module carry the ledger of its weights, and its parts point to it.

    A LightningModule then writes it into each checkpoint that a Trainer saves of it, with any
    strategy and any CheckpointIO. A part that becomes part of another module brings it there.

    Args:
        module: Has the weights.
        ledger: Theirs.
        covers: Names of the weights that the ledger is about. Parts that hold none of them, such as
            a frozen public backbone, stay as they are. None for all weights.
    """
    _carry(module, ledger)
    for name, part in module.named_modules():
        own = [f"{name}.{key}" if name else key for key in part._parameters]
        # The ledger of a module that has become a part: one for all below it.
        carrier = name and _ATTRIBUTE in vars(part)
        if carrier:
            own = [f"{name}.{key}" for key, _ in part.named_parameters()]
        if own and (covers is None or any(key in covers for key in own)):
            vars(part)[_PART] = (ledger, name)
            if carrier:
                del vars(part)[_ATTRIBUTE]


def _carry(module: Any, ledger: Ledger) -> None:
    setattr(module, _ATTRIBUTE, ledger)
    _hook(module)


def _hook(module: Any) -> None:
    for name, hook in _HOOKS.items():
        own = vars(module).get(name)
        if hasattr(type(module), name) and getattr(own, "func", None) is not hook:
            vars(module)[name] = partial(hook, module, own)


def watch_ledger(module: Any) -> None:
    """Let a module whose parts were trained privately write their ledger into its checkpoints."""
    if module is not None and ledger_of(module) is not None:
        _hook(module)


def drop_ledger(module: Any) -> None:
    """Let a module forget a ledger, because its weights have none."""
    vars(module).pop(_ATTRIBUTE, None)
    for part in module.modules():
        if _PART in vars(part) and not vars(part)[_PART][0].releases:
            del vars(part)[_PART]
    for name, hook in _HOOKS.items():
        wrapped = vars(module).get(name)
        if getattr(wrapped, "func", None) is hook:
            del vars(module)[name]
            if (own := wrapped.args[1]) is not None:
                vars(module)[name] = own


def ledger_of(module: nn.Module) -> Ledger | None:
    """Return the ledger that a module or one of its parts carries.

    Of a part's ledger a copy is returned, with the names that the weights have in the module. Of
    parts of several runs it is one that claims nothing.

    Returns:
        None if no part was ever trained privately.

    >>> ledger_of(nn.Linear(2, 1)) is None  # no private run has trained it
    True
    """
    found = _found(module)
    own = vars(module).get(_ATTRIBUTE)
    # A ledger without a release says nothing about any weight.
    released = [one for one in found if one.ledger.releases]
    if not released:
        return own
    # The one of the same run that knows most; in doubt the module's own.
    released.sort(key=lambda one: (one.ledger.steps, one.ledger is own))
    last = released[-1].ledger
    reasons = dict.fromkeys(reason for one in released for reason in one.ledger.insecure)
    if len({one.ledger.run_id for one in released}) > 1:
        reasons[_SEVERAL] = None
    notes: dict[str, WeightNote] = {}
    for one in released:
        notes.update(one.notes())
    complete = last.weights is None or notes.keys() <= last.weights.keys()
    if last is own and complete and reasons.keys() <= set(last.insecure):
        return own
    adopted = copy.deepcopy(last)
    adopted.insecure = tuple(reasons)
    adopted.weights = notes
    return adopted


class _Found(NamedTuple):
    """A ledger, where in a module it was found, and where in the ledger's module that part was."""

    name: str
    ledger: Ledger
    former: str

    def notes(self) -> dict[str, WeightNote]:
        """Return what the weights of the part were, by the names that they have now."""
        below, prefix = self.former and f"{self.former}.", self.name and f"{self.name}."
        return {
            prefix + name.removeprefix(below): note
            for name, note in (self.ledger.weights or {}).items()
            if name.startswith(below)
        }


def _found(module: nn.Module) -> list[_Found]:
    """Return the ledgers of a module and its parts; a part below a carrier adds what is newer."""
    parts = list(module.named_modules(remove_duplicate=False))
    carriers = [_Found(n, vars(p)[_ATTRIBUTE], "") for n, p in parts if _ATTRIBUTE in vars(p)]
    found = list(carriers)
    for name, part in parts:
        if _PART in vars(part):
            ledger, former = vars(part)[_PART]
            if not any(
                f"{name}.".startswith(one.name and f"{one.name}.")
                and one.ledger.run_id == ledger.run_id
                and one.ledger.steps >= ledger.steps
                for one in carriers
            ):
                found.append(_Found(name, ledger, former))
    return found


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
        LedgerError: if weights have changed, since they may have been trained without noise, or
            if its parts come from several private runs.
    """
    carried = ledger_of(module)
    if _SEVERAL in ledger.insecure or (carried is not None and _SEVERAL in carried.insecure):
        raise LedgerError(
            f"{type(module).__name__} has parts that were trained in different private runs: one "
            "ledger cannot go on for them. Use parts of one private run, and train the others anew "
            "in this module. No step was taken."
        )
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
        LedgerError: if the module carries no ledger.

    >>> from lightning_secure import DPConfig
    >>> from lightning_secure.privacy.run_contract import begin_ledger
    >>> config = DPConfig(noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, insecure_seed=7)
    >>> module = nn.Linear(2, 1)
    >>> keep_ledger(module, begin_ledger(config, rows=600, batch_size=6, planned_steps=int))
    >>> declare_public_weights(module)
    >>> ledger_of(module).declared_public
    1
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


def bring_ledger(
    module: nn.Module, checkpoint: Mapping[str, Any], load: Callable[[], object]
) -> None:
    """Let a module take over a checkpoint's weights, and carry their ledger if they have one.

    Args:
        module: Carries the ledger also if loading fails.
        checkpoint: Holds the weights.
        load: Loads them into the module. A hook of the module may rename them.

    Raises:
        LedgerError: if they have one that cannot be read. Nothing was loaded.
    """
    ledger = Ledger.from_checkpoint(checkpoint)
    if ledger is None:
        load()
        return
    state = checkpoint.get("state_dict", {})
    try:
        load()
    finally:
        # Of the second, Lightning's WeightAveraging makes the module's weights in some cases.
        average = checkpoint.get("current_model_state", {})
        ledger.weights = noted_weights(module, *((state, average) if average else ()))
        keep_ledger(module, ledger, covers=state.keys())


def bring_ledger_with_weights(strategy: Any) -> None:
    """Let a strategy of Lightning's bring the ledger of a checkpoint whose weights it loads.

    Args:
        strategy: A Trainer's. One that keeps a ledger itself is left alone.
    """
    if not isinstance(strategy, HasLedger):
        vars(strategy)["load_model_state_dict"] = partial(_load_weights, strategy)
        watch_ledger(strategy.lightning_module)


def _load_weights(strategy: Any, checkpoint: Mapping[str, Any], *args: Any, **options: Any) -> None:
    load = partial(type(strategy).load_model_state_dict, strategy, checkpoint, *args, **options)
    bring_ledger(strategy.lightning_module, checkpoint, load)


def _marked(ledger: Ledger, changed: list[str]) -> Ledger:
    """Return a copy of a ledger that claims nothing for the weights it is about."""
    marked = copy.deepcopy(ledger)
    if _CHANGED not in marked.insecure:
        marked.insecure = (*marked.insecure, _CHANGED)
        if not ledger.change_told:
            ledger.change_told = True
            log.warning(
                "%d weights, %r first, have changed since the last private fit: the ledger says "
                "so, and its epsilon is infinite. If no training row was used, call "
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
    # Parts keep their own: what they were before is still true of them elsewhere.
    if changed := changed_weights(module, ledger.weights or {}):
        _carry(module, _marked(ledger, changed))
    else:
        ledger.weights, ledger.change_told = noted_weights(module), False
        _carry(module, ledger)


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
