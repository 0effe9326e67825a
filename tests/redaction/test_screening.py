"""Looking at few texts finds what looking at all of them finds."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redaction_data import harmless, personal, secrets
from test_assignments import ASSIGNMENTS

from lightning_secure.redaction.detect import prefilter
from lightning_secure.redaction.detect.detectors import AssignmentDetector, SecretDetector
from lightning_secure.redaction.detect.obfuscated import DisguiseDetector
from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.detect.prefilter import (
    ASSIGNED,
    DISGUISED,
    PERSONAL,
    SECRET,
    screened,
)
from lightning_secure.redaction.detect.secret_formats import built_in_rules

PLAIN = (
    (PERSONAL, PersonalDataDetector()),
    (SECRET, SecretDetector()),
    (ASSIGNED, AssignmentDetector()),
)
DETECTORS = (*PLAIN, (DISGUISED, DisguiseDetector([detector for _, detector in PLAIN])))
RULES = [rule.regex for rule, _ in built_in_rules()._rules]


def lost(texts: list[str]) -> list[tuple[int, str]]:
    """Return what the detectors find in texts, and kinds, that the screen does not name."""
    screen = screened(texts)
    return [
        (kind, text)
        for position, text in enumerate(texts)
        for kind, detector in DETECTORS
        if any(True for _ in detector.find(text)) and not screen.get(position, 0) & kind
    ]


def test_of_made_data_nothing_is_lost():
    texts = [case.text for case in (*personal(3, 1), *secrets(3, 1))]
    texts += [form.format("hunter2Kestrel") for form in ASSIGNMENTS]
    assert lost(texts) == []
    assert lost(["é" + text for text in texts]) == []
    assert lost([text + " \u2013 “ñ” 😀" for text in texts]) == []
    assert lost([text.upper() for text in texts]) == []
    for text in texts[::7]:
        assert lost([text]) == []
        assert lost(["fine", text, "fine"]) == []


PIECES = (
    "token", "my", "pass_word", "pa.ss", "key", "api", "k e y", "secrets", "cred", "cookie", "=",
    ": ", ' = "', '"', "'", ", ", "\n", "  ", "--", "-", " -u ", "bob:x", "login", "password",
    "is", "was", "pwd", "bearer ", "Authorization", "<", ">", "</", "name", "value", "env ", "ARG ",
    "%3D", "%3a", "\u017fecret", "toKen", "\uff54\uff4f\uff4b\uff45\uff4e", "\ufb01",
    "p\u0301ass", "pa\u0301ass", "é", "ß", "\u00a0",
    "\x0b", "\x1e", "\x1c", "jo@x.org", "212-555-0199", "+49 30 1234567", "10.0.0.17", "fe80::1",
    "p%61ssword=x", "&#112;assword=x", "p\u0430ssword=x", "cGFzc3dvcmQ9aHVudGVyMg==",
    "70617373776f72643d68756e74657232", "AKIAIOSFODNN7EXAMPLE", "://a:b@c", "AP6xxxxxxxxxx",
    "AC" + "a" * 32, "a" * 30, "0123456789:",
)  # fmt: skip


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), max_size=5))
def test_of_hostile_texts_nothing_is_lost(texts):
    assert lost(texts) == []


def test_of_many_texts_that_several_threads_go_through_nothing_is_lost():
    texts = [case.text for case in (*personal(3, 2), *secrets(3, 2))]
    texts += [form.format("hunter2Kestrel") for form in ASSIGNMENTS]
    texts += ["fine, " * 20] * (prefilter._LARGE // 120)
    random.Random(2).shuffle(texts)
    assert lost(texts) == []
    many = screened(texts)
    for position, text in enumerate(texts):
        alone = screened([text]).get(0, 0)
        assert many.get(position, 0) & alone == alone


@given(st.integers(0, len(RULES) - 1), st.data())
def test_of_what_a_rule_matches_nothing_is_lost(number, data):
    text = data.draw(st.from_regex(RULES[number].replace("$", ""), fullmatch=True))
    before, after = data.draw(st.tuples(st.sampled_from(PIECES), st.sampled_from(PIECES)))
    assert lost([before, text, after]) == []
    assert lost([before + text, text + after]) == []


def test_of_texts_that_are_a_secret_from_end_to_end_nothing_is_lost():
    assert lost(["a", "AP6xxxxxxxxxx", "AP7yyyyyyyyyy", "b"]) == []
    assert screened(["a", "AP6xxxxxxxxxx", "b"]) == {1: SECRET}


def test_few_texts_are_named_where_there_is_nothing():
    texts = harmless(1500, 7)
    screen = screened(texts)
    assert not any(kinds & SECRET for kinds in screen.values())
    # Nothing but the names of tokens: pad_token_id=3.
    assert all("token" in texts[i] for i, kinds in screen.items() if kinds & ASSIGNED)
    assert screened([]) == {}
    assert screened([""]) == {}


def test_it_takes_linear_time():
    start = time.perf_counter()
    for text in ("pass" * 50_000, "p-a-s-s " * 25_000, "://" + "a:" * 100_000, "1 " * 100_000,
                 "<token " * 20_000, "a@" * 100_000, "\x1e" * 100_000, "é" * 100_000):  # fmt: skip
        screened([text, text])
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    "text",
    [
        "\ufb01",
        "\uff4bey",
        "\u212a",
        "\u00aa",
        "e\u0301",
        "\u017f",
        "\U0001d424",
        "\u2460",
        "\u0130",
    ],
)
def test_what_may_become_ascii_is_looked_at(text):
    assert prefilter._odd().search(text)
