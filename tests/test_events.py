from __future__ import annotations

import pytest

from lightning_secure.util import events


def test_every_listener_hears_every_event_in_order():
    heard = []
    events.subscribe("a", lambda event: heard.append(("a", event.action)))
    events.subscribe("b", lambda event: heard.append(("b", event.action)))
    events.announce("key.unwrap", {"key_id": "1"})
    assert heard == [("a", "key.unwrap"), ("b", "key.unwrap")]


def test_a_second_subscription_under_one_name_replaces_the_first():
    heard = []
    events.subscribe("a", lambda _: heard.append("old"))
    events.subscribe("a", lambda _: heard.append("new"))
    events.announce("x")
    assert heard == ["new"]


def test_a_listener_that_fails_stops_the_action():
    def refuse(event):
        raise OSError("full")

    events.subscribe("a", refuse)
    with pytest.raises(OSError, match="full"):
        events.announce("x")


def test_nobody_hears_after_unsubscribing():
    heard = []
    events.subscribe("a", heard.append)
    events.unsubscribe("a")
    events.unsubscribe("a")
    events.announce("x", outcome="failure")
    assert heard == []
