"""Plans as they stand in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from lightning_secure.anonymize.keyed import Pseudonymize, Tokenize
from lightning_secure.anonymize.operators import (
    Generalize,
    Keep,
    Operator,
    Redact,
    Suppress,
)
from lightning_secure.errors import ConfigError
from lightning_secure.util.yaml_config import known, parsed, typed

#: The keys of a file that make up a plan.
PLAN_KEYS: Final = ("anonymize", "quasi_identifiers", "sensitive")
_PLAIN: Final[Mapping[str, Operator]] = {"keep": Keep(), "suppress": Suppress(), "redact": Redact()}
_KEYED: Final[Mapping[str, type[Pseudonymize] | type[Tokenize]]] = {
    "pseudonymize": Pseudonymize,
    "tokenize": Tokenize,
}
_NAMES: Final = ("keep", "suppress", "redact", "generalize", *_KEYED)


class PlanRules(NamedTuple):
    """The parts of a plan."""

    columns: dict[str, Operator]
    quasi_identifiers: Sequence[str]
    sensitive: Sequence[str]


def plan_rules(config: Mapping[str, Any], *, what: str) -> PlanRules:
    """Return what a configuration says of a plan.

    Args:
        config: Its keys are some of ``PLAN_KEYS``.
        what: Names it in errors.

    Raises:
        ConfigError: if the configuration has other keys, or a rule is malformed.
    """
    known(dict(config), set(PLAN_KEYS), what)
    rules = typed(config.get("anonymize", {}), dict, "anonymize")
    return PlanRules(
        {name: _operator(name, rule) for name, rule in rules.items()},
        quasi_identifiers=typed(config.get("quasi_identifiers", []), list, "quasi_identifiers"),
        sensitive=typed(config.get("sensitive", []), list, "sensitive"),
    )


def read_plan(path: Path) -> PlanRules:
    """Return what a file of YAML says of a plan.

    Raises:
        ConfigError: if the file cannot be read, or is no plan.
    """
    return plan_rules(parsed(path), what="the plan")


def _operator(name: Any, rule: Any) -> Operator:
    name = typed(name, str, "the name of a column in anonymize")
    if isinstance(rule, str) and rule in _PLAIN:
        return _PLAIN[rule]
    names = {*_KEYED, "generalize", "redact"}
    fields = known(rule, names, f"anonymize: {name}") if isinstance(rule, dict) else {}
    if len(fields) == 1:
        ((kind, value),) = fields.items()
        what = f"anonymize: {name}: {kind}"
        if kind == "generalize":
            return Generalize(**known(value, {"date", "prefix", "width", "bins"}, what))
        if kind == "redact":
            options = known(value, {"extra_patterns", "extra_rules"}, what)
            patterns = typed(options.get("extra_patterns", []), list, f"{what}: extra_patterns")
            rules = options.get("extra_rules")
            return Redact(
                extra_patterns=tuple(typed(pattern, str, what) for pattern in patterns),
                extra_rules=None if rules is None else typed(rules, str, f"{what}: extra_rules"),
            )
        if isinstance(value, str):
            return _KEYED[kind](domain=value)
        options = known(value, {"domain", "generation"}, what)
        return _KEYED[kind](
            domain=typed(options.get("domain"), str, f"{what}: domain"),
            generation=typed(options.get("generation", 1), int, f"{what}: generation"),
        )
    raise ConfigError(f"anonymize: {name}: the rule must be one of {', '.join(_NAMES)}.")
