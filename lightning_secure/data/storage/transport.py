"""TLS only: checks before a storage is asked for anything, and while it is.

Shards are ciphertext, so a listener on the line reads no row. What TLS protects are the credentials
of the storage, and which rows are read when.
"""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from lightning_secure.errors import ConfigError

S3: Final = frozenset({"s3", "s3a"})
#: Protocols that never leave this machine, or leave it as a mounted folder.
_LOCAL: Final = frozenset({"memory", "file", "local"})
#: Protocols that speak TLS unless an option, or the environment, tells them otherwise.
_TLS: Final = S3 | {"https", "gs", "gcs", "az", "abfs", "abfss"}
_ENVIRONMENT: Final = {
    **dict.fromkeys(S3, ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "FSSPEC_S3_ENDPOINT_URL")),
    **dict.fromkeys(("gs", "gcs"), ("STORAGE_EMULATOR_HOST",)),
}
#: Options that turn TLS, or the check of the certificate, off when they are false.
_SWITCHES: Final = frozenset(
    {"check_hostname", "secure", "ssl", "tls", "use_ssl", "use_tls", "verify", "verify_ssl"}
)
#: Options that hold no credential whatever their value.
_HARMLESS: Final = frozenset(
    {
        "addressing_style",
        "anon",
        "client_kwargs",
        "config_kwargs",
        "connect_timeout",
        "endpoint_url",
        "max_pool_connections",
        "profile",
        "read_timeout",
        "region_name",
        "requester_pays",
        "s3",
        "use_ssl",
        "verify",
        "version_aware",
    }
)
_SENTINEL: Final = object()


def check_url(url: str, *, insecure_allow_http: bool) -> str:
    """Return the protocol of an fsspec URL.

    Raises:
        ConfigError: if the URL holds credentials, chains protocols, or does not speak TLS. The
            message does not repeat the URL.
    """
    protocol, _, rest = url.partition("://")
    protocol = protocol.lower()
    if "::" in url:
        raise ConfigError(
            "a chained URL such as simplecache::s3://... is not accepted: its copies would not be "
            "checked. Pass cache=CiphertextCache(...). Nothing was opened."
        )
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise ConfigError(
            "the URL of a dataset holds neither credentials nor a query, because it appears in "
            "errors and logs. Pass storage_options. Nothing was opened."
        )
    if protocol in _LOCAL | _TLS or insecure_allow_http:
        return protocol
    if protocol == "http" and _loopback(urlsplit(url).hostname):
        return protocol
    raise ConfigError(
        f"{protocol}:// is not known to speak TLS: others on the line could take the storage's "
        "credentials and see which rows are read. Nothing was opened. Use one of "
        f"{', '.join(sorted(_LOCAL | _TLS))}, or RemoteStorage(..., insecure_allow_http=True)."
    )


def insecure_options(protocol: str, options: Mapping[str, Any]) -> str | None:
    """Return the name of an option or variable that would turn TLS off, or None.

    An ``http://`` endpoint on this machine itself is no such option.
    """
    for name in _ENVIRONMENT.get(protocol, ()):
        value = os.environ.get(name, "")
        if _plain_http(value if "://" in value or not value else f"http://{value}"):
            return name
    for name, value in _walk(options):
        key = name.rpartition(".")[2]
        if key in _SWITCHES and _false(value):
            return name
        if isinstance(value, str) and "proxies" not in name and _plain_http(value):
            return name  # a proxy only relays the TLS that is spoken through it
    return None


def secret_options(options: Mapping[str, Any]) -> list[str]:
    """Return the names of options that may hold credentials: all that are not known not to."""
    return sorted(
        name
        for name, value in _walk(options)
        if not set(name.split(".")) <= _HARMLESS or not isinstance(value, _Plain)
    )


_Plain: Final = (str, int, float, bool, type(None))


@functools.cache
def direct_session() -> type[Any]:
    """Return a class of HTTP sessions for S3 that does not follow redirects.

    The one that aiobotocore brings does, also from ``https`` to ``http``, and sends the security
    token along.
    """
    from aiobotocore.httpsession import AIOHTTPSession

    class Direct:
        def __init__(self, session: Any) -> None:
            self._session = session

        async def request(self, method: str, **options: Any) -> Any:
            return await self._session.request(method, **{**options, "allow_redirects": False})

    class DirectSession(AIOHTTPSession):  # type: ignore[misc]
        async def _get_session(self, proxy_url: str | None) -> Direct:
            return Direct(await super()._get_session(proxy_url))

    return DirectSession


def watch_client(filesystem: Any) -> None:
    """Look at the client that an S3 file system really uses, and at each request it sends.

    Options, environment and profiles all end here.

    Raises:
        ConfigError: if the client does not speak TLS, or does not check certificates.
    """
    filesystem.connect()
    client = filesystem.s3
    endpoint = str(client.meta.endpoint_url)
    session = client._endpoint.http_session
    verify = getattr(session, "_verify", _SENTINEL)
    if not isinstance(session, direct_session()):
        raise ConfigError("http_session_cls cannot be chosen: another one may follow redirects.")
    if _plain_http(endpoint) or (endpoint.startswith("https:") and _false(verify, _SENTINEL)):
        raise ConfigError(
            "the S3 client would speak plain HTTP, or take any certificate, through a profile, a "
            "configuration file or an option. Nothing was sent. Use an https:// endpoint, or "
            "RemoteStorage(..., insecure_allow_http=True)."
        )
    client.meta.events.register_first("before-send.s3", _refuse_http)


def _refuse_http(request: Any, **_: Any) -> None:
    if _plain_http(request.url):
        raise ConfigError("a request over plain HTTP was stopped before it was sent.")


def _walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _walk(item, name)
    else:
        yield name, value


def _false(value: Any, *more: Any) -> bool:
    if any(value is other for other in more):
        return True
    text = value.strip().lower() if isinstance(value, str) else value
    return text is False or text in (0, "0", "false", "no", "off")


def _plain_http(text: str) -> bool:
    lowered = text.strip().lower()
    if "endpointsprotocol=http;" in lowered.replace(" ", "") + ";":
        return True
    return any(
        not _loopback(urlsplit(f"http://{rest.split(';')[0]}").hostname)
        for rest in lowered.split("http://")[1:]
    )


def _loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
