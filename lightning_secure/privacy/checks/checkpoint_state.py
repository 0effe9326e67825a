"""The content of a checkpoint, and the check that trial runs do not change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_secure.errors import LightningSecureError, UnsupportedModelError
from lightning_secure.privacy.checks.clocks import Snapshot, first_change
from lightning_secure.privacy.checks.snapshot import MADE_OF


def held(
    model: nn.Module, checkpoint: Callable[[], Mapping[str, Any]], *, outcome: str
) -> dict[str, Any]:
    """Return all that a checkpoint would hold, and buffers that none does.

    Args:
        model: The model whose weights and buffers it holds.
        checkpoint: Returns what a checkpoint would hold if it were written now.
        outcome: Ends the error.

    Raises:
        UnsupportedModelError: if no checkpoint can be put together now.
    """
    own = {**dict(model.named_buffers()), **model.state_dict()}
    try:
        written = dict(checkpoint())
    except LightningSecureError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            "a checkpoint cannot be made in a training step, so its content could not be checked "
            f"for values of the rows ({type(error).__name__}). An on_save_checkpoint that needs "
            f"the results of training is a common cause. {outcome}"
        ) from error
    weights = written.pop("state_dict", {})
    known = {value.data_ptr() for value in own.values() if isinstance(value, Tensor)}
    added = {
        f"state_dict.{name}": value
        for name, value in weights.items()
        if not isinstance(value, Tensor) or value.data_ptr() not in known
    }
    # First, so that it is what the error names, and not the name under which it is written.
    given = {"hyper_parameters": written.pop("hyper_parameters", {})}
    return {**given, **written, **added, **own}


def require_unchanged(before: Snapshot, take: Callable[[], Snapshot], *, outcome: str) -> None:
    """Compare what a checkpoint would hold before trial runs and after them.

    Raises:
        UnsupportedModelError: if something has changed that is no clock.
    """
    name = first_change(before, take(), take)
    if name is not None:
        raise changed(name, outcome=outcome)


def changed(name: str, *, outcome: str) -> UnsupportedModelError:
    """Return what says that a training step has changed what checkpoints hold."""
    return UnsupportedModelError(
        f"{name.split('.' + MADE_OF)[0]!r} changes in a training step: it takes up the rows "
        "without noise, or counts how often the step runs, which tells how many rows were "
        "drawn, and would stand in every checkpoint. Count steps by self.global_step, and "
        f"keep what comes from rows out of checkpoints. {outcome}"
    )


def without_optimizer_states(content: dict[str, Any]) -> dict[str, Any]:
    """Put numbers of places and versions in place of an optimizer's tensors, which are large."""
    states = content.get("optimizer_states")
    if not isinstance(states, list):
        return content
    return {**content, "optimizer_states": [_versions(state) for state in states]}


def _versions(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [value.data_ptr(), value._version, list(value.shape)]
    if isinstance(value, dict):
        return {key: _versions(item) for key, item in value.items()}
    return value
