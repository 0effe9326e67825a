"""What finds secrets and personal data."""

from __future__ import annotations

from mutation import Mutation

RULES = "tests/redaction/test_rules.py"
PERSONAL = "tests/redaction/test_personal.py"

CATALOGUE = [
    Mutation(
        "a keyword hides what its rule would find",
        "redaction/detect/secret_formats.py",
        "self._keywords.iter(text.casefold())",
        "self._keywords.iter(text)",
        f"{RULES} -k gitleaks",
    ),
    Mutation(
        "positions of secrets are counted in bytes",
        "redaction/detect/secret_formats.py",
        'return len(data[start:end].decode("utf-8", "surrogatepass"))',
        "return end - start",
        f"{RULES} -k positions",
    ),
    Mutation(
        "rules that are in another file are missing and nobody is told",
        "redaction/detect/secret_formats.py",
        'if "extend" in content:',
        "if False:",
        f"{RULES} -k cannot_be_kept",
    ),
    Mutation(
        "names of secrets are looked for in the wrong place",
        "redaction/detect/assignments.py",
        "seen = max(position, seen, cut)",
        "seen = max(position, hit)",
        f"{RULES} -k near_the_stems",
    ),
    Mutation(
        "a name that is written apart hides behind the same name written together",
        "redaction/detect/assignments.py",
        "joined.count(stem) > plain.count(stem)",
        "stem not in plain",
        "tests/redaction/test_assignments.py -k 'secrets_in_free_text and se_cret'",
    ),
    Mutation(
        "a name of a secret is passed over by the short look at it",
        "redaction/detect/secret_names.py",
        "joined = name.lower()",
        "joined = name",
        "tests/redaction/test_names.py -k 'stems or names_of_secrets'",
    ),
    Mutation(
        "a card is followed by its date and not found",
        "redaction/detect/personal_data.py",
        "        written = written[:cut]\n",
        "        return None\n",
        f"{PERSONAL} -k before_it_or_after_it",
    ),
    Mutation(
        "a national number is passed over by the short look at a text",
        "redaction/detect/personal_data.py",
        r"|(?:\d|[xyz][ -]?)\d{7}[ -]?[a-z]",
        "",
        f"{PERSONAL} -k 'one_look and es'",
    ),
    Mutation(
        "numbers of nine digits are passed over by the short look at a run of digits",
        "redaction/detect/personal_data.py",
        r"\d(?:[ .+-]?\d){8}",
        r"\d(?:[ .+-]?\d){9}",
        f"{PERSONAL} -k 'digits_only and bsn'",
    ),
    Mutation(
        "a number is passed over for having too few digits",
        "redaction/detect/personal_data.py",
        'r"\\d{6}-\\d{4}"), 10, "dk.cpr"',
        'r"\\d{6}-\\d{4}"), 11, "dk.cpr"',
        f"{PERSONAL} -k 'has_the_digits and dk'",
    ),
    Mutation(
        "what was found once is remembered as clean",
        "redaction/redactor.py",
        "        if not found:\n",
        "        self._clean.add(text)\n        if not found:\n",
        "tests/redaction/test_redactor.py -k remembered",
    ),
    Mutation(
        "what is left of a list of YAML is no YAML",
        "redaction/detect/assignments.py",
        "return (first.end() if first else start), end",
        "return start, end",
        "tests/redaction/test_assignments.py -k secrets",
    ),
]
