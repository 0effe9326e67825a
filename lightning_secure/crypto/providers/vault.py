"""A KEK in the transit engine of HashiCorp Vault or OpenBao, which it never leaves."""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

from lightning_secure.crypto.encoding import b64encode
from lightning_secure.crypto.keys import DataKey, UnwrapDeniedError, associated_data
from lightning_secure.crypto.providers.external import (
    ExternalKeyProvider,
    PathLike,
    bound_payload,
    import_extra,
    open_bound_payload,
    rejected,
    require_safe_url,
)
from lightning_secure.crypto.providers.secret_sources import (
    EnvironmentSecret,
    SecretSource,
    read_secret,
)
from lightning_secure.errors import ConfigError, KeyUnavailableError
from lightning_secure.util.validate import positive

_TOKEN: Final = EnvironmentSecret("VAULT_TOKEN")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PATH: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_CIPHERTEXT: Final = re.compile(rb"vault:v[1-9][0-9]{0,8}:([A-Za-z0-9+/]+={0,2})")
#: How the server begins to say that a ciphertext is not one of this key and context.
_REFUSALS: Final = ("cipher: message authentication failed", "invalid ciphertext")
_STATUS: Final = {
    "InvalidRequest": "400; does the key exist, and is its version still allowed?",
    "Unauthorized": "401",
    "Forbidden": "403; the token has expired, or its policy does not allow this",
    "InvalidPath": "404; is the transit engine mounted there?",
    "RateLimitExceeded": "429",
    "InternalServerError": "500",
    "BadGateway": "502",
    "VaultDown": "503; it is sealed or down",
}
_ATTEMPTS: Final = 3
_RETRIED: Final = (429, 502, 503, 504)


