"""Credentials and access patterns travel over TLS or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_secure.data.storage import RemoteStorage
from lightning_secure.data.storage.transport import insecure_options, secret_options
from lightning_secure.errors import ConfigError, StorageError

ROWS = np.arange(800, dtype="int64").reshape(400, 2)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"endpoint_url": "http://minio.example:9000"}, "endpoint_url"),
        ({"endpoint_url": " HTTP://minio.example"}, "endpoint_url"),
        ({"client_kwargs": {"endpoint_url": "http://10.0.0.1"}}, "client_kwargs.endpoint_url"),
        ({"client_kwargs": {"verify": False}}, "client_kwargs.verify"),
        ({"client_kwargs": {"use_ssl": 0}}, "client_kwargs.use_ssl"),
        ({"use_ssl": False}, "use_ssl"),
        ({"use_ssl": "no"}, "use_ssl"),
        ({"config_kwargs": {"s3": {"verify": "false"}}}, "config_kwargs.s3.verify"),
        ({"endpoint_url": "http://127.0.0.1.example"}, "endpoint_url"),
        ({"endpoint_url": "http://127.0.0.1@evil.example"}, "endpoint_url"),
        ({"hosts": ["https://a", "http://b"]}, "hosts"),
        ({"connection_string": "DefaultEndpointsProtocol=http;AccountKey=x"}, "connection_string"),
        ({"connection_string": "BlobEndpoint=http://blob.example/;A=b"}, "connection_string"),
    ],
)
def test_an_option_that_turns_tls_off_is_found(options, name):
    assert insecure_options("s3", options) == name
    with pytest.raises(ConfigError, match=name) as caught:
        RemoteStorage("s3://bucket/x", storage_options=options).size("manifest.json")
    assert "example" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"endpoint_url": "https://s3.example"},
        {"endpoint_url": "http://127.0.0.1:9000", "use_ssl": True},
        {"client_kwargs": {"endpoint_url": "http://[::1]:9000", "verify": "/ca.pem"}},
        {"endpoint_url": "http://localhost:9000", "key": "http"},
        # The proxy relays the TLS that is spoken through it.
        {"config_kwargs": {"proxies": {"https": "http://proxy.example:3128"}}},
        {"connection_string": "DefaultEndpointsProtocol=https;AccountKey=x"},
    ],
)
def test_options_that_leave_tls_on_pass(options):
    assert insecure_options("s3", options) is None


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_environment_cannot_turn_tls_off(monkeypatch, name):
    monkeypatch.setenv(name, "http://minio.example:9000")
    assert insecure_options("s3", {}) == name
    monkeypatch.setenv(name, "https://minio.example:9000")
    assert insecure_options("s3", {}) is None
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "gcs.example:4443")
    assert insecure_options("gs", {}) == "STORAGE_EMULATOR_HOST"


def test_fsspecs_own_settings_cannot_turn_tls_off(monkeypatch):
    import fsspec.config

    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://minio.example"})
    with pytest.raises(ConfigError, match="endpoint_url"):
        RemoteStorage("s3://bucket/x").size("manifest.json")


def test_a_profile_cannot_turn_tls_off(s3, monkeypatch, tmp_path):
    """The option is in none of ours: only the client that botocore made of it shows."""
    config = tmp_path / "config"
    config.write_text("[default]\nendpoint_url = http://minio.invalid:9000\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with pytest.raises(ConfigError, match="profile"):
        RemoteStorage(s3.root, storage_options={"key": "a", "secret": "b"}).size("x")
    with pytest.raises(StorageError):  # it may try, if it is told to; there is no such host
        RemoteStorage(
            s3.root,
            storage_options={"key": "a", "secret": "b"},
            insecure_allow_http=True,
            attempts=1,
        ).size("x")


def test_a_client_that_does_not_check_certificates_is_refused(s3):
    class Sly(dict):
        """Options that look otherwise to who lists them than to who uses them."""

        def items(self):
            return [(name, value) for name, value in super().items() if name != "verify"]

    options = {**s3.options, "client_kwargs": Sly(s3.options["client_kwargs"], verify=False)}
    assert insecure_options("s3", options) is None
    with pytest.raises(ConfigError, match="any certificate"):
        RemoteStorage(s3.root, storage_options=options).size("x")
    assert s3.line.requests == []


def test_a_certificate_that_nobody_vouches_for_is_refused(sealed, read):
    del sealed.options["client_kwargs"]["verify"]
    with pytest.raises(StorageError, match="SSLError"):
        read(sealed.root, storage_options=sealed.options)
    assert sealed.line.requests == []


@pytest.fixture
def plain_http():
    """A server without TLS that notes what it is sent."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, dict(self.headers)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect"])
