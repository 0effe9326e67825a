"""The report of an anonymisation: findings, operators, k-anonymity before and after."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from lightning_secure.anonymize.classes import ClassCount
from lightning_secure.crypto.attributes import ENCRYPTED
from lightning_secure.crypto.encoding import canonical_json, parse_json_object
from lightning_secure.errors import IntegrityError

#: The split's attributes in the manifest: the report, for readers of the split, and its digest.
REPORT_ATTRIBUTE: Final = f"{ENCRYPTED}anonymization.report"
REPORT_DIGEST: Final = "anonymization.report.sha256"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class ColumnReport:
    """The report of one column.

    Attributes:
        done: The operator, as :meth:`Operator.describe` says it; ``nothing`` if the plan does not
            name the column.
        inspected: How many values the detectors looked at.
        found: In how many of them each rule found something before anything was done.
    """

    done: str
    inspected: int
    found: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class BeforeAndAfter:
    """A figure of the rows as they came, and as they were sealed.

    Attributes:
        before: As they came.
        after: As they were sealed.
    """

    before: ClassCount
    after: ClassCount


@dataclass(frozen=True, kw_only=True)
class AnonymizationReport:
    """The findings in a split's rows, and what its sealing did to them. No value of a row.

    Attributes:
        rows: How many were looked at.
        unseen: How many more were sealed before an interruption and not looked at again. Unless it
            is 0, nothing is known of these, and :attr:`k_anonymity` and :attr:`l_diversity` are
            not known at all.
        columns: By name, in the order of the rows' columns.
        quasi_identifiers: The columns that could tell people apart together.
        k_anonymity: Rows in the smallest class of those who agree in all quasi-identifiers; None
            if none are declared, or it cannot be known, see :attr:`unknown`.
        l_diversity: By sensitive column, different values in the class that has fewest.
        unknown: Why figures of all rows are missing, or empty.
        salt: 32 random digits, so that no guess of the report can be tested against its digest.

    The figures are of the rows at the time of the sealing. Rows erased later take the cover of
    others away.

    >>> from lightning_secure import AnonymizationPlan, Generalize, seal
    >>> plan = AnonymizationPlan({"zip": Generalize(prefix=1)}, quasi_identifiers=["zip"])
    >>> sealed = seal({"zip": ["10115", "10999"]}, folder / "data", keys=keys, anonymize=plan)
    >>> report = sealed.reports["train"]
    >>> report.rows, report.k_anonymity.before.least, report.k_anonymity.after.least
    (2, 1, 2)
    """

    rows: int
    unseen: int = 0
    columns: Mapping[str, ColumnReport] = field(default_factory=dict)
    quasi_identifiers: Sequence[str] = ()
    k_anonymity: BeforeAndAfter | None = None
    l_diversity: Mapping[str, BeforeAndAfter] = field(default_factory=dict)
    unknown: str = ""
    salt: str = field(default_factory=lambda: os.urandom(16).hex())

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "version": _VERSION,
            "salt": self.salt,
            "rows": self.rows,
            "unseen": self.unseen,
            "unknown": self.unknown,
            "columns": [
                {
                    "name": name,
                    "done": column.done,
                    "inspected": column.inspected,
                    "found": dict(column.found),
                }
                for name, column in self.columns.items()
            ],
            "quasi_identifiers": list(self.quasi_identifiers),
            "k_anonymity": None if self.k_anonymity is None else _figures(self.k_anonymity),
            "l_diversity": {name: _figures(of) for name, of in self.l_diversity.items()},
        }

    @property
    def attributes(self) -> dict[str, str]:
        """Return it and its digest as remarks of a split, see :class:`EncryptedShardWriter`."""
        return {REPORT_ATTRIBUTE: self.text, REPORT_DIGEST: self.digest}

    @classmethod
    def of(cls, attributes: Mapping[str, str]) -> Self | None:
        """Return the report in :attr:`EncryptedShardDataset.attributes`; None if there is none.

        Raises:
            IntegrityError: if the report is not the one whose digest stands beside it, or either is
                missing.
        """
        text = attributes.get(REPORT_ATTRIBUTE.removeprefix(ENCRYPTED), "")
        digest = attributes.get(REPORT_DIGEST, "")
        return cls.parse(text, digest=digest) if text or digest else None

    @property
    def text(self) -> str:
        """The canonical JSON, which :attr:`digest` is of."""
        return canonical_json(self.to_json()).decode()

    @property
    def digest(self) -> str:
        """SHA-256 of :attr:`text`, in hexadecimal: what stands in the signed manifest."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str | bytes, *, digest: str | None = None) -> Self:
        """Read :attr:`text` again.

        Args:
            text: The canonical JSON.
            digest: The digest in the manifest, to be compared.

        Raises:
            IntegrityError: if the text is no report, or not the one with this digest.

        >>> report = AnonymizationReport(rows=3)
        >>> AnonymizationReport.parse(report.text, digest=report.digest) == report
        True
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        value = parse_json_object(data, what="a report of an anonymisation", canonical=True)
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(
                "the report of an anonymisation is not the one that the manifest names. Nothing of "
                "it was used."
            )
        report: Self | None = None
        try:
            if value["version"] == _VERSION:
                report = cls(
                    rows=value["rows"],
                    unseen=value["unseen"],
                    unknown=value["unknown"],
                    salt=value["salt"],
                    columns={
                        column["name"]: ColumnReport(
                            done=column["done"],
                            inspected=column["inspected"],
                            found=dict(column["found"]),
                        )
                        for column in value["columns"]
                    },
                    quasi_identifiers=tuple(value["quasi_identifiers"]),
                    k_anonymity=_parsed(value["k_anonymity"]) if value["k_anonymity"] else None,
                    l_diversity={n: _parsed(of) for n, of in value["l_diversity"].items()},
                )
        except (KeyError, TypeError, ValueError, AttributeError):
            report = None
        if report is None or report.to_json() != value:
            raise IntegrityError(
                "the report of an anonymisation has a form or version that cannot be read. Nothing "
                "of it was used."
            )
        return report

    @classmethod
    def together(cls, reports: Sequence[AnonymizationReport], *, unknown: str) -> Self:
        """Return the report of several parts of one split; ``unknown`` says why k and l are not."""
        columns: dict[str, ColumnReport] = {}
        for report in reports:
            for name, column in report.columns.items():
                before = columns.get(name, ColumnReport(done=column.done, inspected=0, found={}))
                found = Counter(before.found) + Counter(column.found)
                columns[name] = ColumnReport(
                    done=column.done,
                    inspected=before.inspected + column.inspected,
                    found=dict(sorted(found.items())),
                )
        asked = any(report.quasi_identifiers for report in reports)
        return cls(
            rows=sum(report.rows for report in reports),
            unseen=sum(report.unseen for report in reports),
            columns=columns,
            quasi_identifiers=reports[0].quasi_identifiers,
            unknown=unknown if asked else "",
        )


def _figures(figure: BeforeAndAfter) -> dict[str, Any]:
    return {
        when: {"least": count.least, "exact": count.exact}
        for when, count in (("before", figure.before), ("after", figure.after))
    }


def _parsed(value: Mapping[str, Any]) -> BeforeAndAfter:
    before, after = (
        ClassCount(least=value[when]["least"], exact=value[when]["exact"])
        for when in ("before", "after")
    )
    return BeforeAndAfter(before=before, after=after)
