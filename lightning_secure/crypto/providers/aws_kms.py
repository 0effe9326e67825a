"""A KEK in AWS Key Management Service, which it never leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, final

from lightning_secure.crypto.keys import DataKey, UnwrapDeniedError
from lightning_secure.crypto.providers.external import (
    ExternalKeyProvider,
    PathLike,
    bound_payload,
    import_extra,
    open_bound_payload,
    rejected,
    require_safe_url,
)
from lightning_secure.errors import ConfigError, KeyUnavailableError
from lightning_secure.util.fork_lock import ForkLock
from lightning_secure.util.validate import positive

_ARN: Final = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:key/[A-Za-z0-9-]+")
_REFUSALS: Final = ("InvalidCiphertextException", "IncorrectKeyException")
_ATTEMPTS: Final = 3
_NOISY: Final = ("botocore", "boto3", "urllib3")
_in_call: ContextVar[bool] = ContextVar("_in_call", default=False)


@final
class AwsKmsKeyProvider(ExternalKeyProvider):
    """Wraps keys under a symmetric key of AWS KMS.

    Args:
        key_arn: ARN of the key. An alias is refused: it can be pointed to another key.
        profile: Profile of the shared configuration; by default boto3 looks for credentials where
            it always does. They are refreshed by it and never kept here.
        endpoint_url: Another endpoint, for example of a VPC or of a test server.
        timeout: Seconds for one attempt to connect, and for one answer. There are at most three
            attempts.
        insecure_allow_http: Whether keys may cross a network in the clear. Plain http to this
            machine needs no permission.
        signing_key: File made by :meth:`SigningKey.generate`, for those who seal.
        trusted: Public signing keys of those who seal.
        derivation_key: File made by :meth:`create_derivation_key`.

    Raises:
        MissingExtraError: if boto3 is not installed.
        ConfigError: if an argument is wrong, or the endpoint would send keys in the clear.
        KeyUnavailableError: if the profile does not exist.

    One request wraps or unwraps one key. The context (purpose, dataset and partition) is the
    encryption context: KMS authenticates it, policies can require it, CloudTrail shows it.
    botocore logs whole messages at DEBUG level, keys included; during these requests it does not.

    >>> arn = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    >>> AwsKmsKeyProvider(key_arn=arn).key_id == arn  # AWS is asked at the first use
    True
    """

    def __init__(
        self,
        *,
        key_arn: str,
        profile: str | None = None,
        endpoint_url: str | None = None,
        timeout: float = 10.0,
        insecure_allow_http: bool = False,
        signing_key: PathLike | None = None,
        trusted: Sequence[PathLike] = (),
        derivation_key: PathLike | None = None,
    ) -> None:
        super().__init__(
            signing_key=signing_key,
            trusted=trusted,
            derivation_key=derivation_key,
            own={
                "key_arn": key_arn,
                "profile": profile,
                "endpoint_url": endpoint_url,
                "timeout": timeout,
                "insecure_allow_http": insecure_allow_http,
            },
        )
        if not _ARN.fullmatch(key_arn):
            raise ConfigError(
                "key_arn is not the ARN of a KMS key "
                "(arn:aws:kms:REGION:ACCOUNT:key/ID). An alias will not do: it can be pointed to "
                "another key."
            )
        positive(timeout=timeout)
        import_extra("boto3", extra="aws", user="AwsKmsKeyProvider")
        self._lock = ForkLock()
        self._clients: dict[int, Any] = {}
        self._client()

    @property
    def name(self) -> str:
        """``aws-kms``."""
        return "aws-kms"

    @property
    def key_id(self) -> str:
        """The key's ARN."""
        return str(self._arguments["key_arn"])

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        payload = bound_payload(key, context)
        return self._call("encrypt", "CiphertextBlob", context, Plaintext=payload)

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        if not 0 < len(blob) <= 6144:
            raise rejected(context, "its length is wrong")
        payload = self._call("decrypt", "Plaintext", context, CiphertextBlob=blob)
        return open_bound_payload(payload, context)

    def _call(
        self, operation: str, wanted: str, context: Mapping[str, str], **arguments: Any
    ) -> bytes:
        """Send one request; one field of its answer, or an error that holds nothing of either."""
        from botocore.exceptions import ClientError

        client = self._client()
        code, failure, answer = "", "", None
        try:
            with _unlogged():
                answer = getattr(client, operation)(
                    KeyId=self.key_id, EncryptionContext=dict(context), **arguments
                )[wanted]
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(error.response.get("Error", {}).get("Code"))
            failure = f"{code}, status {status}"
        except Exception as error:  # noqa: BLE001 # also an answer that botocore cannot parse
            failure = type(error).__name__
        # Raised outside the handlers: those errors may hold the request.
        if code in _REFUSALS:
            raise rejected(context, f"KMS answers {code}")
        if failure or not isinstance(answer, bytes):
            denied = operation == "decrypt" and code == "AccessDeniedException"
            raise (UnwrapDeniedError if denied else KeyUnavailableError)(
                f"AWS KMS did not answer for key {self.key_id!r} ({failure or 'another form'}). No "
                "key was released."
            )
        return answer

    def _client(self) -> Any:
        """Return this process's client; connections must not be shared across a fork."""
        with self._lock:
            if os.getpid() not in self._clients:
                self._clients = {os.getpid(): self._connect()}
            return self._clients[os.getpid()]

    def _connect(self) -> Any:
        import boto3.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        arguments = self._arguments
        region = _ARN.fullmatch(self.key_id)
        settings: dict[str, Any] = {
            "connect_timeout": arguments["timeout"],
            "read_timeout": arguments["timeout"],
            "retries": {"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        }
        failure, client = "", None
        try:
            session = boto3.session.Session(profile_name=arguments["profile"])
            options: dict[str, Any] = {
                "region_name": region[1] if region else None,
                "endpoint_url": arguments["endpoint_url"],
            }
            client = session.client("kms", **options, config=Config(**settings))
            # The environment and shared configuration can name an endpoint too.
            url = str(client.meta.endpoint_url)
            require_safe_url(
                url, name="endpoint_url", insecure_allow_http=arguments["insecure_allow_http"]
            )
            if url.startswith("http:"):  # a proxy would see all of it
                client = session.client("kms", **options, config=Config(**settings, proxies={}))
        except BotoCoreError as error:
            failure = type(error).__name__
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            failure = "endpoint_url is not a URL"
        if failure:
            raise KeyUnavailableError(
                f"no connection to AWS KMS could be set up for key {self.key_id!r} ({failure}). "
                "No key was released."
            )
        return client

    def __repr__(self) -> str:
        return f"AwsKmsKeyProvider(key_arn={self.key_id!r})"


class _NoBodies(logging.Filter):
    """Drops what botocore says at DEBUG level while a request of ours is on its way."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG or not _in_call.get()


_NO_BODIES: Final = _NoBodies()


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    # A filter of a parent logger does not see its children's records, so each gets it.
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _NOISY and isinstance(logger, logging.Logger):
            logger.addFilter(_NO_BODIES)
    token = _in_call.set(True)
    try:
        yield
    finally:
        _in_call.reset(token)
