"""What tests of tracking share: what must not be found, and whose warnings are not ours."""

from __future__ import annotations

import pytest

PASSWORD, ADDRESS, TOKEN = "Wintergreen-90210", "mary.q@clinic.example", "AKIAIOSFODNN7EXAMPLE"
CANARIES = {"password": PASSWORD, "address": ADDRESS, "token": TOKEN}

#: Of MLflow, TensorBoard and what they are built on, not used by this package's own code.
WARNINGS_OF_OTHERS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
