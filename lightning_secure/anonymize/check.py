"""Looking at rows without sealing them: what a plan leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lightning_secure.anonymize.findings import Look
from lightning_secure.anonymize.identifying import identifying
from lightning_secure.anonymize.plan import AnonymizationPlan, BoundPlan, holds_text
from lightning_secure.anonymize.report import AnonymizationReport
from lightning_secure.anonymize.tally import Tally
from lightning_secure.crypto.keys import DataKey

#: Of numbers, one in a hundred has right check digits by chance.
_NUMBERS_SHARE: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class CheckedColumn:
    """The findings of a check in one column.

    Attributes:
        planned: The plan's rule for the column, or nothing.
        text: Whether it holds text, bytes or dates.
        found: In how many values each rule found something.
        inspected: How many values were looked at.
        identifying: What it seems to hold of a person by its name, or what its name itself is, such
            as an e-mail address where a table has no line of names; or nothing.
    """

    planned: str
    text: bool
    found: Mapping[str, int]
    inspected: int
    identifying: str

    @property
    def forgotten(self) -> bool:
        """Whether the column holds personal data or secrets and the plan does not name it."""
        least = 0 if self.text else _NUMBERS_SHARE * self.inspected
        telling = any(count > least for count in self.found.values())
        return not self.planned and (telling or bool(self.identifying))


class PlanCheck:
    """Looks at rows as a sealing with a plan would, and at all values of all columns.

    Args:
        plan: The plan that would be applied to the rows.

    Operators with keys get throw-away keys; nothing is written.

    >>> check = PlanCheck(AnonymizationPlan())
    >>> check.look({"contact": ["jo@clinic.example"]}, rows=1)
    >>> dict(check.columns["contact"].found), check.columns["contact"].forgotten
    ({'e-mail': 1}, True)
    """

    def __init__(self, plan: AnonymizationPlan) -> None:
        self._plan = plan
        operators = {name: operator.bind(_Throwaway()) for name, operator in plan.columns.items()}
        self._bound = BoundPlan(operators, plan=plan, glance=None)
        self._tally = Tally(plan)
        self._text: dict[str, bool] = {}

    def look(self, columns: Mapping[str, Sequence[Any]], *, rows: int) -> None:
        """Look at further rows.

        Raises:
            DataError: if a planned column is absent, or a value does not fit its operator.
        """
        applied = self._bound.run(columns, strict=False)
        self._tally.add(self._tally.prepared(columns, applied, rows=rows))
        for name, values in columns.items():
            self._text[name] = self._text.get(name, False) or _undecided(values)

    @property
    def report(self) -> AnonymizationReport:
        """The report that a sealing would make, with every value inspected."""
        return self._tally.report()

    @property
    def columns(self) -> dict[str, CheckedColumn]:
        """The findings of the check, by column."""
        done = self._plan.describe()
        return {
            name: CheckedColumn(
                planned=done.get(name, ""),
                text=self._text[name],
                found=column.found,
                inspected=column.inspected,
                identifying=identifying(name) or _in_name(name),
            )
            for name, column in self.report.columns.items()
        }


def _undecided(values: Sequence[Any]) -> bool:
    """Return whether sealing with a plan would want a word about a column."""
    if holds_text(values):
        return True
    first = values[0] if len(values) else None
    return hasattr(first, "isoformat")


def _in_name(name: str) -> str:
    """Return what a column's name itself is: names stand in the manifest in the clear."""
    return next(iter(sorted(Look("").inspected([name]).rules)), "")


class _Throwaway:
    """A source of keys for one look."""

    def __init__(self) -> None:
        self._key = DataKey.generate()

    def derive(self, purpose: str) -> DataKey:
        return self._key.subkey(purpose)
