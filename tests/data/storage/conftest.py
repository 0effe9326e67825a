"""A real S3 server on 127.0.0.1 behind TLS, with a line to it that can be disturbed."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import ipaddress
import os
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.loaders import create_loader
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.writing.writer import EncryptedShardWriter

LOADER = create_loader()
ROWS = np.arange(800, dtype="int64").reshape(400, 2)


def seal_rows(root, keys, rows=ROWS, split="train", **options):
    """Seal a split of 5 shards with 8 segments each, one segment for ten rows."""
    shape = {"segment_bytes": 160, "shard_bytes": 1280, **options}
    with EncryptedShardWriter(root, split=split, keys=keys, **shape) as writer:
        writer.write_batch({"x": rows})
    return root


@pytest.fixture
def seal(keys):
    return functools.partial(seal_rows, keys=keys)


@pytest.fixture(scope="session")
def local(keys, tmp_path_factory) -> Path:
    """A dataset in a folder, to be copied and not changed."""
    return seal_rows(tmp_path_factory.mktemp("sealed") / "dataset", keys)


@pytest.fixture
def opened(keys):
    """Open a split, and close it at the end of the test."""
    made = []

    def opened(root, split="train", **options):
        made.append(EncryptedShardDataset(root, split=split, keys=keys, **options))
        return made[-1]

    yield opened
    for data in made:
        data.close()


@pytest.fixture
def read(opened):
    """Read all rows of a split."""

    def read(root, **options):
        data = root if isinstance(root, EncryptedShardDataset) else opened(root, **options)
        (x,) = data.__getitems__(range(len(data))).batch()
        return x.numpy()

    return read


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "server.pem", folder / "server.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


Disturbance = Callable[[dict, Callable], "list[bytes] | None"]


class Line:
    """What lies between the client and moto. Without a disturbance it only keeps a record."""

    def __init__(self, application) -> None:
        self.application = application
        self.requests: list[tuple[str, str, str]] = []
        self.queries: set[str] = set()
        self.disturb: Disturbance | None = None
        self.valid_ids: set[str] | None = None

    def __call__(self, environ, start_response):
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        self.queries.add(environ["QUERY_STRING"])
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        if self.valid_ids is not None:
            found = re.search(r"Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
            if not found or found[1] not in self.valid_ids:
                body = b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
                head = [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))]
                start_response("400 Bad Request", head)
                return [] if method == "HEAD" else [body]
        if self.disturb is not None:
            answer = self.disturb(environ, start_response)
            if answer is not None:
                return answer
        return self.application(environ, start_response)

    def passed_on(self, environ):
        """Ask moto, and return status, headers and body, to be changed before they are sent."""
        kept = []
        body = b"".join(self.application(environ, lambda *answer: kept.append(answer)))
        return kept[0][0], kept[0][1], body

    def ranges(self, name: str) -> list[str]:
        return [sent for method, path, sent in self.requests if method == "GET" and name in path]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_):
        pass

    def connection_dropped(self, *_):
        pass


class Server(ThreadedWSGIServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # connections that a test breaks off


class S3:
    """A bucket, its server, and the options with which fsspec reaches it."""

    def __init__(self, url: str, ca: Path, line: Line, bucket: str, client) -> None:
        self.endpoint = url
        self.ca = ca
        self.line = line
        self.bucket = bucket
        self.root = f"s3://{bucket}/dataset"
        self.options = {
            "key": "AKIDTESTTESTTEST",
            "secret": "SECRET-OF-THE-STORAGE",
            "client_kwargs": {
                "endpoint_url": url,
                "verify": str(ca),
                "region_name": "us-east-1",
            },
        }
        self.client = client
        self.client.create_bucket(Bucket=bucket)

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return sorted(item["Key"].removeprefix("dataset/") for item in found)

    def get(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"dataset/{name}")["Body"].read()

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"dataset/{name}", Body=data)


@contextlib.contextmanager
def serving(application, context=None) -> Iterator[str]:
    server = Server("127.0.0.1", 0, application, handler=Quiet, ssl_context=context)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    scheme = "https" if context else "http"
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def moto_over_tls(tmp_path_factory) -> Iterator[tuple]:
    folder = tmp_path_factory.mktemp("tls")
    certificate_file, key_file = certificate(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate_file, key_file)
    line = Line(DomainDispatcherApplication(create_backend_app))
    with serving(line, context) as url:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            verify=str(certificate_file),
            region_name="us-east-1",
            aws_access_key_id="admin",
            aws_secret_access_key="admin",
        )
        yield url, certificate_file, line, client
        client.close()


@pytest.fixture
def s3(moto_over_tls, monkeypatch, tmp_path) -> Iterator[S3]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # Nothing of the machine's own configuration, and no question to a cloud's metadata service.
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    url, ca, line, client = moto_over_tls
    line.disturb = line.valid_ids = None
    bucket = S3(url, ca, line, f"bucket-{uuid.uuid4().hex[:12]}", client)
    line.requests.clear()
    yield bucket
    line.disturb = line.valid_ids = None


@pytest.fixture
def sealed(s3, local) -> S3:
    """The bucket, with the dataset in it."""
    for path in local.rglob("*"):
        if path.suffix in (".json", ".lsec"):
            s3.put(path.relative_to(local).as_posix(), path.read_bytes())
    s3.line.requests.clear()
    return s3


@pytest.fixture(autouse=True)
def _quick_clients(monkeypatch):
    """Each botocore session parses the same megabytes of JSON, which takes most of the time."""
    monkeypatch.setattr("botocore.session.create_loader", lambda _: LOADER)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    """Waiting between two tries is seen in one test; the others need not wait."""
    monkeypatch.setattr("lightning_secure.data.storage.remote._BACKOFF_SECONDS", 0.001)
