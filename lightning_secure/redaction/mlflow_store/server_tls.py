"""Tracking servers that are spoken to over TLS, or on this machine."""

from __future__ import annotations

import os
from typing import Any, Final
from urllib.parse import urlsplit

from lightning_secure.errors import ConfigError

#: Before the scheme of an address: ``secure+sqlite:///mlflow.db``.
PREFIX: Final = "secure+"
_LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY: Final = "*"
#: Hosts for which the caller passed insecure_allow_http=True.
_in_the_clear: Final[set[str | None]] = set()


def plain(uri: Any) -> Any:
    """Return an address without ``secure+`` before it; anything else as it is.

    >>> plain("secure+https://mlflow.example")
    'https://mlflow.example'
    """
    return uri.removeprefix(PREFIX) if isinstance(uri, str) else uri


def allow_http(uri: str | None = None) -> None:
    """Let the host of an address, or every host, be spoken to without TLS in this process."""
    _in_the_clear.add(_ANY if uri is None else urlsplit(plain(uri)).hostname)


def require_tls(uri: Any) -> None:
    """Refuse a server to which the line is open, or whose address holds credentials.

    Raises:
        ConfigError: if the server is on another host and spoken to without TLS or with an unchecked
            certificate, and this was not allowed; or if the address has a name or a password.

    >>> require_tls("https://mlflow.example")
    >>> require_tls("http://mlflow.example")
    Traceback (most recent call last):
    lightning_secure.errors.ConfigError: ...
    """
    parts = urlsplit(str(plain(uri)))
    if parts.scheme not in ("http", "https"):
        return
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the address of the tracking server at {parts.hostname!r} holds credentials, and "
            "addresses are shown and stored. Put them into MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN. Nothing was sent."
        )
    if parts.hostname in _LOCAL_HOSTS or not _in_the_clear.isdisjoint({_ANY, parts.hostname}):
        return
    if parts.scheme == "http":
        raise ConfigError(
            f"the tracking server at {parts.hostname!r} would be spoken to without TLS, and "
            "attackers on the network could read and change what is logged. Use https, or pass "
            "insecure_allow_http=True. Nothing was sent."
        )
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        raise ConfigError(
            "MLFLOW_TRACKING_INSECURE_TLS lets attackers on the network pose as the tracking "
            f"server at {parts.hostname!r}. Name its authority in MLFLOW_TRACKING_SERVER_CERT_PATH "
            "instead, or pass insecure_allow_http=True. Nothing was sent."
        )
