from __future__ import annotations

import re
import time
from contextlib import nullcontext

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lightning_secure.errors import ConfigError, RedactionError
from lightning_secure.redaction.detect import assignments
from lightning_secure.redaction.detect.detectors import SecretDetector
from lightning_secure.redaction.detect.secret_formats import (
    _KEYWORDS,
    Rule,
    RuleSet,
    built_in_rules,
    detect_secrets_rules,
    read_rules,
)
from lightning_secure.redaction.detect.secret_names import KeyNameDetector
from lightning_secure.redaction.redactor import REDACTED, Redactor

RULES = [rule for rule, _ in built_in_rules()._rules]


@pytest.mark.parametrize("number", range(len(RULES)))
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.data())
def test_every_match_of_a_rule_holds_a_keyword_of_it_and_is_found(number, data):
    """What is looked for first must not hide what would be found."""
    rule = RULES[number]
    text = data.draw(st.from_regex(re.compile(rule.regex, re.ASCII), fullmatch=True))
    assume("\v" not in text)  # RE2's \s is without it
    assert not rule.keywords or any(word in text.casefold() for word in rule.keywords)
    assert list(built_in_rules().find(text))


def test_the_plugins_have_keywords_and_no_entropy():
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    known = {kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()}
    assert set(_KEYWORDS) <= known
    assert [r for r in detect_secrets_rules() if not r.keywords] == [
        r for r in detect_secrets_rules() if r.name == "discord-bot-token"
    ]
    assert not any("entropy" in rule.name for rule in RULES)


def test_what_detect_secrets_finds_is_found():
    """The rewritten expressions ask for no more than theirs."""
    for text in (
        'cloudant_pw = "%s"' % ("ab12" * 16), "ibm_cos_secret_access_key: '%s'" % ("ab" * 24),
        "softlayer_api_key=%s" % ("c3" * 32), "ibm-cloud-key=%s" % ("Ab3_" * 11),
        "glagent-" + "a" * 1024, "glpat-" + "a1-_" * 5,
    ):  # fmt: skip
        found = list(SecretDetector().find(text))
        assert found
        assert max(f.end for f in found) >= len(text.rstrip("'\""))


def test_positions_count_characters_and_words_go_whole():
    text = "é\N{GRINNING FACE} ghp_" + "a" * 36 + "ZZ, ü ghp_" + "b" * 36
    clean = Redactor().redact_text(text)
    assert clean == f"é\N{GRINNING FACE} {REDACTED}, ü {REDACTED}"


@pytest.mark.parametrize(
    "text", ["commit 6f03404a1c0de", "sha256:" + "0a" * 32, "approximate", "task-sk-learn", "eyJ"]
)
def test_harmless_words_stay(text):
    assert list(SecretDetector().find(text)) == []


RULES_FILE = """
title = "ours"
[[rules]]
id = "ward-key"
description = "issued by the ward"
regex = '''(?i)ward-(k[0-9]{4})'''
secretGroup = 1
keywords = ["WARD-"]
entropy = 3.5
[rules.allowlist]
stopwords = ["k0000"]
[[rules]]
id = "any"
regex = '''zz\\d+'''
[[rules]]
id = "files"
path = '''\\.pem$'''
"""


def test_rules_in_the_format_of_gitleaks(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(RULES_FILE)
    assert [rule.name for rule in read_rules(path)] == ["ward-key", "any"]
    redactor = Redactor(extra_rules=path)
    text = "Ward-k0000 of zz12, \N{KELVIN SIGN}"
    assert redactor.redact_text(text) == f"Ward-{REDACTED} of {REDACTED}, \N{KELVIN SIGN}"
    assert redactor.counts == {"ward-key": 1, "any": 1}
    assert "k0000" not in str(redactor.counts)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[[rules]]\nid='a'\nregex='(?<=x)hunter2'", "RE2"),
        ("[[rules]]\nid='a'\nregex='(hunter2'", "RE2"),
        ("[[rules]]\nid='a'\nregex='x'\nsecretGroup=1", "no group"),
        ("[[rules]]\nid='a'\nregex='x'\nsecretGroup=true", "whole number"),
        ("[[rules]]\nregex='x'", "id"),
        ("[[rules]]\nid='a'\nregex='x'\nkeywords=['']", "keywords"),
        ("rules=[3]", "id"),
        ("title='hunter2'", "no \\[\\[rules"),
        ("[extend]\nuseDefault=true\n[[rules]]\nid='a'\nregex='x'", "extends"),
        ("hunter2", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(tmp_path, content, why, capfd):
    path = tmp_path / "rules.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=why) as caught:
        Redactor(extra_rules=path)
    assert caught.value.__context__ is None
    assert "hunter2" not in str(caught.value) + capfd.readouterr().err


def test_a_file_of_paths_only_finds_nothing(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("[[rules]]\nid='a'\npath='x'")
    assert Redactor(extra_rules=path).redact_text("x") == "x"


def test_an_evil_rule_takes_linear_time():
    """The textbook case: a backtracking engine needs 2^n steps for it."""
    rules = RuleSet([Rule("evil", r"(a+)+b"), Rule("worse", r"(?:x+x+)+y", 0, ("xxx",))])
    short, long = "a" * 4_000 + "x" * 4_000, "a" * 64_000 + "x" * 64_000
    took = []
    for text in (short, long):
        start = time.perf_counter()
        assert list(rules.find(text)) == []
        took.append(time.perf_counter() - start)
    assert took[1] < 200 * took[0] + 0.1  # 16 times as long; 256 would be quadratic


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from([
            "cloudant_key ", " ", "1 ", "0.", "+49 ", "4111 ", "a@", "::", "ab:", "1.", "eyJ", "//",
            "token", "=", "'", "\\", "aws key ", "DE89", "sl_pw ", "AKIA", "\n", "é", "\ud800", "-",
        ]),
        st.text(max_size=3),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(HOSTILE)
def test_it_never_raises_and_never_takes_more_than_linear_time(parts):
    text = "".join(parts)
    text = text * (1 + 4_000 // len(text)) if text else ""
    redactor = Redactor()
    start = time.perf_counter()
    redactor.redact_text(text)
    assert (
        time.perf_counter() - start < 3
    )  # 4,000 characters; quadratic time would be 1 s per 10 ns²
    with pytest.raises(RedactionError, match="encoding") if "\ud800" in text else nullcontext():
        Redactor(strict=True).redact_text(text)


WORDS = ("token", "my", "pass_word", "secret", "key", "api", "=", ": ", ' = "', '"', ", ", "\n",
         "  ", "%3D", "x.y/z", "db[0]", "{", "}", "cookie", "se_cret", "connection string", "ü",
         "--")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=14).map("".join))
def test_looking_near_the_stems_finds_what_looking_everywhere_finds(text):
    names = KeyNameDetector()
    near = list(assignments._assigned(text, assignments._stems(text, text.lower()), names))
    assert near == list(assignments._assigned(text, range(1, len(text) + 1), names))
