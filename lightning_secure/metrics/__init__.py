"""torchmetrics about privacy, and torchmetrics that keep it."""

from __future__ import annotations

from lightning_secure.metrics.membership import MembershipInferenceAdvantage, membership_advantage
from lightning_secure.metrics.private_means import PrivateAccuracy, PrivateMean

__all__ = [
    "MembershipInferenceAdvantage",
    "PrivateAccuracy",
    "PrivateMean",
    "membership_advantage",
]
