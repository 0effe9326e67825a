"""The anonymisation plan: a rule for each column, and the account of its application."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from lightning_secure.anonymize.findings import Found, Look
from lightning_secure.anonymize.operators import (
    Bound,
    Generalize,
    Keep,
    KeySource,
    Operator,
    Redact,
)
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.errors import ConfigError, DataError

#: Of a column that is dropped or replaced, and of numbers that the plan does not name, so many
#: values are looked at.
_GLANCE: Final = 256


@dataclass(frozen=True)
class AnonymizationPlan:
    """A plan of what is done to each column of a table before it is sealed.

    Attributes:
        columns: An operator for each named column.
        quasi_identifiers: Columns that could tell people apart when they are taken together, such
            as year of birth and postcode. The sealing's report says how many rows agree in all of
            them at least (k-anonymity), before and after.
        sensitive: Columns whose values must not be learnt about a person, such as a diagnosis. The
            report says how many different ones there are at least among rows that agree in all
            quasi-identifiers (l-diversity). Both count rows: a person with ten rows counts ten.

    Columns of numbers that the plan does not name are sealed as they are. A column of text or
    bytes that it does not name is refused: text is where identities hide, so the plan must say
    :class:`Keep` on purpose.

    Raises:
        ConfigError: if a column's rule is no operator, a column stands twice among the last two, or
            there are sensitive columns and no quasi-identifiers.

    >>> from lightning_secure import Suppress
    >>> AnonymizationPlan({"name": Suppress(), "zip": Generalize(prefix=2)}).describe()
    {'name': 'suppress', 'zip': 'generalize(prefix=2)'}
    """

    columns: Mapping[str, Operator] = field(default_factory=dict)
    quasi_identifiers: Sequence[str] = ()
    sensitive: Sequence[str] = ()

    def __post_init__(self) -> None:
        given: Any = self.columns
        rules = dict(given) if isinstance(given, Mapping) else {"": given}
        for name, rule in rules.items():
            if not (isinstance(name, str) and isinstance(rule, Operator)):
                shown = f" for {name!r}" if isinstance(name, str) and name else ""
                raise ConfigError(
                    "an AnonymizationPlan needs an operator for each name of a column, such as "
                    f"{{'age': Keep()}}, not a {type(rule).__name__}{shown}."
                )
        object.__setattr__(self, "columns", rules)  # which could be changed afterwards
        for what in ("quasi_identifiers", "sensitive"):
            names = getattr(self, what)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(
                    f"{what} of an AnonymizationPlan must be a sequence of column names."
                )
            object.__setattr__(self, what, tuple(names))
        both = (*self.quasi_identifiers, *self.sensitive)
        twice = next((name for name in both if both.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"an AnonymizationPlan has column {twice!r} twice among quasi_identifiers and "
                "sensitive: a column is one of them, and named once."
            )
        if self.sensitive and not self.quasi_identifiers:
            raise ConfigError(
                f"an AnonymizationPlan has the sensitive columns {list(self.sensitive)} and no "
                "quasi_identifiers, within whose classes their values are counted. Name some."
            )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a plan from a file with ``anonymize``, ``quasi_identifiers`` and ``sensitive``.

        They are the same as in the configuration of ``lightning-secure seal``, and there is
        nothing else in the file.

        Raises:
            ConfigError: if the file cannot be read, or is no plan. The message holds names of
                columns and no other value of the file.

        >>> path = folder / "plan.yaml"
        >>> _ = path.write_text("anonymize: {name: suppress, zip: {generalize: {prefix: 2}}}")
        >>> AnonymizationPlan.from_yaml(path).describe()
        {'name': 'suppress', 'zip': 'generalize(prefix=2)'}
        """
        from lightning_secure.anonymize.reading import read_plan

        return cls(*read_plan(Path(path)))

    def bind(self, keys: KeySource) -> BoundPlan:
        """Derive the keys that the operators need."""
        return BoundPlan(
            {name: operator.bind(keys) for name, operator in self.columns.items()}, plan=self
        )

    def describe(self) -> dict[str, str]:
        """Return column and operation, for the manifest."""
        return {name: operator.describe() for name, operator in self.columns.items()}

    def identity(self, source_id: str | None) -> str | None:
        """Return ``source_id`` with what decides the rows and is not in :meth:`describe`."""
        own = {}
        for name, operator in self.columns.items():
            if isinstance(operator, Redact) and operator != Redact():
                rules = b""
                if operator.extra_rules is not None and Path(operator.extra_rules).is_file():
                    rules = Path(operator.extra_rules).read_bytes()
                own[name] = [*operator.extra_patterns, hashlib.sha256(rules).hexdigest()]
        return canonical_json([source_id, own]).decode() if own and source_id else source_id


