"""A key in a transit engine, on OpenBao, and on servers that misbehave."""

from __future__ import annotations

import base64
import json
import pickle
import socket
import sys
import time

import pytest

from lightning_secure.crypto.encoding import b64encode
from lightning_secure.crypto.keys import DataKey, WrappedKey, associated_data
from lightning_secure.crypto.providers import (
    EnvironmentSecret,
    FileSecret,
    VaultTransitKeyProvider,
)
from lightning_secure.crypto.providers.external import bound_payload
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyAccessError,
    KeyUnavailableError,
    MissingExtraError,
)

CONTEXT = {"purpose": "partition", "dataset": "00" * 16, "partition": "train"}
TOKEN = EnvironmentSecret("LSEC_TEST_TOKEN")


def everything(error: BaseException | None) -> str:
    text = ""
    while error is not None:
        text += f"{error} {error.args!r} {vars(error)!r}"
        error = error.__context__
    return text


def test_the_server_itself_binds_the_context(vault, bao):
    import hvac

    key = DataKey.generate()
    blob = vault.make().wrap(key, context=CONTEXT).blob.decode()
    transit = bao.client().secrets.transit

    def opened(**rest):
        return transit.decrypt_data("project", ciphertext=blob, **rest)["data"]["plaintext"]

    bound = b64encode(associated_data(CONTEXT))
    assert base64.b64decode(opened(associated_data=bound)) == bound_payload(key, CONTEXT)
    for rest in ({}, {"associated_data": b64encode(associated_data({}))}):
        with pytest.raises(hvac.exceptions.InvalidRequest, match="authentication failed"):
            opened(**rest)


def test_a_context_that_the_server_did_not_check_is_checked_here(vault, bao):
    """As with a server that ignores associated_data."""
    other = {**CONTEXT, "partition": "val"}
    answer = bao.client().secrets.transit.encrypt_data(
        "project",
        plaintext=b64encode(bound_payload(DataKey.generate(), other)),
        associated_data=b64encode(associated_data(CONTEXT)),
    )
    blob = answer["data"]["ciphertext"].encode()
    provider = vault.make()
    wrapped = WrappedKey(provider=provider.name, key_id=provider.key_id, blob=blob)
    with pytest.raises(IntegrityError, match="its context is another one"):
        provider.unwrap(wrapped, context=CONTEXT)


def test_a_rotated_key_opens_what_its_older_version_wrapped(vault, bao):
    provider, key = vault.make(), DataKey.generate()
    wrapped = provider.wrap(key, context=CONTEXT)
    bao.client().secrets.transit.rotate_key("project")
    newer = provider.wrap(key, context=CONTEXT)
    assert wrapped.blob.split(b":")[1] != newer.blob.split(b":")[1]
    assert wrapped.key_id == newer.key_id
    assert provider.unwrap(wrapped, context=CONTEXT) == key
    assert provider.unwrap(newer, context=CONTEXT) == key


def test_the_token_is_asked_for_at_each_call(vault, tmp_path, environment):
    """So whoever renews it has only to replace the file."""
    place = tmp_path / "token"
    place.touch(mode=0o600)
    place.write_text("root-expired")
    provider = vault.make(token=FileSecret(str(place)))
    with pytest.raises(KeyUnavailableError, match="403") as caught:
        provider.wrap(DataKey.generate(), context=CONTEXT)
    assert "root-expired" not in everything(caught.value)
    place.write_text(environment["LSEC_TEST_TOKEN"] + "\n")
    key = DataKey.generate()
    assert provider.unwrap(provider.wrap(key, context=CONTEXT), context=CONTEXT) == key
    assert environment["LSEC_TEST_TOKEN"] not in repr(vars(provider))


def test_a_token_that_could_travel_is_not_pickled(vault):
    provider = vault.make(token=lambda: TOKEN())
    with pytest.raises(KeyAccessError, match="cannot be pickled"):
        pickle.dumps(provider)
    with pytest.raises(ConfigError, match="does not keep secrets"):
        vault.make(token="root-in-the-clear")


