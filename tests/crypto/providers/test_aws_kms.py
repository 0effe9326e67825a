"""A key in AWS KMS, on moto's server, and on servers that misbehave."""

from __future__ import annotations

import json
import os
import socket
import sys
import time

import pytest

from lightning_secure.crypto.keys import DataKey, WrappedKey
from lightning_secure.crypto.providers import AwsKmsKeyProvider
from lightning_secure.crypto.providers.external import bound_payload
from lightning_secure.errors import (
    ConfigError,
    IntegrityError,
    KeyUnavailableError,
    MissingExtraError,
)

CONTEXT = {"purpose": "partition", "dataset": "00" * 16, "partition": "train"}
ARN = "arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-0000-0000-000000000000"


def test_kms_itself_binds_the_encryption_context(aws, kms):
    from botocore.exceptions import ClientError

    key = DataKey.generate()
    blob = aws.make().wrap(key, context=CONTEXT).blob
    opened = kms.client().decrypt(KeyId=kms.key_arn, CiphertextBlob=blob, EncryptionContext=CONTEXT)
    assert opened["Plaintext"] == bound_payload(key, CONTEXT)
    for other in ({}, {**CONTEXT, "partition": "val"}):
        with pytest.raises(ClientError, match="InvalidCiphertext"):
            kms.client().decrypt(KeyId=kms.key_arn, CiphertextBlob=blob, EncryptionContext=other)


def test_a_context_that_kms_did_not_check_is_checked_here(aws, kms):
    other = {**CONTEXT, "partition": "val"}
    blob = kms.client().encrypt(
        KeyId=kms.key_arn,
        Plaintext=bound_payload(DataKey.generate(), other),
        EncryptionContext=CONTEXT,
    )["CiphertextBlob"]
    provider = aws.make()
    wrapped = WrappedKey(provider=provider.name, key_id=provider.key_id, blob=blob)
    with pytest.raises(IntegrityError, match="its context is another one"):
        provider.unwrap(wrapped, context=CONTEXT)


def test_a_key_that_does_not_exist_is_named(aws, kms):
    provider = aws.make(key_arn=ARN)
    with pytest.raises(KeyUnavailableError, match="NotFoundException, status 400") as caught:
        provider.wrap(DataKey.generate(), context=CONTEXT)
    assert caught.value.__context__ is None


def test_credentials_are_needed_when_a_key_is(kms, monkeypatch):
    provider = AwsKmsKeyProvider(key_arn=kms.key_arn, endpoint_url=kms.url)
    assert provider.key_id == kms.key_arn
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    provider = AwsKmsKeyProvider(key_arn=kms.key_arn, endpoint_url=kms.url)
    with pytest.raises(KeyUnavailableError, match="NoCredentialsError"):
        provider.wrap(DataKey.generate(), context=CONTEXT)


def test_a_profile_that_does_not_exist_is_named(kms):
    with pytest.raises(KeyUnavailableError, match="ProfileNotFound"):
        AwsKmsKeyProvider(key_arn=kms.key_arn, profile="nobody", endpoint_url=kms.url)


def test_a_forked_process_gets_a_connection_of_its_own(aws, monkeypatch):
    provider = aws.make()
    mine = provider._client()
    assert provider._client() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a child would see it
    assert provider._client() is not mine


# ---------------------------------------------------------------- endpoints


def test_keys_do_not_cross_a_network_in_the_clear(environment, monkeypatch):
    with pytest.raises(ConfigError, match="in the clear"):
        AwsKmsKeyProvider(key_arn=ARN, endpoint_url="http://kms.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://kms.example")
    with pytest.raises(ConfigError, match="in the clear"):
        AwsKmsKeyProvider(key_arn=ARN)
    assert AwsKmsKeyProvider(key_arn=ARN, insecure_allow_http=True)


def test_the_endpoint_of_aws_speaks_tls(environment):
    url = AwsKmsKeyProvider(key_arn=ARN)._client().meta.endpoint_url
    assert url == "https://kms.eu-central-1.amazonaws.com"


def test_a_proxy_sees_nothing_of_plain_http(aws, misbehaving, monkeypatch):
    proxy = misbehaving(lambda request: (200, {}, b"{}"))
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    provider, key = aws.make(), DataKey.generate()
    assert provider.unwrap(provider.wrap(key, context=CONTEXT), context=CONTEXT) == key
    assert proxy.requests == []


