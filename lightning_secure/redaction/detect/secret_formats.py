"""Secrets by their format: many regular expressions, tried in time that is linear in the text."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, NamedTuple

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.detect.finding import Finding


class Rule(NamedTuple):
    """The format of one kind of secret.

    Attributes:
        name: Under which what it finds is counted.
        regex: In RE2's syntax.
        group: Which group is the secret; 0 for all that matches.
        keywords: In lower case. One of them stands in every text that ``regex`` can match; without
            any, every text is tried.
    """

    name: str
    regex: str
    group: int = 0
    keywords: tuple[str, ...] = ()


class RuleSet:
    """Tries rules on texts.

    One pass (Aho-Corasick) finds the keywords, and only the rules that they call for are tried. The
    others, and those with keywords of less than three letters, are tried as one expression first.

    Args:
        rules: At least one.

    Raises:
        ConfigError: if an expression is not of RE2's syntax, or has no such group.

    Guarantees:
        The time is linear in the length of the text, whatever stands in it: RE2 does not backtrack.

    >>> rules = RuleSet([Rule("ward-token", "wtk_[0-9a-f]{8}", keywords=("wtk_",))])
    >>> list(rules.find("token wtk_0123abcd"))
    [Finding(rule='ward-token', start=6, end=18)]
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        import ahocorasick

        self._rules = [(rule, _compiled(rule)) for rule in rules]
        called: dict[str, set[int]] = {}
        self._weak: list[int] = []
        for number, (rule, _) in enumerate(self._rules):
            # Two letters stand in nearly every text.
            if not rule.keywords or min(map(len, rule.keywords)) < _TELLING:
                self._weak.append(number)
                continue
            for keyword in rule.keywords:
                called.setdefault(keyword, set()).add(number)
        weak = "|".join(f"(?:{self._rules[number][0].regex})" for number in self._weak)
        self._any_weak = _compiled(Rule("all that is tried on every text", weak)) if weak else None
        self._keywords = ahocorasick.Automaton()
        for keyword, numbers in called.items():
            self._keywords.add_word(keyword, numbers)
        self._has_keywords = bool(called)
        if called:
            self._keywords.make_automaton()

    @property
    def expressions(self) -> tuple[str, ...]:
        """Every rule's expression, in RE2's syntax."""
        return tuple(rule.regex for rule, _ in self._rules)

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what the rules find, each to the end of the word that it is part of."""
        numbers: set[int] = set()
        if self._has_keywords:
            # Not lower(): the long s and the Kelvin sign match s and k where case is ignored.
            for _, called in self._keywords.iter(text.casefold()):
                numbers |= called
        data = text.encode("utf-8", "surrogatepass")
        if self._any_weak is not None and self._any_weak.search(data):
            numbers.update(self._weak)
        for number in sorted(numbers):
            rule, pattern = self._rules[number]
            byte = character = 0  # counted on from match to match, so that counting is linear too
            for match in pattern.finditer(data):
                start, end = match.span(rule.group)
                if start < end:
                    first = character + _characters(data, byte, start)
                    byte, character = end, first + _characters(data, start, end)
                    word = _WORD.match(text, character)
                    yield Finding(rule.name, first, word.end() if word else character)


def _characters(data: bytes, start: int, end: int) -> int:
    return len(data[start:end].decode("utf-8", "surrogatepass"))


_TELLING: Final = 3
_WORD: Final = re.compile(r"[A-Za-z0-9_]*")


def _compiled(rule: Rule) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False  # they would show the user's expression on stderr
    try:
        pattern = re2.compile(rule.regex.encode(), options)
    except re2.error:
        pattern = None
    if pattern is None:
        raise ConfigError(
            f"rule {rule.name!r} is not in RE2's syntax (no look-around, no back-references), so "
            "its time could not be bounded; it was not taken up and nothing was searched."
        )
    if not 0 <= rule.group <= pattern.groups:
        raise ConfigError(f"rule {rule.name!r} has no group {rule.group}; it was not taken up.")
    return pattern


def read_rules(source: str | Path) -> list[Rule]:
    """Return the rules of a file in the format of gitleaks.

    Of each rule, ``id``, ``regex``, ``secretGroup`` and ``keywords`` count. What takes findings
    back there (``entropy``, ``allowlist``) does not count here: in doubt it is a secret. Rules
    with a ``path`` and no ``regex`` are passed over, for no file is looked at.

    Raises:
        ConfigError: if the file cannot be read, has no rules, asks for rules of another file
            (``[extend]``), or a rule lacks what it needs.
    """
    failed, content = "", {}
    try:
        content = tomllib.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        failed = type(error).__name__
    if failed:  # out here, for the error may repeat what the file holds
        raise ConfigError(
            f"the rules in {str(source)!r} cannot be read ({failed}), so nothing was searched by "
            "them."
        )
    return _rules_of(content, str(source))


def _rules_of(content: dict[str, Any], source: str) -> list[Rule]:
    if "extend" in content:
        raise ConfigError(
            f"{source!r} extends rules that are not in it, so part of them would be missing; put "
            "all of them into one file."
        )
    entries = content.get("rules")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{source!r} has no [[rules]].")
    rules: list[Rule] = []
    for number, entry in enumerate(entries):
        known = entry if isinstance(entry, dict) else {}
        if "path" in known and "regex" not in known:
            continue
        name, regex = known.get("id"), known.get("regex")
        group, keywords = known.get("secretGroup", 0), known.get("keywords", [])
        if not (
            isinstance(name, str)
            and name
            and isinstance(regex, str)
            and regex
            and type(group) is int
            and isinstance(keywords, list)
            and all(isinstance(keyword, str) and keyword for keyword in keywords)
        ):
            raise ConfigError(
                f"rule {number} of {source!r} needs an id and a regex as text, a whole number as "
                "secretGroup and a list of texts as keywords."
            )
        rules.append(Rule(name, regex, group, tuple(keyword.casefold() for keyword in keywords)))
    return rules


@cache
def built_in_rules() -> RuleSet:
    """Return the rules of detect-secrets, and those of ``vendors.toml``."""
    vendors = tomllib.loads((files(__package__) / "vendors.toml").read_text(encoding="utf-8"))
    return RuleSet([*detect_secrets_rules(), *_rules_of(vendors, "vendors.toml")])


# Words of which every match of a plugin's expressions holds one. A plugin that is not named
# here, as one that a newer detect-secrets may bring, is tried on every text.
_KEYWORDS: Final = {
    "ArtifactoryDetector": ("akc", "ap"),
    "AWSKeyDetector": ("a3t", "abia", "acca", "akia", "asia", "aws"),
    "AzureStorageKeyDetector": ("accountkey=",),
    "CloudantDetector": ("cl",),
    "GitHubTokenDetector": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
    "GitLabTokenDetector": (
        "glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "gr1348941", "glcbt-", "glimt-", "glptt-",
        "glagent-", "gloas-",
    ),
    "IbmCloudIamDetector": ("key", "pwd", "pass", "token"),
    "IbmCosHmacDetector": ("secret",),
    "JwtTokenDetector": ("eyj",),
    "MailchimpDetector": ("-us",),
    "NpmDetector": ("_authtoken",),
    "OpenAIDetector": ("t3blbkfj",),
    "PrivateKeyDetector": ("private key", "putty-user-key-file"),
    "PypiTokenDetector": ("pypi-",),
    "SendGridDetector": ("sg.",),
    "SlackDetector": ("xox", "hooks.slack.com"),
    "SoftlayerDetector": ("sl", "softlayer"),
    "SquareOAuthDetector": ("sq0csp-",),
    "StripeDetector": ("k_live_",),
    "TelegramBotTokenDetector": (":",),
    "TwilioKeyDetector": ("ac", "sk"),
}  # fmt: skip
# How detect-secrets looks around, and what takes its place: less is asked for, or it is matched and
# stands outside of the group.
_LOOKS: Final = (
    (re.escape(r"(?:(?<=\W)|(?<=^))"), r"(?:\\W|^)"),
    (re.escape(r"(?!\w)"), ""),
    (r"\(\?!\[([^\]]+)\]\)\)", r")(?:[^\1]|$)"),
    (r",\d{4,}\}", ",}"),  # more than RE2 counts
)


def detect_secrets_rules() -> list[Rule]:
    """Return the regular expressions of detect-secrets; its guesses by entropy are left out."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.basic_auth import BasicAuthDetector
    from detect_secrets.plugins.ip_public import IPPublicDetector

    # Another rule finds more than its basic-auth rule, and addresses are personal data.
    left_out = (BasicAuthDetector, IPPublicDetector)
    kinds: list[type] = list(get_mapping_from_secret_type_to_class().values())
    rules = []
    for kind in kinds:
        if issubclass(kind, RegexBasedDetector) and not issubclass(kind, left_out):
            plugin = kind()
            name = plugin.secret_type.lower().replace(" ", "-")
            keywords = _KEYWORDS.get(kind.__name__, ())
            for pattern in plugin.denylist:
                regex = pattern.pattern
                for before, after in _LOOKS:
                    regex = re.sub(before, after, regex)
                group = int(pattern.groups == 1 and regex != pattern.pattern and "W|^" in regex)
                flags = "(?i)" if pattern.flags & re.IGNORECASE else ""
                rules.append(Rule(name, flags + regex, group, keywords))
    return rules
