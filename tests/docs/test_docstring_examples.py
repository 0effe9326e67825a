"""Each public name shows how it is used, in an example that the suite runs."""

from __future__ import annotations

import pytest

import lightning_secure

#: What an example of these would need: a token's library, a Ray cluster, a new MLflow database.
WITHOUT = {"Pkcs11KeyProvider", "EncryptedShardDatasink", "RedactingMLFlowLogger"}


@pytest.mark.parametrize("name", sorted({*lightning_secure.__all__} - WITHOUT - {"__version__"}))
def test_a_public_name_has_an_example(name):
    assert ">>> " in (getattr(lightning_secure, name).__doc__ or "")