def test_an_unknown_certificate_is_refused(vault, monkeypatch):
    key = DataKey(b"\x5a" * 32)
    with pytest.raises(KeyUnavailableError, match="SSLError") as caught:
        vault.make(ca_file=None).wrap(key, context=CONTEXT)
    assert TOKEN() not in everything(caught.value)
    assert caught.value.__context__ is None


def test_a_missing_key_or_mount_is_named(vault, bao):
    provider = vault.make()
    wrapped = provider.wrap(DataKey.generate(), context=CONTEXT)
    for changes, words in (({"key": "nothing"}, "400"), ({"mount": "nothing"}, "404")):
        stranger = vault.make(**changes)
        renamed = WrappedKey(provider=wrapped.provider, key_id=stranger.key_id, blob=wrapped.blob)
        with pytest.raises(KeyUnavailableError, match=words):
            stranger.unwrap(renamed, context=CONTEXT)


def test_the_namespace_is_part_of_the_id(vault):
    assert vault.make(namespace="team/a").key_id == "team/a/transit/project"


# ---------------------------------------------------------------- servers that misbehave


def made(server, **changes):
    arguments = {"url": server.url, "key": "project", "token": TOKEN, "timeout": 2.0, **changes}
    return VaultTransitKeyProvider(**arguments)


def refusal(provider, act="wrap"):
    key = DataKey(b"\x5a" * 32)
    blob = b"vault:v1:" + base64.b64encode(bytes(92))
    wrapped = WrappedKey(provider=provider.name, key_id=provider.key_id, blob=blob)
    acts = {
        "wrap": lambda: provider.wrap(key, context=CONTEXT),
        "unwrap": lambda: provider.unwrap(wrapped, context=CONTEXT),
    }
    with pytest.raises(KeyUnavailableError) as caught:
        acts[act]()
    text = everything(caught.value)
    assert not [secret for secret in (TOKEN(), "WlpaWlpa", "ZZZZZZ") if secret in text]
    assert caught.value.__context__ is None
    return str(caught.value)


def test_a_redirect_is_not_followed_with_the_token(misbehaving, environment):
    trap = misbehaving(lambda request: (200, {}, b"{}"))
    server = misbehaving(lambda request: (307, {"Location": f"{trap.url}/v1/x"}, b""))
    refusal(made(server))
    assert len(server.requests) == 1
    assert trap.requests == []


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_three_times(misbehaving, environment, status):
    server = misbehaving(lambda request: (status, {"Retry-After": "3600"}, b'{"errors":["x"]}'))
    start = time.monotonic()
    refusal(made(server))
    assert len(server.requests) == 3
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418, 500])
def test_a_refusal_is_final(misbehaving, environment, status):
    echo = lambda request: (status, {}, json.dumps({"errors": [request.decode()]}).encode())  # noqa: E731
    server = misbehaving(echo)
    message = refusal(made(server))
    assert len(server.requests) == 1
    assert str(status) in message or "UnexpectedError" in message


@pytest.mark.parametrize("body", [b"hello", b"[]", b'{"errors":7}', b'{"errors":[7]}', b"7"])
def test_a_refusal_of_another_form_is_one_too(misbehaving, environment, body):
    refusal(made(misbehaving(lambda request: (400, {}, body))))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"hello", b"[]", b"7", b"{}", b'{"data":null}', b'{"data":{}}',
        b'{"data":{"ciphertext":"x","plaintext":"!"}}',
        b'{"data":{"ciphertext":7,"plaintext":[7]}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("act", ["wrap", "unwrap"])
def test_an_answer_of_another_form_is_refused(misbehaving, environment, body, act):
    provider = made(misbehaving(lambda request: (200, {}, body)))
    refusal(provider, act)


