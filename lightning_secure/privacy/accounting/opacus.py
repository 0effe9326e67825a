"""Opacus' accountants, by name: what ``PrivacyEngine(accountant=...)`` would have reported.

Source:
    Gopi et al. 2021, arXiv:2106.02848 (PRV). Bu et al. 2020, arXiv:1911.11607 (GDP).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Final

from lightning_secure.errors import PrivacyError
from lightning_secure.privacy.accounting.mechanism import Release, merged

_PREFIX: Final = "opacus-"


def epsilon_by_opacus(accountant: str, releases: Sequence[Release], *, delta: float) -> float:
    """Return the epsilon of all releases together, with the settings that Opacus uses by itself.

    Args:
        accountant: ``opacus-rdp``, ``opacus-prv`` or ``opacus-gdp``. PRV is at most 0.01 above the
            true epsilon. GDP is an approximation and can lie below it.
        releases: The releases; without any, epsilon is zero.
        delta: Between 0 and 1.

    Raises:
        PrivacyError: if Opacus cannot account for these releases.

    >>> round(epsilon_by_opacus("opacus-rdp", [Release(4.0, 0.01, 10_000)], delta=1e-5), 4)
    1.0355
    """
    from opacus.accountants import create_accountant

    history = [(noise, rate, steps) for (noise, rate), steps in merged(releases).items()]
    if not history:
        return 0.0
    if any(noise == 0 for noise, _, _ in history):
        return math.inf
    if accountant == "opacus-gdp" and len(history) > 1:
        raise PrivacyError(
            "Opacus' GDP accountant cannot add up steps of different noise or sampling rate, and "
            f"there are {len(history)} kinds. Use another one; the ledger itself is intact."
        )
    epsilon = math.nan
    # That GDP can be too small, or that an RDP order is the last of its list, is said in our docs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opacus = create_accountant(accountant.removeprefix(_PREFIX))
            opacus.history = history
            epsilon = float(opacus.get_epsilon(delta=delta))
        except (ValueError, RuntimeError, ArithmeticError, MemoryError):
            epsilon = math.nan
    if math.isnan(epsilon) or epsilon < 0:
        raise PrivacyError(
            f"accountant {accountant!r} has no answer for these {len(history)} kinds of steps at "
            f"delta {delta:g}. Use 'pld'; the ledger itself is intact."
        )
    return epsilon
