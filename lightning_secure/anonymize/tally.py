"""Adding up, row by row, what becomes the report of a sealing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_secure.anonymize.classes import ClassCount, Classes, Hashes, RowHash
from lightning_secure.anonymize.findings import Found
from lightning_secure.anonymize.operators import Suppress
from lightning_secure.anonymize.plan import AnonymizationPlan, Applied
from lightning_secure.anonymize.report import (
    AnonymizationReport,
    BeforeAndAfter,
    ColumnReport,
)


@dataclass(frozen=True)
class Prepared:
    """Some rows, prepared for the counts of :class:`Tally`.

    Attributes:
        rows: How many.
        found: By column.
        sides: Before and after: a hash of each row's class, and of its sensitive values.
    """

    rows: int
    found: Mapping[str, Found]
    sides: Sequence[tuple[Hashes, Sequence[Hashes]]]


class Tally:
    """Adds up what becomes a sealing's report.

    Args:
        plan: The plan that is applied to the rows.
    """

    def __init__(self, plan: AnonymizationPlan) -> None:
        self._plan = plan
        self._salt = os.urandom(16).hex()
        self._rows = 0
        self._found: dict[str, Found] = {}
        self._hash = RowHash()
        sensitive = len(plan.sensitive)
        self._before = Classes(sensitive=sensitive)
        self._after = Classes(sensitive=sensitive)

    def prepared(
        self, columns: Mapping[str, Sequence[Any]], applied: Applied, *, rows: int
    ) -> Prepared:
        """Return what :meth:`add` is given, once the rows are taken.

        Raises:
            DataError: if a column that should tell rows apart cannot.
        """
        sides = []
        for side in (columns, applied.columns) if self._plan.quasi_identifiers else ():
            named = [(n, side[n]) for n in self._plan.quasi_identifiers if n in side]
            classes = self._hash.rows(named, count=rows)
            values = [
                self._hash.rows([(n, side[n])] if n in side else [], count=rows)
                for n in self._plan.sensitive
            ]
            sides.append((classes, values))
        return Prepared(rows, applied.found, sides)

    def add(self, prepared: Prepared) -> None:
        """Count rows that were taken."""
        self._rows += prepared.rows
        for name, found in prepared.found.items():
            self._found.setdefault(name, Found()).add(found)
        for side, (classes, values) in zip(
            (self._before, self._after), prepared.sides, strict=False
        ):
            side.add(classes, values)

    def report(self, *, unseen: int = 0) -> AnonymizationReport:
        """Return what came of it so far, but for ``unseen`` more rows."""
        done = self._plan.describe()
        asked = bool(self._plan.quasi_identifiers)
        known = asked and not unseen
        return AnonymizationReport(
            salt=self._salt,
            rows=self._rows,
            unseen=unseen,
            columns={
                name: ColumnReport(
                    done=done.get(name, "nothing"),
                    inspected=found.inspected,
                    found=dict(sorted(found.rules.items())),
                )
                for name, found in self._found.items()
            },
            quasi_identifiers=self._plan.quasi_identifiers,
            k_anonymity=BeforeAndAfter(before=self._before.k, after=self._after.k)
            if known
            else None,
            l_diversity={
                name: BeforeAndAfter(
                    before=self._before.diversity(number),
                    after=ClassCount(least=None, exact=True)
                    if isinstance(self._plan.columns.get(name), Suppress)
                    else self._after.diversity(number),
                )
                for number, name in enumerate(self._plan.sensitive)
            }
            if known
            else {},
            unknown="rows that were sealed before an interruption were not looked at again"
            if unseen
            else "",
        )