def test_a_redirect_to_plain_http_is_not_followed(sealed, read, plain_http, status):
    url, seen = plain_http

    def redirect(environ, start_response):
        head = [("Location", url + environ["PATH_INFO"]), ("x-amz-bucket-region", "eu-west-1")]
        start_response(status, [*head, ("Content-Length", "0")])
        return []

    sealed.line.disturb = redirect
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, attempts=2)
    with pytest.raises(StorageError):
        read(storage)
    assert seen == []


def test_a_session_that_may_follow_redirects_is_refused(s3):
    from aiobotocore.httpsession import AIOHTTPSession

    options = {**s3.options, "config_kwargs": {"http_session_cls": AIOHTTPSession}}
    with pytest.raises(ConfigError, match="http_session_cls"):
        RemoteStorage(s3.root, storage_options=options).size("x")


def test_each_request_is_looked_at_and_not_only_the_first_address(sealed, plain_http):
    """Something behind the client sends a request elsewhere: it does not leave the process."""
    url, seen = plain_http
    remote_name = url.replace("127.0.0.1", "storage.invalid")
    storage = RemoteStorage(sealed.root, storage_options=sealed.options, attempts=1)
    storage.size("manifest.json")
    client = storage._file_system.s3

    def elsewhere(request, **_):
        request.url = f"{remote_name}/bucket/dataset/manifest.json"

    client.meta.events.register("request-created.s3", elsewhere)
    sealed.line.requests.clear()
    with pytest.raises(StorageError, match="ConfigError"):
        storage.size("manifest.json")
    assert seen == []
    assert sealed.line.requests == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://data.example/dataset", "not known to speak TLS"),
        ("ftp://data.example/dataset", "not known to speak TLS"),
        ("nonsense://x", "not known to speak TLS"),
        ("simplecache::s3://bucket/x", "chained"),
        ("s3://AKID:SECRET@bucket/x", "neither credentials"),
        ("s3://bucket/x?token=SECRET", "neither credentials"),
        ("https://data.example/x#SECRET", "neither credentials"),
    ],
)
def test_a_url_that_is_not_accepted(url, why):
    with pytest.raises(ConfigError, match=why) as caught:
        RemoteStorage(url)
    assert "SECRET" not in str(caught.value)


def test_what_nobody_knows_stays_unknown_when_told_to_be_insecure():
    with pytest.raises(ConfigError, match="knows no protocol"):
        RemoteStorage("nonsense://x", insecure_allow_http=True)
    assert str(RemoteStorage("http://localhost:1/x")) == "http://localhost:1/x"


@pytest.mark.parametrize(
    "options",
    [
        {"key": "AKID", "secret": "x"},
        {"token": "x"},
        {"client_kwargs": {"aws_session_token": "x"}},
        {"session": object()},
        {"headers": ["Authorization: x"]},
        {"endpoint_url": object()},
    ],
)
def test_options_that_may_hold_credentials(options):
    assert secret_options(options)


def test_options_that_hold_none():
    assert not secret_options(
        {"anon": True, "profile": "p", "client_kwargs": {"region_name": "r", "verify": "/ca"}}
    )
