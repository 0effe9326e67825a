"""``lightning-secure keys``: make keys, show what may be shown of them, say who may open what."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import click

from lightning_secure.cli.providers import provider_in
from lightning_secure.cli.recipients import recipients
from lightning_secure.crypto.encoding import b64encode
from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.crypto.providers import (
    EnvironmentSecret,
    HpkePrivateKey,
    LocalKeyProvider,
    SigningKey,
)
from lightning_secure.crypto.providers.hpke import HYBRID, X25519, HpkePublicKey
from lightning_secure.crypto.providers.hpke import TYPE as HPKE_TYPE
from lightning_secure.crypto.providers.identity import TYPE as SIGNING_TYPE
from lightning_secure.crypto.providers.identity import public_text, read_public, trusted_keys
from lightning_secure.crypto.providers.keyfiles import read_file
from lightning_secure.crypto.providers.local import TYPE as LOCAL_TYPE
from lightning_secure.crypto.providers.secret_sources import SecretSource
from lightning_secure.errors import KeyUnavailableError, LightningSecureError

_KEMS = {"hybrid": HYBRID, "x25519": X25519}
_path = click.argument("path", type=click.Path(path_type=Path))
_passphrase_env = click.option(
    "--passphrase-env", metavar="NAME", help="Environment variable with the passphrase."
)


@click.group()
def keys() -> None:
    """Make keys, show their ids and public halves, and say who may open a dataset."""


keys.add_command(recipients)


@keys.group()
def generate() -> None:
    """Make a new key file, never in the place of another."""


@generate.command()
@_path
@click.option("--passphrase", "ask", is_flag=True, help="Ask for a passphrase to protect it with.")
@_passphrase_env
def local(path: Path, ask: bool, passphrase_env: str | None) -> None:
    """A key that encrypts and signs, in one file: a reader of the file can do both."""
    source: SecretSource | None = None
    if passphrase_env is not None:
        source = EnvironmentSecret(passphrase_env)
    elif ask:
        text: str = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True)
        source = lambda: text  # noqa: E731 # a source, which is asked each time
    with _reported():
        provider = LocalKeyProvider.generate(path, passphrase=source)
    _show_local(provider)


@generate.command()
@_path
@click.option(
    "--kem",
    type=click.Choice(list(_KEMS)),
    default="hybrid",
    show_default=True,
    help="hybrid: ML-KEM-768 and X25519; x25519 has short keys.",
)
def hpke(path: Path, kem: str) -> None:
    """A recipient's private key in PATH, and in PATH.pub what others seal for."""
    with _reported():
        _show_recipient(HpkePrivateKey.generate(path, kem=_KEMS[kem]).public)


@generate.command()
@_path
def signing(path: Path) -> None:
    """A sealer's signing key in PATH, and in PATH.pub what readers trust."""
    with _reported():
        _show_signer(SigningKey.generate(path).public)


@keys.command()
@_path
@_passphrase_env
def show(path: Path, passphrase_env: str | None) -> None:
    """Show the ids and public keys of a key file; nothing secret is printed.

    PATH may also be a .yaml file that names a provider, as keys: does in the configuration of seal.
    """
    with _reported():
        if path.suffix in (".yaml", ".yml"):
            _show_provider(provider_in(path))
            return
        kind, protected = _kind(path)
        if kind == LOCAL_TYPE:
            source: SecretSource | None = None
            if passphrase_env is not None:
                source = EnvironmentSecret(passphrase_env)
            elif protected:
                text: str = click.prompt("Passphrase", hide_input=True)
                source = lambda: text  # noqa: E731 # a source, which is asked each time
            _show_local(LocalKeyProvider(path, passphrase=source))
        elif kind == HPKE_TYPE:
            _show_recipient(HpkePrivateKey(path).public)
        elif kind == SIGNING_TYPE:
            _show_signer(SigningKey(path).public)
        else:
            algorithm, data = read_public(path)
            if algorithm.startswith("hpke-"):
                _show_recipient(HpkePublicKey.read(path))
            else:
                _show_signer(f"{algorithm}:{b64encode(data)}")


def _kind(path: Path) -> tuple[str, bool]:
    """Return the type of a private key file and whether it has a passphrase; of others nothing."""
    data = read_file(path, what="key file", forbidden=0o022)
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        record = json.loads(data)
        return str(record.get("type")), "kdf" in record
    return "", False


def _show_local(provider: LocalKeyProvider) -> None:
    click.echo(f"local key   {provider.key_id}")
    _show_signer(public_text(provider.signer))


def _show_provider(provider: KeyProvider) -> None:
    for key_id in provider.recipients:
        click.echo(f"{provider.name:<11} {key_id}")
    with contextlib.suppress(KeyUnavailableError):  # one that only reads has no signing key
        _show_signer(public_text(provider.signer))


def _show_recipient(key: HpkePublicKey) -> None:
    click.echo(f"recipient   {key.key_id}")
    click.echo(key.text)


def _show_signer(text: str) -> None:
    (key_id,) = trusted_keys([text])
    click.echo(f"signer      {key_id}")
    click.echo(text)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn our errors into a message without a traceback, and exit status 1."""
    try:
        yield
    except LightningSecureError as error:
        raise click.ClickException(str(error)) from None
