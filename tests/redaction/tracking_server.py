"""A real MLflow server over TLS, with users of its own, on PostgreSQL; on free ports here."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import pwd
import secrets
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from services import POSTGRESQL, postgresql_program


class Server(NamedTuple):
    """Where it is, and where everything is that it keeps.

    Attributes:
        address: ``https://...``
        authority: Certificate of the authority that vouches for it.
        user: Of the one who may do everything.
        password: Of the same.
        folder: Artifacts, logs and users.
        database: The database's own files.
        dsn: Its address.
    """

    address: str
    authority: Path
    user: str
    password: str
    folder: Path
    database: Path
    dsn: str

    def dump(self) -> Path:
        """Write all that is in the database as text: what lies in its files may be packed."""
        target = self.folder / "dump.sql"
        address = self.dsn.replace("+psycopg2", "")
        subprocess.run([program("pg_dump"), address, "-f", str(target)], check=True)
        return target


def program(name: str) -> str:
    """Return where one of PostgreSQL's programs is."""
    found = postgresql_program(name)
    if found is None:
        pytest.skip(POSTGRESQL.remedy)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres(data: Path, log_file: Path) -> Iterator[str]:
    """Run a database of its own in a folder, and yield its address."""
    initdb, server, port = program("initdb"), program("postgres"), free_port()
    if os.geteuid() == 0:  # which the database refuses to be run by
        owner = pwd.getpwnam("postgres")
        os.chown(data, owner.pw_uid, owner.pw_gid)
        identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": ()}
    else:
        identity = {}
    subprocess.run(
        [initdb, "-D", str(data), "-U", "tracking", "--auth=trust", "--no-sync", "-E", "UTF8"],
        check=True, stdout=subprocess.DEVNULL, cwd="/", **identity,
    )  # fmt: skip
    log = log_file.open("wb")
    process = subprocess.Popen(
        [
            server, "-D", str(data), "-p", str(port), "-k", "", "-h", "127.0.0.1",
            "-c", "fsync=off", "-c", "log_statement=all",
        ],
        stdout=log, stderr=subprocess.STDOUT, cwd="/", **identity,
    )  # fmt: skip
    try:
        for _ in range(240):
            if b"ready to accept connections" in log_file.read_bytes():
                break
            assert process.poll() is None, log_file.read_text()[-2000:]
            time.sleep(0.05)
        yield f"postgresql+psycopg2://tracking@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(2)  # fast: who is connected is sent away
        process.wait(20)
        log.close()


def certificates(folder: Path) -> tuple[Path, Path, Path]:
    """Return an authority of our own, and the certificate and key that it gave the server."""
    now = dt.datetime.now(dt.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("ca", "here")]
    made = []
    for number, (key, name) in enumerate(zip(keys, names, strict=True)):
        builder = (
            x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=not number, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()),
                critical=False,
            )
        )
        if number:
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(
                x509.SubjectAlternativeName([here, x509.DNSName("localhost")]), critical=False
            )
        made.append(builder.sign(keys[0], SHA256()).public_bytes(Encoding.PEM))
    files = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    secret = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for file, data in zip(files, (*made, secret), strict=True):
        file.write_bytes(data)
    return files


@contextlib.contextmanager
def tracking_server(folder: Path, elsewhere: Path) -> Iterator[Server]:
    """Run the server.

    Args:
        folder: For everything that it keeps.
        elsewhere: For its settings and certificates, among them its password.
    """
    user, password, port = "warden", secrets.token_urlsafe(18), free_port()
    authority, certificate, key = certificates(elsewhere)
    (elsewhere / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/users.db\nadmin_username = {user}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # else it derives a key at each request
    )
    with (
        # Not below pytest's folders, which nobody but their owner may enter.
        tempfile.TemporaryDirectory() as data,
        postgres(Path(data), folder / "postgres.log") as dsn,
        (folder / "server.log").open("wb") as log,
    ):
        process = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(port), "--workers", "1", "--app-name", "basic-auth",
                "--backend-store-uri", dsn, "--artifacts-destination", str(folder / "artifacts"),
                "--uvicorn-opts",
                f"--ssl-certfile {certificate} --ssl-keyfile {key} --timeout-graceful-shutdown 1",
            ],
            stdout=log, stderr=subprocess.STDOUT, cwd=folder,
            env={
                **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_AUTH_CONFIG_PATH": str(elsewhere / "auth.ini"),
                "MLFLOW_AUTH_ADMIN_PASSWORD": password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            },
        )  # fmt: skip
        server = Server(
            f"https://127.0.0.1:{port}", authority, user, password, folder, Path(data), dsn
        )
        try:
            trusted = ssl.create_default_context(cafile=str(authority))
            for _ in range(240):
                assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
                try:
                    urllib.request.urlopen(
                        f"{server.address}/health", timeout=1, context=trusted
                    ).close()
                    break
                except (URLError, OSError):
                    time.sleep(0.25)
            else:
                pytest.fail("the MLflow server did not come up within a minute")
            yield server
        finally:
            process.terminate()
            process.wait(20)
