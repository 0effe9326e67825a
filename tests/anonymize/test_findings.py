from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Redact,
    Suppress,
)
from lightning_secure.anonymize.findings import Look
from lightning_secure.errors import ConfigError, DataError
from lightning_secure.redaction.redactor import Redactor

NOTES = [
    "fine",
    "call +1 212 555 0199 or jo@clinic.example",
    "the password is hunter2Kestrel, ask jo@clinic.example and ann@clinic.example",
    "key AKIAIOSFODNN7EXAMPLE",
    "",
    "\u017ftill fine",
    "p\u0430ssword=hunter2Kestrel",
    "sent as cGFzc3dvcmQ9aHVudGVyMktlc3RyZWw=",
    "mail to jo%40clinic.example",
]


def test_free_text_is_redacted_as_by_a_redactor_and_counted_by_value():
    clean, found = Look("note").redacted(NOTES)
    assert clean == [Redactor().redact_text(note) for note in NOTES]
    assert found.inspected == 9
    assert found.rules == Counter(
        {"phone": 1, "e-mail": 3, "secret-assigned": 3, "aws-access-key": 1}
    )
    assert found.rules == Look("note").inspected(NOTES).rules


class Liar(str):
    """Says that it is another text, in which there is nothing."""

    __slots__ = ()

    def __eq__(self, other):
        return True

    def __hash__(self):
        return hash("2026-11-24")

    def __getitem__(self, position):
        return "jo@clinic.example"


def test_a_text_that_says_it_is_another_is_looked_at_itself(keys):
    bound = AnonymizationPlan({"note": Redact(), "kept": Keep()}).bind(keys)
    fine = ["2026-11-24"]
    bound.run({"note": fine, "kept": fine})  # it is remembered
    lies = [Liar("mail jo@clinic.example")]
    applied = bound.run({"note": lies, "kept": lies})
    assert applied.columns["note"] == ["mail REDACTED"]
    assert [applied.found[name].rules for name in ("note", "kept")] == [{"e-mail": 1}] * 2


def test_a_secret_in_free_text_is_seen_also_where_somebody_said_keep(keys):
    bound = AnonymizationPlan({"note": Keep()}).bind(keys)
    applied = bound.run({"note": NOTES, "x": np.zeros(9)})
    assert applied.columns["note"] == NOTES
    assert applied.found["note"].rules["aws-access-key"] == 1
    assert "hunter2" not in repr(applied.found)


def test_the_columns_name_counts_as_a_word_before_each_value():
    values = ["5551234", "512 256 128"]
    assert Look("layers").inspected(values).rules == {}
    assert Look("phone").inspected(values).rules == {"phone": 2}
    assert Look("phone").redacted(["5551234", "none"])[0] == ["REDACTED", "none"]
    assert Look("db_password").redacted(["hunter2", ""])[0] == ["REDACTED", ""]


def test_whole_numbers_are_looked_at_as_text_if_they_are_long_enough():
    cards = [4111111111111111, 5500005555555559, 17]
    for values in (cards, np.array(cards), torch.tensor(cards), list(np.array(cards))):
        found = Look("n").inspected(values)
        assert (found.inspected, dict(found.rules)) == (3, {"card": 2})
    held = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    times = np.array([2 * 10**9, 1], "m8[s]"), np.array([2 * 10**9, 1], "M8[s]")
    many = torch.zeros(2, 2, dtype=torch.int64)
    for values in (np.zeros(3), many, held, *times, [True, False], [1.5, None]):
        assert Look("n").inspected(values).rules == {}


def test_bytes_that_are_text_are_looked_at_and_others_are_not_said_to_be():
    values = [b"mail jo@clinic.example", b"", "caf\u00e9 password=hunter2Kestrel".encode()]
    found = Look("note").inspected([*values, b"\x00jo@clinic.example", b"\xffjo@clinic.example"])
    assert found.rules == {"e-mail": 1, "secret-assigned": 1}
    assert found.inspected == 3


def test_whole_numbers_are_seen_where_a_missing_one_made_them_floats():
    numbers = [4111111111111111.0, float("nan"), 2.5e6 + 0.5, 17.0, float("inf"), 1e300]
    for values in (numbers, np.array(numbers), torch.tensor(numbers, dtype=torch.float64)):
        assert Look("x").inspected(values).rules == {"card": 1}
    assert Look("phone").inspected(np.array([2079460958.0])).rules == {"phone": 1}