@pytest.mark.parametrize("url", ["kms.example", "ftp://kms.example", "://"])
def test_what_is_not_a_url_is_refused(environment, url):
    with pytest.raises((ConfigError, KeyUnavailableError)):
        AwsKmsKeyProvider(key_arn=ARN, endpoint_url=url)


# ---------------------------------------------------------------- servers that misbehave


def refusal(provider, act="wrap"):
    key = DataKey(b"\x5a" * 32)
    wrapped = WrappedKey(provider=provider.name, key_id=provider.key_id, blob=bytes(100))
    acts = {
        "wrap": lambda: provider.wrap(key, context=CONTEXT),
        "unwrap": lambda: provider.unwrap(wrapped, context=CONTEXT),
    }
    with pytest.raises(KeyUnavailableError) as caught:
        acts[act]()
    text = f"{caught.value} {caught.value.args!r} {vars(caught.value)!r}"
    hidden = (os.environ["AWS_SECRET_ACCESS_KEY"], "WlpaWlpa", "ZZZZZZ")
    assert not [secret for secret in hidden if secret in text]
    assert caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "times"),
    [
        (400, "ThrottlingException", 3),
        (400, "AccessDeniedException", 1),
        (400, "DisabledException", 1),
    ],
)
def test_attempts_are_bounded(misbehaving, environment, status, code, times):
    def answer(request: bytes):
        # An evil server sends back what it was sent.
        body = {"__type": code, "message": request.decode("latin-1")}
        return status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(body).encode()

    server = misbehaving(answer)
    provider = AwsKmsKeyProvider(key_arn=ARN, endpoint_url=server.url)
    start = time.monotonic()
    assert f"{code}, status {status}" in refusal(provider)
    assert len(server.requests) == times
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b"{}", b'{"Plaintext":7}'])
@pytest.mark.parametrize("act", ["wrap", "unwrap"])
def test_an_answer_of_another_form_is_refused(misbehaving, environment, body, act):
    server = misbehaving(
        lambda request: (200, {"Content-Type": "application/x-amz-json-1.1"}, body)
    )
    refusal(AwsKmsKeyProvider(key_arn=ARN, endpoint_url=server.url), act)


def test_a_silent_server_does_not_hold_up_for_ever(environment):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        provider = AwsKmsKeyProvider(key_arn=ARN, endpoint_url=url, timeout=0.2)
        start = time.monotonic()
        assert "ReadTimeoutError" in refusal(provider)
        assert time.monotonic() - start < 15


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "arn",
    [
        "alias/project",
        "arn:aws:kms:eu-central-1:123456789012:alias/project",
        "00000000-0000-0000-0000-000000000000",
        "arn:aws:s3:::bucket",
        "",
    ],
)
def test_only_the_arn_of_a_key_names_it_for_good(arn):
    with pytest.raises(ConfigError, match="not the ARN"):
        AwsKmsKeyProvider(key_arn=arn)


def test_a_timeout_must_be_positive():
    with pytest.raises(ConfigError, match="timeout"):
        AwsKmsKeyProvider(key_arn=ARN, timeout=-1.0)


def test_without_its_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"lightning-secure\[aws\]"):
        AwsKmsKeyProvider(key_arn=ARN)


@pytest.mark.parametrize("encrypts", [True, False])
def test_a_role_that_may_only_wrap_seals(aws, misbehaving, encrypts):
    """As AWS answers; moto knows no policies of keys."""
    wrapped = aws.make().wrap_all(DataKey.generate(), context=CONTEXT)
    blob = json.dumps({"CiphertextBlob": "AAAA", "KeyId": wrapped[0].key_id}).encode()

    def answer(request):
        if b"Plaintext" in request and encrypts:
            return 200, {"Content-Type": "application/x-amz-json-1.1"}, blob
        kind = "AccessDeniedException" if b"CiphertextBlob" in request else "DisabledException"
        return 400, {}, json.dumps({"__type": kind, "message": "refused"}).encode()

    sealer = aws.make(endpoint_url=misbehaving(answer).url)
    if encrypts:
        sealer.confirm(wrapped, context=CONTEXT)
    else:
        with pytest.raises(KeyUnavailableError, match="DisabledException"):
            sealer.confirm(wrapped, context=CONTEXT)
