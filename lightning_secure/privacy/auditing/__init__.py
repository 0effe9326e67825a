"""Attacks that bound epsilon from below: a claim that is too small is disproved.

:func:`canary_audit` attacks the parts that every private run is made of, many times and seeing all
that is released; :class:`OneRunAudit` attacks one real job by what became of its weights.
"""

from __future__ import annotations

from lightning_secure.privacy.auditing.audit_report import AuditReport
from lightning_secure.privacy.auditing.one_run import OneRunAudit
from lightning_secure.privacy.auditing.white_box import AttackedRun, CanaryRun, canary_audit

__all__ = ["AttackedRun", "AuditReport", "CanaryRun", "OneRunAudit", "canary_audit"]
