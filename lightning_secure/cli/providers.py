"""Key providers as configuration files name them; secrets only by where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lightning_secure.errors import ConfigError
from lightning_secure.util.yaml_config import parsed, shown, typed

if TYPE_CHECKING:
    from lightning_secure.crypto.keys import KeyProvider
    from lightning_secure.crypto.providers.secret_sources import SecretSource


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """The fields that a file holds for a kind of provider.

    Attributes:
        provider: Name of the class.
        needed: Fields that must be there.
        optional: Fields that may be there.
        secret: The field that says where the secret comes from, if there is one.
    """

    provider: str
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    secret: str | None = None


_SIGNING: Final = ("signing_key", "trusted", "derivation_key")
#: Options that weaken a guarantee (``insecure_...``) are for programs, and no fields here.
_KINDS: Final[Mapping[str, _Kind]] = {
    "local": _Kind(provider="LocalKeyProvider", needed=("path",), optional=("trusted",)),
    "passphrase": _Kind(
        provider="LocalKeyProvider",
        needed=("path", "passphrase"),
        optional=("trusted",),
        secret="passphrase",  # noqa: S106 # the name of a field
    ),
    "hpke": _Kind(provider="HpkeKeyProvider", optional=("recipients", "private_key", *_SIGNING)),
    "pkcs11": _Kind(
        provider="Pkcs11KeyProvider",
        needed=("module", "token", "key"),
        optional=("pin", *_SIGNING),
        secret="pin",  # noqa: S106 # the name of a field
    ),
    "vault": _Kind(
        provider="VaultTransitKeyProvider",
        needed=("url", "key"),
        optional=("mount", "token", "namespace", "ca_file", "timeout", *_SIGNING),
        secret="token",  # noqa: S106 # the name of a field
    ),
    "aws-kms": _Kind(
        provider="AwsKmsKeyProvider",
        needed=("key_arn",),
        optional=("profile", "endpoint_url", "timeout", *_SIGNING),
    ),
}
_LISTS: Final = ("recipients", "trusted")


def provider_in(path: Path) -> KeyProvider:
    """Return the provider that a file names, as the whole file or as its part ``keys``.

    Raises:
        ConfigError: if the file is not YAML, or for the reasons of :func:`provider_of`.
        MissingExtraError: if the provider needs a package that is not installed.
        KeyAccessError: if a key, or a secret that opens it, cannot be used.
    """
    config = parsed(path)
    return provider_of(config.get("keys", config), path)


def provider_of(value: Any, path: Path) -> KeyProvider:
    """Return the provider that a part of a configuration names.

    Args:
        value: The part: ``kind``, and the arguments of that kind of provider by their names. A
            passphrase, PIN or token is ``{env: NAME}``, ``{file: PATH}`` or ``prompt``.
        path: The file it is from. Where it says more than which key file to use, its writer
            decides who may read and who is believed, so others must not be able to write it.

    Raises:
        ConfigError: if a field is missing, unknown or of another type, or a secret itself stands
            there. The message holds no value, because that may be one.
        MissingExtraError: if the provider needs a package that is not installed.
        KeyAccessError: if a key, or a secret that opens it, cannot be used; or others can write the
            file.
    """
    from lightning_secure.crypto import providers
    from lightning_secure.crypto.providers.keyfiles import read_file

    fields = dict(typed(value, dict, "keys"))
    name = fields.pop("kind", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"keys: needs kind: {', '.join(_KINDS)}. No key was used.")
    _require_fields(fields, str(name), kind)
    if kind.provider != "LocalKeyProvider" or "trusted" in fields:
        read_file(path, what="configuration", forbidden=0o022)
    arguments = {
        field: _secret(given, f"keys: {field}") if field == kind.secret else _plain(field, given)
        for field, given in fields.items()
    }
    provider: KeyProvider = getattr(providers, kind.provider)(**arguments)
    return provider


def _require_fields(fields: Mapping[Any, Any], name: str, kind: _Kind) -> None:
    what = f"keys: kind {name}"
    if unknown := [field for field in fields if field not in (*kind.needed, *kind.optional)]:
        raise ConfigError(
            f"{what} has the unknown key {shown(unknown, fields)}; known are "
            f"{', '.join(sorted((*kind.needed, *kind.optional)))}. No key was used."
        )
    if missing := [field for field in kind.needed if field not in fields]:
        raise ConfigError(f"{what} needs {', '.join(missing)}. No key was used.")


def _plain(field: str, value: Any) -> Any:
    kinds: tuple[type, ...] = (str,)
    if field == "timeout":
        kinds = (int, float)
    elif field in _LISTS:
        kinds = (list,)
    if type(value) not in kinds or (
        type(value) is list and not all(type(item) is str for item in value)
    ):
        wanted = "a list of texts" if field in _LISTS else " or ".join(k.__name__ for k in kinds)
        raise ConfigError(f"keys: {field} must be {wanted}. No key was used.")
    return value


def _secret(value: Any, what: str) -> SecretSource:
    from lightning_secure.crypto.providers import EnvironmentSecret, FileSecret

    if value == "prompt":
        text: str = click.prompt(what.rpartition(" ")[2].capitalize(), hide_input=True, err=True)
        return lambda: text
    if isinstance(value, dict) and len(value) == 1:
        ((where, name),) = value.items()
        if where == "env" and isinstance(name, str):
            return EnvironmentSecret(name)
        if where == "file" and isinstance(name, str):
            return FileSecret(name)
    raise ConfigError(
        f"{what} takes {{env: NAME}}, {{file: PATH}} or prompt, and never the secret itself, which "
        "would stay in the file. What stands there was not used; if it is the secret, change it."
    )
