"""Key providers: who guards the key-encryption key, one file for each kind.

What a provider needs beyond this package, it imports when it is made.
"""

from __future__ import annotations

from lightning_secure.crypto.providers.aws_kms import AwsKmsKeyProvider
from lightning_secure.crypto.providers.hpke import HpkeKeyProvider, HpkePrivateKey
from lightning_secure.crypto.providers.identity import SigningKey
from lightning_secure.crypto.providers.local import LocalKeyProvider
from lightning_secure.crypto.providers.pkcs11 import Pkcs11KeyProvider
from lightning_secure.crypto.providers.secret_sources import EnvironmentSecret, FileSecret
from lightning_secure.crypto.providers.vault import VaultTransitKeyProvider

__all__ = [
    "AwsKmsKeyProvider",
    "EnvironmentSecret",
    "FileSecret",
    "HpkeKeyProvider",
    "HpkePrivateKey",
    "LocalKeyProvider",
    "Pkcs11KeyProvider",
    "SigningKey",
    "VaultTransitKeyProvider",
]
