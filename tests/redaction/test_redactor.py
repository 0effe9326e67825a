from __future__ import annotations

import re

import pytest

from lightning_secure.errors import RedactionError
from lightning_secure.redaction.redactor import REDACTED, Redactor

SECRETS = {
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "github": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "stripe": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "slack": "xoxb-" + "123456789012-abcdefABCDEF1234567890ab",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_known_by_their_format(name):
    redactor = Redactor()
    text = redactor.redact_text(f"before {SECRETS[name]} after")
    assert SECRETS[name][:12] not in text
    assert text.startswith("before ")
    assert sum(redactor.counts.values()) >= 1


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("postgresql://bob:hunter2@db/x", "postgresql://REDACTED@db/x"),
        ("https://user:p%40ss@host:99/a?b#c", "https://REDACTED@host:99/a?b#c"),
        ("https://token@host/a", "https://REDACTED@host/a"),
        ("mongodb://u:p@ss:w@rd@h/x", "mongodb://REDACTED@h/x"),
        ("see s3://bucket/key and https://x.example/a@b", None),
        ("file:///data/train.csv", None),
    ],
)
def test_credentials_in_urls_are_taken_out(url, clean):
    assert Redactor().redact_text(url) == (clean or url)


@pytest.mark.parametrize(
    "address",
    [
        "jo@clinic.example",
        "Jo.O'Neil+x@sub.mail.example.org",
        "a-b_c%d@x-y.example",
        "müller@krankenhaus.example",
    ],
)
def test_addresses_are_taken_out(address):
    assert Redactor().redact_text(f"by <{address}>, 2020") == "by <REDACTED>, 2020"


@pytest.mark.parametrize(
    "text", ["a @ b", "user@localhost", "@decorator", "x@y", "1e-3", "v1.2.3", "lr=0.01", "adam"]
)
def test_other_text_is_left_alone(text):
    assert Redactor().redact_text(text) == text


def test_it_looks_everywhere():
    class Config:
        def __str__(self):
            return "Config(owner=jo@clinic.example)"

    value = {
        "a": [{"password": "x"}, ("jo@clinic.example", 1, 2.5)],
        "jo@clinic.example": None,
        "nested": {"secret": {"deep": 1}, "flag": True, "password": None, "use_secret": False},
        "config": Config(),
        "set": {"jo@clinic.example"},
        "tokens": ["a", "b"],
        "api_key": ["k1", "k2"],
    }
    clean = Redactor().redact(value)
    assert clean == {
        "a": [{"password": REDACTED}, [REDACTED, 1, 2.5]],
        REDACTED: None,
        "nested": {"secret": REDACTED, "flag": True, "password": None, "use_secret": False},
        "config": f"Config(owner={REDACTED})",
        "set": [REDACTED],
        "tokens": REDACTED,
        "api_key": REDACTED,
    }


def test_overlapping_findings_are_taken_out_once():
    redactor = Redactor(extra_patterns=[r"abc.*", r"c(de)f", "bcd"])
    assert redactor.redact_text("xabcdefx") == f"x{REDACTED}"
    assert redactor.redact_text("x cdef y") == f"x c{REDACTED}f y"
    assert Redactor(extra_patterns=["abc", "cde"]).redact_text("abcde!") == f"{REDACTED}!"


def test_patterns_of_the_users_own():
    redactor = Redactor(extra_patterns=[re.compile(r"MRN-\d+"), r"ward (\w+)?"])
    assert redactor.redact_text("MRN-123 in ward B7") == f"{REDACTED} in ward {REDACTED}"
    assert redactor.redact_text("ward ") == "ward "
    assert redactor.counts == {"extra-0": 1, "extra-1": 1}


def test_redacting_twice_changes_nothing_more():
    once = Redactor().redact_text("https://a:b@c/ jo@clinic.example")
    assert Redactor().redact_text(once) == once


def test_only_clean_texts_are_remembered_and_not_too_many():
    redactor = Redactor()
    for _ in range(2):
        assert redactor.redact_text("by jo@clinic.example") == f"by {REDACTED}"
    assert redactor.counts == {"e-mail": 2}
    for number in range(5000):
        redactor.redact_text(f"layer {number}")
    assert 0 < len(redactor._clean) <= 4096
    assert not any("jo@" in text for text in redactor._clean)


def test_a_text_that_poses_as_another_is_not_remembered():
    class Posing(str):
        __slots__ = ()

        def __eq__(self, other):
            return other == "epoch"

        def __hash__(self):
            return hash("epoch")

    redactor = Redactor()
    assert not redactor.remembers(["epoch"])
    redactor.redact_text("epoch")
    assert redactor.remembers(["epoch"])
    assert not redactor.remembers(["epoch", Posing("jo@clinic.example")])
    assert redactor.redact_text(Posing("jo@clinic.example")) == REDACTED


class Broken:
    def find(self, text):
        raise ValueError(text)


def test_what_cannot_be_checked_is_dropped(caplog):
    redactor = Redactor()
    redactor._detectors.append(Broken())
    clean = redactor.redact({"a": "hunter2", "b": 1, "c": 2})
    assert clean == {REDACTED: REDACTED, "REDACTED_2": 1, "REDACTED_3": 2}
    assert "hunter2" not in str(clean)
    assert redactor.counts["detector-failed"] > 3
    assert "hunter2" not in caplog.text


def test_or_raises_if_that_is_wanted():
    redactor = Redactor(strict=True)
    redactor._detectors.append(Broken())
    with pytest.raises(RedactionError, match="not released") as caught:
        redactor.redact_text("hunter2")
    assert caught.value.__context__ is None
    assert "hunter2" not in str(caught.value)


def test_half_a_character_is_dropped():
    """No store takes it, and the error of trying would carry the text along."""
    redactor = Redactor()
    assert redactor.redact({"a": "hunter2 \ud800", "b\udfff": 1}) == {"a": REDACTED, REDACTED: 1}
    assert redactor.counts == {"encoding-failed": 2}
    with pytest.raises(RedactionError) as caught:
        Redactor(strict=True).redact_text("hunter2 \ud800")
    assert caught.value.__context__ is None


def test_an_object_without_a_text_form_is_dropped():
    class Odd:
        def __str__(self):
            raise RuntimeError("hunter2")

    assert Redactor().redact({"a": Odd()}) == {"a": REDACTED}


def test_endless_nesting_ends():
    endless: list = []
    endless.append(endless)
    assert REDACTED in str(Redactor().redact(endless))
