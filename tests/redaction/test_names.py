from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_secure.redaction.detect import secret_names
from lightning_secure.redaction.detect.secret_names import STEMS, KeyNameDetector
from lightning_secure.redaction.redactor import REDACTED, Redactor

SECRET_NAMES = [
    "password", "db_password", "dbPassword", "DB-PASSWORD", "passwd", "pwd", "passphrase",
    "secret", "client_secret", "api_key", "apiKey", "APIKey", "openai.api_key",
    "aws_secret_access_key", "hub_token", "hubToken", "token", "auth/token", "private_key",
    "credentials", "account_key", "connection_string", "databricks_token", "wandb_api_key",
    "passwords", "api_keys", "apiKeys", "tokens", "hub_tokens", "authTokens", "access_tokens",
    "secrets/db/0", "users/0/password", "password1", "password_2", "api_key_prod", "api_key_v2",
    "token_staging", "hub_token_2", "token1", "secrets_prod", "password_hash", "PGPASSWORD",
    "OpenAIAPIKey", "openaiapikey", "dbpassword", "pass_word", "api/key", "openai/api/key/0",
    "tokens[0]", "token/0", "model/token", "db.password.value", "secret_id", "DB_PASS", "pass",
    "MYSQL_PWD", "ssh_key", "X-Api-Key", "Authorization", "cookies",
    "\N{FULLWIDTH LATIN SMALL LETTER P}assword",
    "('db', 'password')", "AWS_SECRET_ACCESS_KEY", "signing-key",
]  # fmt: skip
HARMLESS_NAMES = [
    "pad_token_id", "max_new_tokens", "use_cls_token", "bos_token", "eos_token", "num_tokens",
    "tokenizer", "key", "num_key_value_heads", "monkey", "secretary_problem", "password_length",
    "token_type_ids", "keyword", "image_token", "key_dim", "lr", "batch_size", "passes",
    "accessor", "additional_special_tokens", "eos_token/content", "tokenizer/eos_token",
    "sep_token_1", "n_tokens", "prompt_tokens", "forward_pass", "total_tokens", "bypass",
    "password_file", "credentials_path", "secret_name", "turnkey", "passthrough", "secretion",
    "private", "access", "api", "api/version", "keys/0", "passage",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert KeyNameDetector().matches(name)
    assert Redactor().redact({name: "value"}) == {name: REDACTED}
    assert Redactor().redact({name: 1234}) == {name: REDACTED}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_names_of_other_settings(name):
    assert not KeyNameDetector().matches(name)
    assert Redactor().redact({name: "value"}) == {name: "value"}


PIECES = (*STEMS, "api", "Key", "PASS", "db", "num", "id", "se", "cret", "pass", "word", "conn",
          "String", "1", "_", "-", ".", "/", "[0]", " ", "ü", "\n", "\0")  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
def test_no_name_of_a_secret_is_without_its_stems(name):
    assert secret_names._names_a_secret(name) == secret_names._has_secret_words(name)


def test_no_setting_of_a_real_library_is_taken_for_a_secret():
    lines = (Path(__file__).parent / "config_names.txt").read_text().splitlines()
    found = [line for line in lines if not line.startswith("#")]
    assert len(found) > 150
    assert [name for name in found if KeyNameDetector().matches(name)] == []
