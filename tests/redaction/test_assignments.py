from __future__ import annotations

import time

import pytest

from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.redactor import REDACTED, Redactor

ASSIGNMENTS = [
    "password={}", "password = {}", "the password: {}, and more", "PASSWORD:={}", "password%3D{}",
    "pwd=={}", "db.password='{}'", 'x, password="{}", y', "password=b'{}'", 'password="""{}"""',
    "password: str = '{}'", "def f(password: str = '{}')", '{{"lr": 1, "password": "{}"}}',
    '"{{\\"password\\": \\"{}\\"}}"', '"password":\n    "{}"', "{{'passwords': ['a', '{}']}}",
    "passwords=[a, ('{}')]", "api_keys: {{'a': {{'b': '{}'}}}}", "api_keys=['a)', '{}'",
    'os.environ["DB_PASSWORD"] = "{}"', "Config(lr=1, password='{}')", "Config(password={})",
    "export AWS_SECRET_ACCESS_KEY={}", "AWS_SECRET_ACCESS_KEY={} python x.py --lr 3",
    "setenv DB_PASSWORD {}", "ENV DB_PASSWORD {}", "train.py --db-password {} --lr 3",
    "train.py --db-password={}", "x --api-key '{}'", "['x', '--password', '{}']",
    '["x","--password","{}"]',
    "curl -u bob:{} https://h/x", "curl --user bob:{}", "Authorization: Bearer {}",
    "curl -H 'Authorization: Basic {}' https://h/", '{{"Authorization": "Bearer {}"}}',
    "authorization: {}", "X-Api-Key: {}", "Cookie: a=b; session={}", "got Bearer {}",
    "token: {} inside a longer string", "https://h/p?lr=3&access_token={}&x=1", "?api_key={}#top",
    "AWS Secret Access Key: {}", "my api key = {}", "machine h login bob password {}",
    "the password is {}", "<password>{}</password>", "<db:password a='b'>{}</x>",
    '<add key="password" value="{}"/>', '{{"name": "DB_PASSWORD", "value": "{}"}}',
    "- name: DB_PASSWORD\n  value: {}", "db:\n  password: correct horse {}\n  lr: 3",
    "password = correct horse {}", "secrets:\n  db:\n    - a\n    - {}\nlr: 3",
    "secrets:\n- a\n\n- {}\nlr: 3", "password: |\n  a\n  {}\nlr: 3",
    "passwords:\r\n  a: {}\r\nlr: 3", "api_key_prod={}", "password1={}", "tokens: {}",
    "password='{}", "password=a,b;{}", "password=a&{}", "password=(a {}", "password: `{}`",
    "password='don\\'t {}'", "token=token {}", "a=1\tpassword={}\tb=2",
    "-----BEGIN PRIVATE KEY-----\nMIIE\n{}\n-----END PRIVATE KEY-----",
    "-----BEGIN EC PRIVATE KEY-----\n{}", "no secret, but se_cret={}",
]  # fmt: skip


@pytest.mark.parametrize("form", ASSIGNMENTS)
def test_secrets_in_free_text_are_known_by_the_name_before_them(form):
    text = form.format("hunter2Kestrel")
    redactor = Redactor()
    clean = redactor.redact_text(text)
    assert "hunter2" not in clean
    assert "Kestrel" not in clean
    assert REDACTED in clean
    assert redactor.redact_text(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("password=hunter2, user=x", f"password={REDACTED}, user=x"),
        ("password=hunter2,user=x", f"password={REDACTED},user=x"),
        ("?token=abc&lr=3", f"?token={REDACTED}&lr=3"),
        ("got: token: abc, in a longer string", f"got: token: {REDACTED}, in a longer string"),
        ("x.py --db-password x --lr 3", f"x.py --db-password {REDACTED} --lr 3"),
        ("export A_SECRET=x y=2", f"export A_SECRET={REDACTED} y=2"),
        ('{"password": "a", "lr": 3}', f'{{"password": "{REDACTED}", "lr": 3}}'),
        ("a:\n  password: x y\n  lr: 3", f"a:\n  password: {REDACTED}\n  lr: 3"),
        ("secrets:\n  a: x\nlr: 3", f"secrets:\n  {REDACTED}\nlr: 3"),
        ("secrets:\n- a\n- x\nlr: 3", f"secrets:\n- {REDACTED}\nlr: 3"),
        ("secrets:\n  - a\n\n  - x\nlr: 3", f"secrets:\n  - {REDACTED}\nlr: 3"),
        ("secrets:\nlr: 3", "secrets:\nlr: 3"),
        ("H 'Authorization: Basic x' y", f"H 'Authorization: Basic {REDACTED}' y"),
    ],
)
def test_the_text_around_a_secret_stays(text, clean):
    assert Redactor().redact_text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "lr=0.1, num_tokens=5", "eos_token='</s>'", "max_new_tokens: 100", "--max-tokens 5",
        "x: y: z", "pad token: [PAD]", "password_file=/run/secrets/x", "key=3",
        "--use-token --lr 3", "token", "password", "password:", "password=",
        "a password and a token", "def f(lr: float = 0.1)", "https://h/x",
        "Linear(in_features=3, bias=True)", "the bearer of news", "<eos_token>", "12:30:05",
        "forward_pass=1", '{"eos_token": {"content": "</s>"}}', "see password:\nnothing",
    ],
)  # fmt: skip
def test_text_without_secrets_is_left_alone(text):
    assert Redactor().redact_text(text) == text


def test_long_lines_take_linear_time():
    """An address rule that backtracks would take minutes."""
    start = time.perf_counter()
    for text in (
        "a" * 200_000, "a@" * 100_000, "a." * 100_000, "://" + "a:" * 100_000, "password" * 20_000,
        "password " * 20_000, "token=(" * 20_000, "--token (" * 20_000, "token='" * 20_000,
        "--token '" * 20_000, "\\" * 100_000 + '"', "token=[" + "\\" * 100_000,
        "name=token " * 10_000, "<token " * 20_000, "login x " * 20_000, "-u x " * 20_000,
        "token:" + "\n" * 100_000, "token: x\n" * 20_000, "token=a,b " * 20_000, "a: \n" * 50_000,
        "token:" + " " * 100_000, "token=" + "," * 100_000, "-----BEGIN PRIVATE KEY" * 9_000,
    ):  # fmt: skip
        Redactor().redact_text(text)
        list(PersonalDataDetector().find(text))
    assert time.perf_counter() - start < 20