def test_a_short_plaintext_is_refused(misbehaving, environment):
    provider = made(misbehaving(lambda request: (200, {}, b'{"data":{"plaintext":"AAAA"}}')))
    blob = b"vault:v1:" + base64.b64encode(bytes(92))
    wrapped = WrappedKey(provider=provider.name, key_id=provider.key_id, blob=blob)
    with pytest.raises(IntegrityError):
        provider.unwrap(wrapped, context=CONTEXT)


def test_a_silent_server_does_not_hold_up_for_ever(environment):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        provider = VaultTransitKeyProvider(
            url=f"http://127.0.0.1:{silent.getsockname()[1]}",
            key="project",
            token=TOKEN,
            timeout=0.3,
        )
        start = time.monotonic()
        refusal(provider)
        assert time.monotonic() - start < 6


def test_a_proxy_sees_nothing_of_plain_http(misbehaving, environment, monkeypatch):
    proxy = misbehaving(lambda request: (200, {}, b"{}"))
    server = misbehaving(lambda request: (403, {}, b"{}"))
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    refusal(made(server))
    assert proxy.requests == []
    assert len(server.requests) == 1


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://vault.example:8200", "in the clear"),
        ("http://127.0.0.1.example:8200", "in the clear"),
        ("https://user:hunter2@vault.example", "user information"),
        ("ftp://vault.example", "not an https URL"),
        ("vault.example", "not an https URL"),
        ("https://", "not an https URL"),
        ("https://[::1", "not an https URL"),
    ],
)
def test_an_unsafe_url_is_refused(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        VaultTransitKeyProvider(url=url, key="project")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://localhost:8200", "http://127.0.0.2", "http://[::1]:8200", "https://v.example"]
)
def test_this_machine_needs_no_tls(url):
    assert VaultTransitKeyProvider(url=url, key="project").key_id == "transit/project"


def test_a_trusted_network_must_be_asked_for():
    url = "http://vault.example:8200"
    assert VaultTransitKeyProvider(url=url, key="project", insecure_allow_http=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "../sys/raw"},
        {"key": ""},
        {"key": "a/b"},
        {"mount": "transit/../sys"},
        {"mount": "/transit"},
        {"namespace": "a\nb"},
        {"timeout": 0},
    ],
    ids=str,
)
def test_a_name_cannot_reach_another_path(changes):
    with pytest.raises(ConfigError):
        VaultTransitKeyProvider(**{"url": "https://v.example", "key": "project", **changes})


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hvac", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"lightning-secure\[vault\]"):
        VaultTransitKeyProvider(url="https://v.example", key="project")


def test_a_role_that_may_only_wrap_seals_and_one_that_may_nothing_does_not(vault, bao):
    client, tokens = bao.client(), {}
    for name, path in (("seals", "transit/encrypt/project"), ("nothing", "transit/encrypt/x")):
        rule = f'path "{path}" {{ capabilities = ["update"] }}'
        client.sys.create_or_update_policy(name, rule)
        tokens[name] = client.auth.token.create(policies=[name])["auth"]["client_token"]
    sealer = vault.make(token=lambda: tokens["seals"])
    wrapped = sealer.wrap_all(DataKey.generate(), context=CONTEXT)
    sealer.confirm(wrapped, context=CONTEXT)
    with pytest.raises(KeyUnavailableError, match="403"):
        sealer.unwrap_any(wrapped, context=CONTEXT)
    with pytest.raises(KeyUnavailableError, match="403"):  # as after its login is over
        vault.make(token=lambda: tokens["nothing"]).confirm(wrapped, context=CONTEXT)
    client.secrets.transit.create_key(name="brief", key_type="aes256-gcm96")
    client.sys.create_or_update_policy("seals", rule.replace("/x", "/brief"))
    sealer = vault.make(token=lambda: tokens["seals"], key="brief")
    wrapped = sealer.wrap_all(DataKey.generate(), context=CONTEXT)
    client.secrets.transit.update_key_configuration(name="brief", deletion_allowed=True)
    client.secrets.transit.delete_key(name="brief")
    with pytest.raises(KeyUnavailableError):
        sealer.confirm(wrapped, context=CONTEXT)
