from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from lightning_secure import __version__, cli
from lightning_secure.cli import doctor

ROOT = Path(__file__).parents[2]
PYARROW = version("pyarrow")


def by_name():
    return {check.name: check for check in cli.run_checks()}


def test_the_command_is_installed_and_knows_its_version():
    command = Path(sys.executable).with_name("lightning-secure")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_the_doctor_finds_this_machine_well():
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 0, result.output
    for name in ("lightning", "torch", "AES-256-GCM", "opacus"):
        assert name in result.output


def test_every_required_package_is_looked_at():
    checks = by_name()
    assert {"lightning", "torch", "cryptography", "opacus", "mlflow-skinny"} <= set(checks)
    assert checks["torch"].detail == version("torch")


def installed(monkeypatch, **versions):
    def fake(name):
        found = versions.get(name.replace("-", "_"), version(name))
        if found is None:
            raise PackageNotFoundError(name)
        return found

    # Other releases cannot be installed beside the ones under test.
    monkeypatch.setattr(doctor, "version", fake)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"cryptography": "41.0.0"}, "and >=50 is needed"),
        ({"opacus": None}, "not installed"),
        ({"lightning": "2.6.2"}, "malware"),
        ({"lightning": "2.6.3"}, "malware"),
        ({"torch": "2.9.1"}, "is needed"),
    ],
)
def test_the_doctor_says_no(monkeypatch, found, words):
    installed(monkeypatch, **found)
    (name,) = found
    check = by_name()[name]
    assert check.status == "bad"
    assert words in check.detail
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1


def test_local_builds_count_as_their_release():
    requirement = Requirement("torch>=2.10,<3")
    assert requirement.specifier.contains("2.13.0+cpu", prereleases=True)


# ---------------------------------------------------------------- extras


def distribution(folder: Path, name: str, release: str | None, code: str | None = "") -> None:
    """Put a distribution in front of an installed one; without a release it has no METADATA."""
    module = folder / doctor._module(name)
    if code is not None:
        module.mkdir()
        (module / "__init__.py").write_text(code)
    about = folder / f"{name.replace('-', '_')}-{release or '1.0'}.dist-info"
    about.mkdir()
    if release is not None:
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n"
        (about / "METADATA").write_text(text)


def test_every_extra_is_looked_at():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {f"extra {name}" for name in project["optional-dependencies"]} - {"extra dev"}
    checks = by_name()
    assert {name for name in checks if name.startswith("extra ")} == extras
    assert {checks[name].status for name in extras} == {"ok"}
    assert checks["extra tables"].detail == f"pandas {version('pandas')}, pyarrow {PYARROW}"
    # What an extra of another package brings belongs to it.
    assert f"pyarrow {PYARROW}" in checks["extra ray"].detail
    output = CliRunner().invoke(cli.main, ["doctor"]).output
    for name in extras:
        assert name in output


def test_each_module_is_one_of_its_distributions():
    owners = packages_distributions()
    names = [*doctor._needed("lightning-secure")]
    names += [need for extra in doctor._extras() for need in doctor._of_extra(extra)]
    for need in names:
        found = {name.lower().replace("_", "-") for name in owners[doctor._module(need.name)]}
        assert need.name.lower() in found


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> dict[str, doctor.Check]:
    """What the doctor finds where packages are damaged, each in another way."""
    folder = tmp_path_factory.mktemp("damaged")
    distribution(folder, "matplotlib", None)
    distribution(folder, "hvac", "2.4.0", "raise RuntimeError('no [red]libfoo\\n at all')")
    distribution(folder, "boto3", "1.43", "import os; os.kill(os.getpid(), 9)")
    distribution(folder, "s3fs", "2026.9", "import sys; print('hello'); sys.exit(3)")
    distribution(folder, "pyarrow", "1.0")
    distribution(folder, "python-pkcs11", "none at all")
    distribution(folder, "pillow", "13.0", None)
    distribution(folder, "pytorch-lightning", "2.6.3")
    (folder / "pillow-13.0.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return by_name()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("extra plot", "matplotlib: its metadata is damaged; pip install"),
        ("extra vault", "importing hvac fails: RuntimeError: no [red]libfoo at all"),
        ("extra aws", "importing boto3 fails: it ends Python (SIGKILL)"),
        ("extra s3", "importing s3fs fails: SystemExit: 3"),
        ("extra tables", "pyarrow: 1.0, and >=17 is needed"),
        ("extra pkcs11", "python-pkcs11: its metadata is damaged"),
        ("extra images", "pillow: its metadata is damaged"),
        ("pytorch-lightning", "2.6.3 carried malware"),
    ],
)
def test_the_doctor_says_what_is_damaged(damaged, name, words):
    assert damaged[name].status == "bad"
    assert words in damaged[name].detail


def test_damage_to_one_package_leaves_the_others(damaged):
    names = ("torch", "scipy", "cryptography", "AES-256-GCM")
    assert {damaged[name].status for name in names} == {"ok"}


def test_an_optional_package_may_be_missing(monkeypatch):
    installed(monkeypatch, mlflow=None, pandas=None)
    checks = by_name()
    tracking, tables = checks["extra tracking"], checks["extra tables"]
    assert tracking.status == tables.status == "missing"
    # mlflow-skinny provides the module alone.
    assert re.fullmatch(
        r"mlflow: not installed \(\S+/mlflow belongs to another distribution, or to none\); "
        r"pip install 'lightning-secure\[tracking\]'",
        tracking.detail,
    )
    assert "pandas: not installed" in tables.detail
    assert "pyarrow" not in tables.detail
    assert CliRunner().invoke(cli.main, ["doctor"]).exit_code == 0


def test_the_own_metadata_may_be_damaged(tmp_path, monkeypatch):
    distribution(tmp_path, "lightning-secure", None, code=None)
    monkeypatch.syspath_prepend(str(tmp_path))
    checks = by_name()
    assert checks["lightning-secure"].status == "bad"
    assert "metadata is missing or damaged" in checks["lightning-secure"].detail
    assert checks["AES-256-GCM"].status == "ok"


@pytest.mark.parametrize(
    ("module", "command", "words"),
    [
        ("cryptography", "seal", "seal cannot run: importing what it needs fails"),
        ("cryptography", "keys", "(ImportError: libssl.so.9 is not there)"),
        ("rich", "doctor", "pip install --force-reinstall lightning-secure"),
    ],
)
def test_a_broken_package_leaves_no_traceback(tmp_path, module, command, words):
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise ImportError('libssl.so.9 is not there')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    start = [sys.executable, "-c", "from lightning_secure.cli import main; main()"]

    def run(*arguments):
        return subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment)

    done = run(command, "--anything")
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert command in run("--help").stdout


# ---------------------------------------------------------------- cryptography and devices


def test_broken_cryptography_is_noticed(monkeypatch):
    from cryptography.hazmat.primitives.ciphers import aead

    class Careless:
        def __init__(self, key):
            pass

        def encrypt(self, nonce, data, aad):
            return bytes(32)

        def decrypt(self, nonce, data, aad):
            return bytes(16)  # accepts whatever comes

    monkeypatch.setattr(aead, "AESGCM", Careless)
    assert doctor._encryption({}).status == "bad"


def test_a_gpu_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H200")
    assert doctor._accelerator({}).detail == "2 x NVIDIA H200"


def test_a_driver_that_fails_is_told(monkeypatch):
    import torch

    def fails():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", fails)  # no such driver here
    assert doctor._accelerator({}).detail == "unknown: RuntimeError: the driver is too old"
    assert "importing torch fails" in doctor._accelerator({"torch": "OSError"}).detail
