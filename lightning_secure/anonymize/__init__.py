"""Anonymisation of identifying columns before a row is encrypted, and the report of it.

Encryption hides rows from readers without the key; it does nothing against the key's holders.
Columns that training does not need, or does not need in full, are changed before they are sealed.
"""

from __future__ import annotations

from lightning_secure.anonymize.keyed import (
    Pseudonymize,
    Pseudonyms,
    Tokenize,
    Tokens,
)
from lightning_secure.anonymize.operators import (
    Bound,
    Generalize,
    Keep,
    KeySource,
    Operator,
    Redact,
    Suppress,
)
from lightning_secure.anonymize.plan import AnonymizationPlan, BoundPlan
from lightning_secure.anonymize.report import AnonymizationReport

__all__ = [
    "AnonymizationPlan",
    "AnonymizationReport",
    "Bound",
    "BoundPlan",
    "Generalize",
    "Keep",
    "KeySource",
    "Operator",
    "Pseudonymize",
    "Pseudonyms",
    "Redact",
    "Suppress",
    "Tokenize",
    "Tokens",
]