@dataclass(frozen=True)
class Applied:
    """Rows as they are to be sealed.

    Attributes:
        columns: By name.
        found: Findings of the detectors, by column, before anything was done.
    """

    columns: dict[str, Sequence[Any]]
    found: Mapping[str, Found]


class BoundPlan:
    """A plan with its keys.

    Args:
        operators: The function per column; None drops the column.
        plan: Where they come from.
        glance: How many values are looked at of a column that is dropped or replaced, but by a
            prefix, and of numbers that ``plan`` does not name; all of every other column.
    """

    def __init__(
        self,
        operators: Mapping[str, Bound | None],
        *,
        plan: AnonymizationPlan | None = None,
        glance: int | None = _GLANCE,
    ) -> None:
        self._operators = operators
        self.plan = plan or AnonymizationPlan()
        self._glance = glance
        self._seen: dict[str, int] = {}
        self._looks: dict[str, Look] = {}
        for name, rule in self.plan.columns.items():
            if isinstance(rule, Redact):  # rules that cannot be used are refused before any row
                self._look(name, rule)

    def apply(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Return the columns to seal.

        Args:
            columns: Equally long sequences of values by name.

        Raises:
            DataError: if a planned column is absent, a column of text is not in the plan, or a
                value does not fit its operator. Nothing was changed.

        >>> plan = AnonymizationPlan({"zip": Generalize(prefix=2)}).bind(keys)
        >>> plan.apply({"zip": ["10115", "80331"], "age": [34, 51]})
        {'zip': ['10', '80'], 'age': [34, 51]}
        """
        return self.run(columns).columns

    def run(self, columns: Mapping[str, Sequence[Any]], *, strict: bool = True) -> Applied:
        """Return the columns to seal, and what was found in them.

        Args:
            columns: Equally long sequences of values by name.
            strict: Whether text that the plan does not name is refused.

        Raises:
            DataError: if a planned column is absent, a column of text is not in the plan, or a
                value does not fit its operator.
        """
        wanted = {*self._operators, *self.plan.quasi_identifiers, *self.plan.sensitive}
        if missing := wanted - columns.keys():
            raise DataError(
                f"the anonymisation plan names {_quoted(missing)}, which the rows do not have: a "
                "renamed column would be sealed in the clear. Nothing of this call was sealed."
            )
        result: dict[str, Sequence[Any]] = {}
        found: dict[str, Found] = {}
        for name, values in columns.items():
            if name not in self._operators:
                if strict and holds_text(values):
                    raise DataError(
                        f"column {name!r} holds text and the anonymisation plan does not say what "
                        "to do with it; use Keep() if it may be sealed as it is. Nothing of this "
                        "call was sealed."
                    )
                result[name] = values
                found[name] = self._inspected(name, values, None)
                continue
            operator, rule = self._operators[name], self.plan.columns.get(name)
            if isinstance(rule, Keep):
                result[name], found[name] = values, self._inspected(name, values, rule)
                continue
            if operator is None:  # an array that is dropped need not become a list
                found[name] = self._inspected(name, values, rule)
                continue
            plain = values.tolist() if hasattr(values, "tolist") else values
            try:
                result[name] = [operator(value) for value in plain]
            except DataError as error:
                raise DataError(
                    f"column {name!r}: {error} Nothing of this call was sealed."
                ) from None
            if isinstance(rule, Redact):
                result[name], found[name] = self._look(name, rule).redacted(plain)
            else:
                found[name] = self._inspected(name, plain, rule)
        return Applied(result, found)

    def _inspected(self, name: str, values: Sequence[Any], rule: Operator | None) -> Found:
        # The part of a text that may be sealed; a part of a number identifies no person.
        prefix = isinstance(rule, Generalize) and rule.prefix is not None
        whole = prefix or isinstance(rule, Keep) or (rule is None and holds_text(values))
        if not whole and self._glance is not None:
            left = self._glance - self._seen.get(name, 0)
            if left <= 0:
                return Found()
            values = values[:left]
        found = self._look(name, rule).inspected(values)
        self._seen[name] = self._seen.get(name, 0) + found.inspected
        return found

    def _look(self, name: str, rule: Operator | None) -> Look:
        if name not in self._looks:
            own = rule if isinstance(rule, Redact) else Redact()
            self._looks[name] = Look(
                name, extra_patterns=own.extra_patterns, extra_rules=own.extra_rules
            )
        return self._looks[name]


def holds_text(values: Sequence[Any]) -> bool:
    """Return whether a column has text or bytes in it.

    >>> holds_text([None, "left ear"]), holds_text([1, 2.5])
    (True, False)
    """
    # Arrays and tensors of numbers say so by their dtype and need not be walked.
    dtype = str(getattr(values, "dtype", "object")).lstrip("<>|=")
    return dtype.startswith(("object", "U", "S", "str")) and any(
        isinstance(value, str | bytes) for value in values
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
