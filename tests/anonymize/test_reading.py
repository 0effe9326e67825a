from __future__ import annotations

import pytest

from lightning_secure.anonymize import (
    AnonymizationPlan,
    Generalize,
    Keep,
    Pseudonymize,
    Redact,
    Suppress,
    Tokenize,
)
from lightning_secure.errors import ConfigError


def test_a_plan_in_yaml(tmp_path):
    (tmp_path / "plan.yaml").write_text(
        "anonymize:\n"
        "  a: keep\n"
        "  b: suppress\n"
        "  c: redact\n"
        "  d: {redact: {extra_patterns: ['MRN(\\d+)'], extra_rules: rules.toml}}\n"
        "  e: {pseudonymize: patient}\n"
        "  f: {pseudonymize: {domain: patient, generation: 2}}\n"
        "  g: {tokenize: patient}\n"
        "  h: {tokenize: {domain: patient, generation: 3}}\n"
        "  i: {generalize: {bins: [18, 40, 65]}}\n"
        "  j: {generalize: {date: decade}}\n"
        "quasi_identifiers: [i, j]\n"
        "sensitive: [c]\n"
    )
    plan = AnonymizationPlan.from_yaml(tmp_path / "plan.yaml")
    assert plan == AnonymizationPlan(
        {
            "a": Keep(),
            "b": Suppress(),
            "c": Redact(),
            "d": Redact(extra_patterns=(r"MRN(\d+)",), extra_rules="rules.toml"),
            "e": Pseudonymize(domain="patient"),
            "f": Pseudonymize(domain="patient", generation=2),
            "g": Tokenize(domain="patient"),
            "h": Tokenize(domain="patient", generation=3),
            "i": Generalize(bins=(18, 40, 65)),
            "j": Generalize(date="decade"),
        },
        quasi_identifiers=("i", "j"),
        sensitive=("c",),
    )


def test_an_operator_that_is_none_is_told_which_there_are(tmp_path):
    (tmp_path / "plan.yaml").write_text("anonymize: {a: hash}")
    with pytest.raises(ConfigError, match="must be one of keep, suppress, redact, generalize"):
        AnonymizationPlan.from_yaml(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "columns: {a: keep}",
        "anonymize: [a]",
        "anonymize: {a: hunter2}",
        "anonymize: {a: {}}",
        "anonymize: {a: {pseudonymize: p, tokenize: p}}",
        "anonymize: {a: {pseudonymize: 7}}",
        "anonymize: {a: {tokenize: {generation: 2}}}",
        "anonymize: {a: {tokenize: {domain: p, generation: '2'}}}",
        "anonymize: {a: {tokenize: {domain: p, colour: 2}}}",
        "anonymize: {a: {generalize: {bins: [2, 1]}}}",
        "anonymize: {a: {generalize: {date: hunter2}}}",
        "anonymize: {a: {generalize: {width: hunter2}}}",
        "anonymize: {a: {generalize: {prefix: hunter2}}}",
        "anonymize: {a: {generalize: {bins: hunter2}}}",
        "anonymize: {a: {tokenize: {domain: p, generation: hunter2}}}",
        "anonymize: {a: {redact: {extra_patterns: hunter2}}}",
        "anonymize: {a: {redact: {extra_rules: 7}}}",
        "anonymize: {7: keep}",
        "quasi_identifiers: a",
        "quasi_identifiers: [a]\nsensitive: [a]",
        "- hunter2",
        "anonymize: {",
    ],
)
def test_what_is_no_plan_is_refused_and_not_repeated(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        AnonymizationPlan.from_yaml(tmp_path / "plan.yaml")
    assert "hunter2" not in str(caught.value)