@final
class VaultTransitKeyProvider(ExternalKeyProvider):
    """Wraps keys under a key of a transit engine.

    Args:
        url: The server, for example ``https://vault.example:8200``.
        key: Name of a key of type ``aes256-gcm96``, not derived and not exportable. Grant
            ``update`` on ``encrypt/KEY`` and ``decrypt/KEY``, and not ``create``, with which a
            misspelt name would make a new key.
        mount: Where the transit engine is mounted.
        token: Returns the token, and is asked at each call, so that it can be renewed:
            :class:`EnvironmentSecret` (by default of ``VAULT_TOKEN``), :class:`FileSecret` or a
            function.
        namespace: The server's namespace, if it has any.
        ca_file: Certificates that may vouch for the server, instead of the system's.
        timeout: Seconds for one attempt to connect, and for one answer. There are at most three
            attempts: a server that cannot be reached, or answers 429, 502, 503 or 504, is asked
            again.
        insecure_allow_http: Whether keys and token may cross a network in the clear. Plain http to
            this machine needs no permission.
        signing_key: File made by :meth:`SigningKey.generate`, for those who seal.
        trusted: Public signing keys of those who seal.
        derivation_key: File made by :meth:`create_derivation_key`.

    Raises:
        MissingExtraError: if hvac is not installed.
        ConfigError: if an argument is wrong, or the URL would send keys in the clear.

    One request wraps or unwraps one key, with the context as associated data. Redirects are not
    followed: the token would go along.

    >>> keys = VaultTransitKeyProvider(url="https://vault.example:8200", key="training")
    >>> keys.name, keys.key_id  # Vault is asked at the first use
    ('vault-transit', 'transit/training')
    """

    _secret = ("token", "the token")

    def __init__(
        self,
        *,
        url: str,
        key: str,
        mount: str = "transit",
        token: SecretSource = _TOKEN,
        namespace: str | None = None,
        ca_file: PathLike | None = None,
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
                "url": url,
                "key": key,
                "mount": mount,
                "token": token,
                "namespace": namespace,
                "ca_file": os.fspath(ca_file) if ca_file is not None else None,
                "timeout": timeout,
                "insecure_allow_http": insecure_allow_http,
            },
        )
        require_safe_url(url, name="url", insecure_allow_http=insecure_allow_http)
        positive(timeout=timeout)
        if not _NAME.fullmatch(key):
            raise ConfigError("key is not the name of a transit key.")  # perhaps it is the token
        for name, path in (("mount", mount), ("namespace", namespace)):
            if path is not None and not _PATH.fullmatch(path):
                raise ConfigError(f"{name} is not a path of a Vault server.")
        self._hvac = import_extra("hvac", extra="vault", user="VaultTransitKeyProvider")
        self._key_id = "/".join(part for part in (namespace, mount, key) if part)

    @property
    def name(self) -> str:
        """``vault-transit``."""
        return "vault-transit"

    @property
    def key_id(self) -> str:
        """Namespace, mount and name of the key. Its version is part of each wrapped key."""
        return self._key_id

    def _wrap(self, key: DataKey, context: Mapping[str, str]) -> bytes:
        answer = self._call(
            "encrypt_data", context, plaintext=b64encode(bound_payload(key, context))
        )
        blob = str(answer.get("ciphertext")).encode()
        if not _is_ciphertext(blob):
            raise self._failed("an answer without a ciphertext")
        return blob

    def _unwrap(self, blob: bytes, context: Mapping[str, str]) -> DataKey:
        if not _is_ciphertext(blob):
            raise rejected(context, "it is not a ciphertext of a transit engine")
        answer = self._call("decrypt_data", context, ciphertext=blob.decode())
        text, payload = answer.get("plaintext"), None
        with contextlib.suppress(binascii.Error):
            payload = base64.b64decode(text, validate=True) if isinstance(text, str) else None
        if payload is None:
            raise self._failed("an answer without a plaintext")
        return open_bound_payload(payload, context)

    def _call(self, operation: str, context: Mapping[str, str], **arguments: str) -> dict[str, Any]:
        """Send one request; its answer's data, or an error that holds nothing of either."""
        token = read_secret(self._arguments["token"], what="the Vault token")
        failure, refused, denied, answer = "", False, False, None
        with self._session() as session:
            client = self._hvac.Client(
                url=self._arguments["url"],
                token=token,
                namespace=self._arguments["namespace"],
                timeout=self._arguments["timeout"],
                session=session,
                allow_redirects=False,
            )
            try:
                answer = getattr(client.secrets.transit, operation)(
                    self._arguments["key"],
                    mount_point=self._arguments["mount"],
                    associated_data=b64encode(associated_data(context)),
                    **arguments,
                )
            except self._hvac.exceptions.VaultError as error:
                kind = type(error).__name__
                failure = f"status {_STATUS.get(kind, kind)}"
                denied = kind == "Forbidden" and operation == "decrypt_data"
                told = error.errors if isinstance(error.errors, list) else []
                refused = any(str(text).startswith(_REFUSALS) for text in told)
            except Exception as error:  # noqa: BLE001 # also an answer that hvac cannot parse
                failure = type(error).__name__
        # Raised outside the handlers: those errors hold the request, with the token in it.
        if refused:
            raise rejected(context, "the server cannot authenticate it")
        if failure:
            raise self._failed(failure, UnwrapDeniedError if denied else KeyUnavailableError)
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise self._failed("an answer of another form")
        return data

    def _session(self) -> Any:
        """Return a session of requests for one call, so that nothing outlives it."""
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        session = requests.Session()
        session.verify = self._arguments["ca_file"] or True
        retries = Retry(
            total=_ATTEMPTS - 1,
            redirect=0,
            allowed_methods=None,
            status_forcelist=_RETRIED,
            backoff_factor=0.2,
            respect_retry_after_header=False,
            raise_on_status=False,
        )
        adapter = HTTPAdapter(max_retries=retries)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        if self._arguments["url"].startswith("http:"):
            session.trust_env = False  # a proxy would see all of it
        return session

    def _failed(
        self, reason: str, kind: type[KeyUnavailableError] = KeyUnavailableError
    ) -> KeyUnavailableError:
        return kind(
            f"Vault at {self._arguments['url']!r} did not answer for key {self._key_id!r} "
            f"({reason}). No key was released."
        )

    def __repr__(self) -> str:
        url, key = self._arguments["url"], self._key_id
        return f"VaultTransitKeyProvider(url={url!r}, key_id={key!r})"


def _is_ciphertext(blob: bytes) -> bool:
    """Tell whether it is one, in the only form that encodes its bytes."""
    match = _CIPHERTEXT.fullmatch(blob)
    if match is None or len(match[1]) % 4:
        return False
    return base64.b64encode(base64.b64decode(match[1])) == match[1]