def test_pictures_with_metadata_are_seen():
    values = [
        b"\xff\xd8\xff\xe1..Exif\0\0Ada",
        b"\xff\xd8\xff\xdb",
        b"\x89PNG\r\n\x1a\n....tEXtAuthor",
        b"Exif\0\0",
    ]
    assert Look("image").inspected(values).rules == {"image-metadata": 2}


def test_rules_of_ones_own(tmp_path):
    (tmp_path / "rules.toml").write_text('[[rules]]\nid = "ward"\nregex = "ward-[0-9]+"\n')
    look = Look("note", extra_patterns=[r"MRN(\d+)"], extra_rules=str(tmp_path / "rules.toml"))
    clean, found = look.redacted(["MRN77 in ward-9", "AKIAIOSFODNN7EXAMPLE", "fine"])
    assert clean == ["MRNREDACTED in REDACTED", "REDACTED", "fine"]
    assert found.rules == {"extra-0": 1, "ward": 1, "aws-access-key": 1}
    with pytest.raises(ConfigError):
        Look("note", extra_rules=str(tmp_path / "none.toml"))


@pytest.mark.parametrize("patterns", ["MRN", ["hunter2("], [7], [None]])
def test_patterns_that_are_none_are_refused_and_not_shown(patterns):
    with pytest.raises(ConfigError, match="regular expressions") as caught:
        Redact(extra_patterns=patterns)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__context__ is None


def test_rules_that_cannot_be_used_are_refused_before_any_row(keys):
    with pytest.raises(ConfigError):
        AnonymizationPlan({"note": Redact(extra_rules="/none.toml")}).bind(keys)


def test_what_cannot_be_checked_goes(monkeypatch):
    look = Look("note")
    clean, found = look.redacted(["half \ud800 jo@x.org", "fine"])
    assert (clean, found.rules) == (["REDACTED", "fine"], {"encoding-failed": 1})
    halves = ["x\ud83d", "\ude00", "\udfff fine", "\U0001f600"]  # of which two follow each other
    assert look.redacted(halves)[0] == ["REDACTED"] * 3 + halves[3:]

    class Broken:
        def find(self, text):
            raise RuntimeError(text)

    monkeypatch.setattr(look, "_personal", Broken())  # no text is known that breaks the real one
    clean, found = look.redacted(["jo@x.org", "fine"])
    assert (clean, found.rules) == (["REDACTED", "fine"], {"detector-failed": 1})


def test_redact_takes_text_only_and_says_what_it_is(keys):
    for value in (None, 7, b"text"):
        with pytest.raises(DataError, match=r"'note': a .* cannot be redacted"):
            AnonymizationPlan({"note": Redact()}).bind(keys).apply({"note": ["a", value]})
    assert Redact().describe() == "redact"
    assert "MRN" not in Redact(extra_patterns=("MRN",), extra_rules="x").describe()


def test_of_what_is_dropped_and_of_numbers_a_glance_is_enough(keys):
    bound = AnonymizationPlan(
        {"name": Suppress(), "note": Redact(), "kept": Keep(), "zip": Generalize(prefix=2)}
    ).bind(keys)
    inspected = Counter()
    for _ in range(3):
        rows = dict.fromkeys(("name", "note", "kept", "zip"), ["x"] * 400)
        for name, found in bound.run(rows | {"n": np.arange(400)}).found.items():
            inspected[name] += found.inspected
    assert inspected == {"name": 256, "n": 256, "note": 1200, "kept": 1200, "zip": 1200}


class Heavy(np.ndarray):
    def tolist(self):
        raise AssertionError("it takes a hundred times the memory as a list")


def test_a_large_array_that_is_dropped_does_not_become_a_list(keys):
    bound = AnonymizationPlan({"x": Suppress(), "n": Suppress()}).bind(keys)
    rows = {"x": np.zeros((300, 9)).view(Heavy), "n": np.arange(300).view(Heavy)}
    applied = bound.run(rows)
    assert applied.columns == {}
    assert [applied.found[name].inspected for name in ("x", "n")] == [0, 256]
