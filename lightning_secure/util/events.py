"""Events of the package while it works: keys used, data opened, checkpoints written.

The rooms that hold keys and data announce what they do here, and record keepers listen. An
announcement happens *before* the thing is released, and a listener that raises stops it: a key
whose use cannot be recorded is not handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Listener = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A security-relevant action.

    Attributes:
        action: Dotted name, for example ``key.unwrap`` or ``checkpoint.save``.
        outcome: ``success`` or ``failure``.
        details: Ids, counts and names. Never a key, a plaintext or a personal value.
    """

    action: str
    outcome: Literal["success", "failure"] = "success"
    details: Mapping[str, str | int] = field(default_factory=dict)


#: Each use is one operation of the dict, which needs no lock: one that another thread held during a
#: fork would stop the child at its first event.
_listeners: dict[str, Listener] = {}
_following: set[str] = set()


def subscribe(name: str, listener: Listener, *, follows_keys: bool = False) -> None:
    """Call ``listener`` for every event of this process from now on.

    Args:
        name: Identifies the subscription. A second one under the same name replaces the first, so
            that one log is never told the same event twice.
        listener: Called in the thread in which the event happens. If it raises, the announced
            action is refused.
        follows_keys: Whether a process that is sent a key provider by pickle, such as a spawned
            worker, subscribes ``listener`` too. It is pickled with the provider.

    >>> seen = []
    >>> subscribe("doctest", seen.append)
    >>> _ = keys.wrap_all(keys.derive("join"), context={"purpose": "doctest"})
    >>> seen[-1].action
    'key.wrap'
    >>> unsubscribe("doctest")
    """
    _listeners[name] = listener
    (_following.add if follows_keys else _following.discard)(name)


def unsubscribe(name: str) -> None:
    """End a subscription; unknown names are ignored."""
    _listeners.pop(name, None)
    _following.discard(name)


def following() -> dict[str, Listener]:
    """Return the listeners that a key provider takes along."""
    return {name: one for name, one in list(_listeners.items()) if name in _following}


def follow(listeners: Mapping[str, Listener]) -> None:
    """Subscribe listeners that came with a key provider, except those that are subscribed here."""
    for name, listener in listeners.items():
        if name not in _listeners:
            subscribe(name, listener, follows_keys=True)


def announce(
    action: str,
    details: Mapping[str, str | int] | None = None,
    *,
    outcome: Literal["success", "failure"] = "success",
) -> None:
    """Tell every listener, in the order of subscription, and let their errors through.

    >>> seen = []
    >>> subscribe("doctest", seen.append)
    >>> announce("key.unwrap", {"key_id": "3f2a", "purpose": "partition"})
    >>> seen[0].action, dict(seen[0].details)
    ('key.unwrap', {'key_id': '3f2a', 'purpose': 'partition'})
    >>> unsubscribe("doctest")
    """
    event = Event(action=action, outcome=outcome, details=details or {})
    for listener in list(_listeners.values()):
        listener(event)
