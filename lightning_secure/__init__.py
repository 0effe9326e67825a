"""Private, confidential and accountable training for PyTorch Lightning.

The public names live here and are imported when they are used: ``import lightning_secure`` brings
in neither torch nor Lightning, MLflow or Opacus.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_secure._version import __version__

if TYPE_CHECKING:
    from lightning_secure.anonymize import (
        AnonymizationPlan,
        AnonymizationReport,
        Generalize,
        Keep,
        Pseudonymize,
        Pseudonyms,
        Redact,
        Suppress,
        Tokenize,
        Tokens,
    )
    from lightning_secure.audit.log import AuditLog, AuditSummary
    from lightning_secure.callbacks.audit_trail import AuditTrail
    from lightning_secure.callbacks.budget import PrivacyBudget
    from lightning_secure.callbacks.privacy_audit import PrivacyAudit
    from lightning_secure.callbacks.save_config import RedactingSaveConfigCallback
    from lightning_secure.crypto.keys import KeyProvider
    from lightning_secure.crypto.providers import (
        AwsKmsKeyProvider,
        EnvironmentSecret,
        FileSecret,
        HpkeKeyProvider,
        HpkePrivateKey,
        LocalKeyProvider,
        Pkcs11KeyProvider,
        SigningKey,
        VaultTransitKeyProvider,
    )
    from lightning_secure.data.datamodule import EncryptedDataModule
    from lightning_secure.data.erasure.erase import ErasureReport, erase_shard, erase_subject
    from lightning_secure.data.erasure.finish import finish_erasure
    from lightning_secure.data.format.columns import Column, Schema
    from lightning_secure.data.key_rotation.rotate import (
        add_recipient,
        remove_recipient,
        rotate_data,
        rotate_kek,
        rotate_partition,
    )
    from lightning_secure.data.manifests.garbage import collect_garbage
    from lightning_secure.data.reading.dataset import EncryptedShardDataset
    from lightning_secure.data.sources.arrow import Fill, Stack
    from lightning_secure.data.storage import CiphertextCache, RemoteStorage
    from lightning_secure.data.writing.ray_sink import EncryptedShardDatasink
    from lightning_secure.data.writing.seal import seal
    from lightning_secure.data.writing.split_rules import SplitByColumn, SplitByRatio
    from lightning_secure.data.writing.upload import upload_split
    from lightning_secure.data.writing.writer import EncryptedShardWriter
    from lightning_secure.loggers.mlflow import RedactingMLFlowLogger
    from lightning_secure.loggers.redacting import RedactingLogger
    from lightning_secure.metrics.membership import MembershipInferenceAdvantage
    from lightning_secure.metrics.private_means import PrivateAccuracy, PrivateMean
    from lightning_secure.plugins.checkpoint import (
        EncryptedCheckpointIO,
        load_encrypted_checkpoint,
    )
    from lightning_secure.plugins.hyperparameters import RedactingCheckpointIO
    from lightning_secure.privacy.accounting.carried_ledger import declare_public_weights
    from lightning_secure.privacy.auditing.one_run import OneRunAudit
    from lightning_secure.privacy.config import DPConfig
    from lightning_secure.privacy.gradients.clipping.rules import AdaptiveClipping, PerLayerClipping
    from lightning_secure.privacy.released.step_metrics import (
        ClippedFraction,
        GradientNorm,
        RowMean,
    )
    from lightning_secure.privacy.released.sums import PrivacyAccount
    from lightning_secure.redaction.artifacts.encrypted import decrypt_artifacts, open_artifact
    from lightning_secure.redaction.leak_search.search import CanaryHit, CanarySearch, WriteWatch
    from lightning_secure.redaction.logs import RedactingFilter
    from lightning_secure.redaction.mlflow_store.enforce import enforce_mlflow_redaction
    from lightning_secure.redaction.policy import RedactionPolicy
    from lightning_secure.redaction.redactor import Redactor
    from lightning_secure.strategies.ddp import PrivateDDPStrategy
    from lightning_secure.strategies.fsdp import PrivateFSDPStrategy
    from lightning_secure.strategies.private import PrivateStrategy
    from lightning_secure.strategies.registry import register_strategies

__all__ = [
    "AdaptiveClipping",
    "AnonymizationPlan",
    "AnonymizationReport",
    "AuditLog",
    "AuditSummary",
    "AuditTrail",
    "AwsKmsKeyProvider",
    "CanaryHit",
    "CanarySearch",
    "CiphertextCache",
    "ClippedFraction",
    "Column",
    "DPConfig",
    "EncryptedCheckpointIO",
    "EncryptedDataModule",
    "EncryptedShardDataset",
    "EncryptedShardDatasink",
    "EncryptedShardWriter",
    "EnvironmentSecret",
    "ErasureReport",
    "FileSecret",
    "Fill",
    "Generalize",
    "GradientNorm",
    "HpkeKeyProvider",
    "HpkePrivateKey",
    "Keep",
    "KeyProvider",
    "LocalKeyProvider",
    "MembershipInferenceAdvantage",
    "OneRunAudit",
    "PerLayerClipping",
    "Pkcs11KeyProvider",
    "PrivacyAccount",
    "PrivacyAudit",
    "PrivacyBudget",
    "PrivateAccuracy",
    "PrivateDDPStrategy",
    "PrivateFSDPStrategy",
    "PrivateMean",
    "PrivateStrategy",
    "Pseudonymize",
    "Pseudonyms",
    "Redact",
    "RedactingCheckpointIO",
    "RedactingFilter",
    "RedactingLogger",
    "RedactingMLFlowLogger",
    "RedactingSaveConfigCallback",
    "RedactionPolicy",
    "Redactor",
    "RemoteStorage",
    "RowMean",
    "Schema",
    "SigningKey",
    "SplitByColumn",
    "SplitByRatio",
    "Stack",
    "Suppress",
    "Tokenize",
    "Tokens",
    "VaultTransitKeyProvider",
    "WriteWatch",
    "__version__",
    "add_recipient",
    "collect_garbage",
    "declare_public_weights",
    "decrypt_artifacts",
    "enforce_mlflow_redaction",
    "erase_shard",
    "erase_subject",
    "finish_erasure",
    "load_encrypted_checkpoint",
    "open_artifact",
    "register_strategies",
    "remove_recipient",
    "rotate_data",
    "rotate_kek",
    "rotate_partition",
    "seal",
    "upload_split",
]

_HOMES = {
    "AdaptiveClipping": "privacy.gradients.clipping.rules",
    "AnonymizationPlan": "anonymize",
    "AnonymizationReport": "anonymize",
    "AuditLog": "audit.log",
    "AuditSummary": "audit.log",
    "AuditTrail": "callbacks.audit_trail",
    "AwsKmsKeyProvider": "crypto.providers",
    "CanaryHit": "redaction.leak_search.search",
    "CanarySearch": "redaction.leak_search.search",
    "CiphertextCache": "data.storage",
    "ClippedFraction": "privacy.released.step_metrics",
    "Column": "data.format.columns",
    "DPConfig": "privacy.config",
    "EncryptedCheckpointIO": "plugins.checkpoint",
    "EncryptedDataModule": "data.datamodule",
    "EncryptedShardDataset": "data.reading.dataset",
    "EncryptedShardDatasink": "data.writing.ray_sink",
    "EncryptedShardWriter": "data.writing.writer",
    "EnvironmentSecret": "crypto.providers",
    "ErasureReport": "data.erasure.erase",
    "FileSecret": "crypto.providers",
    "Fill": "data.sources.arrow",
    "Generalize": "anonymize",
    "GradientNorm": "privacy.released.step_metrics",
    "HpkeKeyProvider": "crypto.providers",
    "HpkePrivateKey": "crypto.providers",
    "Keep": "anonymize",
    "KeyProvider": "crypto.keys",
    "LocalKeyProvider": "crypto.providers",
    "MembershipInferenceAdvantage": "metrics.membership",
    "OneRunAudit": "privacy.auditing.one_run",
    "PerLayerClipping": "privacy.gradients.clipping.rules",
    "Pkcs11KeyProvider": "crypto.providers",
    "PrivacyAccount": "privacy.released.sums",
    "PrivacyAudit": "callbacks.privacy_audit",
    "PrivacyBudget": "callbacks.budget",
    "PrivateAccuracy": "metrics.private_means",
    "PrivateDDPStrategy": "strategies.ddp",
    "PrivateFSDPStrategy": "strategies.fsdp",
    "PrivateMean": "metrics.private_means",
    "PrivateStrategy": "strategies.private",
    "Pseudonymize": "anonymize",
    "Pseudonyms": "anonymize",
    "Redact": "anonymize",
    "RedactingCheckpointIO": "plugins.hyperparameters",
    "RedactingFilter": "redaction.logs",
    "RedactingLogger": "loggers.redacting",
    "RedactingMLFlowLogger": "loggers.mlflow",
    "RedactingSaveConfigCallback": "callbacks.save_config",
    "RedactionPolicy": "redaction.policy",
    "Redactor": "redaction.redactor",
    "RemoteStorage": "data.storage",
    "RowMean": "privacy.released.step_metrics",
    "Schema": "data.format.columns",
    "SigningKey": "crypto.providers",
    "SplitByColumn": "data.writing.split_rules",
    "SplitByRatio": "data.writing.split_rules",
    "Stack": "data.sources.arrow",
    "Suppress": "anonymize",
    "Tokenize": "anonymize",
    "Tokens": "anonymize",
    "VaultTransitKeyProvider": "crypto.providers",
    "WriteWatch": "redaction.leak_search.search",
    "add_recipient": "data.key_rotation.rotate",
    "collect_garbage": "data.manifests.garbage",
    "declare_public_weights": "privacy.accounting.carried_ledger",
    "decrypt_artifacts": "redaction.artifacts.encrypted",
    "enforce_mlflow_redaction": "redaction.mlflow_store.enforce",
    "erase_shard": "data.erasure.erase",
    "erase_subject": "data.erasure.erase",
    "finish_erasure": "data.erasure.finish",
    "load_encrypted_checkpoint": "plugins.checkpoint",
    "open_artifact": "redaction.artifacts.encrypted",
    "register_strategies": "strategies.registry",
    "remove_recipient": "data.key_rotation.rotate",
    "rotate_data": "data.key_rotation.rotate",
    "rotate_kek": "data.key_rotation.rotate",
    "rotate_partition": "data.key_rotation.rotate",
    "seal": "data.writing.seal",
    "upload_split": "data.writing.upload",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
