"""Test data of the detectors: made personal data, secrets as documented, plain text."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from faker import Faker

#: Faker's locales, each with a sentence in which a telephone number is named, and the provider of
#: its national number where Faker has one of its own.
LOCALES: Final = {
    "en_US": ("Please call me back on {} before noon.", "ssn"),
    "en_GB": ("My mobile is {}, thank you.", "ssn"),
    "de_DE": ("Sie erreichen mich unter Telefon {} ab neun Uhr.", ""),
    "fr_FR": ("Mon numéro de téléphone est le {}.", "ssn"),
    "it_IT": ("Il mio telefono è {}, grazie.", "ssn"),
    "es_ES": ("Mi teléfono es {}.", "nif"),
    "nl_NL": ("Mijn telefoonnummer is {}.", "ssn"),
    "pt_BR": ("Meu telefone é {}.", "ssn"),
    "pl_PL": ("Mój telefon to {}.", "ssn"),
    "sv_SE": ("Min telefon är {}.", "ssn"),
}
#: Sentences without any word that gives the kind away.
PLAIN: Final = ("{}", "see {} for this", "owner={}, split=train", "Record {} was changed.")
#: The Dutch number has nine digits and nearly no check: it is looked for after its name only.
NAMED: Final = {"nl_NL": "BSN {}"}


class Case(NamedTuple):
    """A text, and where personal data or a secret stands in it."""

    text: str
    kind: str
    start: int
    end: int


def _addresses(fake: Faker) -> Callable[[], str]:
    return lambda: str(fake.ipv4() if fake.pybool() else fake.ipv6())


def _case(template: str, kind: str, value: str) -> Case:
    start = template.index("{}")
    return Case(template.replace("{}", value), kind, start, start + len(value))


def personal(each: int, seed: int) -> Iterator[Case]:
    """Yield ``each`` values of every kind in every locale."""
    for locale, (named, national) in LOCALES.items():
        fake = Faker(locale)
        fake.seed_instance(seed)
        kinds: dict[str, Callable[[], str]] = {
            "e-mail": fake.email,
            "iban": fake.iban,
            "ip": _addresses(fake),
            "card": fake.credit_card_number,
            "phone": fake.phone_number,
        }
        if locale == "en_US":
            kinds["ssn"] = fake.ssn
        elif national:
            kinds["national number"] = getattr(fake, national)
        for kind, make in kinds.items():
            for number in range(each):
                template = PLAIN[number % len(PLAIN)]
                if kind == "national number":
                    template = NAMED.get(locale, template)
                if kind == "phone":
                    template = named
                yield _case(template, kind, make())
        for number in range(each):
            yield _case(PLAIN[number % len(PLAIN)], "phone, not named", fake.phone_number())


def filled(templates: list[str], seed: int) -> Iterator[tuple[str, list[Case]]]:
    """Fill the templates of presidio-evaluator: yield each text, and what stands in it."""
    fake = Faker("en_US")
    fake.seed_instance(seed)
    kinds: dict[str, tuple[str, Callable[[], Any]]] = {
        "credit_card_number": ("card", fake.credit_card_number),
        "phone_number": ("phone", fake.phone_number),
        "email": ("e-mail", fake.email),
        "iban": ("iban", fake.iban),
        "ssn": ("ssn", fake.ssn),
        "ip_address": ("ip", fake.ipv4),
    }
    other: dict[str, Callable[[], Any]] = {
        "organization": fake.company, "person": fake.name, "address": fake.address,
        "name_female": fake.name_female, "name_male": fake.name_male,
        "age": lambda: fake.random_int(1, 99),
        "date_of_birth": fake.date, "date_time": fake.date_time, "url": fake.url,
        "zipcode": fake.zipcode, "nationality": fake.country,
    }  # fmt: skip
    for template in templates:
        text, found = "", []
        pieces = template.replace("\\n", "\n").split("{{")
        for number, piece in enumerate(pieces):
            name, closed, rest = piece.partition("}}")
            if number == 0 or not closed:
                text += piece
                continue
            if name in kinds:
                kind, make = kinds[name]
                value = str(make())
                found.append(Case("", kind, len(text), len(text) + len(value)))
            else:
                value = str((other.get(name) or getattr(fake, name, None) or fake.word)())
            text += value + rest
        yield text, found


_LOWER, _UPPER, _DIGIT = string.ascii_lowercase, string.ascii_uppercase, string.digits
_HEX, _ALNUM = "0123456789abcdef", string.ascii_letters + string.digits
_URL64 = _ALNUM + "-_"

#: As the issuers document them: literal text, and (alphabet, length) of what is drawn.
FORMATS: Final[dict[str, tuple[str | tuple[str, int], ...]]] = {
    "AWS access key id": ("AKIA", (_UPPER + "234567", 16)),
    "AWS temporary key id": ("ASIA", (_UPPER + "234567", 16)),
    "GitHub personal token": ("ghp_", (_ALNUM, 36)),
    "GitHub OAuth token": ("gho_", (_ALNUM, 36)),
    "GitHub app token": ("ghs_", (_ALNUM, 36)),
    "GitHub refresh token": ("ghr_", (_ALNUM, 36)),
    "GitHub fine-grained token": ("github_pat_", (_ALNUM, 22), "_", (_ALNUM, 59)),
    "GitLab personal token": ("glpat-", (_URL64, 20)),
    "GitLab deploy token": ("gldt-", (_URL64, 20)),
    "GitLab runner token": ("glrt-", (_URL64, 20)),
    "GitLab trigger token": ("glptt-", (_HEX, 40)),
    "Slack bot token": ("xoxb-", (_DIGIT, 12), "-", (_DIGIT, 12), "-", (_ALNUM, 24)),
    "Slack user token": (
        "xoxp-", (_DIGIT, 12), "-", (_DIGIT, 12), "-", (_DIGIT, 12), "-", (_HEX, 32),
    ),
    "Slack app token": ("xapp-1-", (_UPPER + _DIGIT, 11), "-", (_DIGIT, 13), "-", (_HEX, 64)),
    "Slack webhook": (
        "https://hooks.slack.com/services/T", (_UPPER, 8), "/B", (_UPPER, 8), "/", (_ALNUM, 24),
    ),
    "Stripe live key": ("sk_live_", (_ALNUM, 24)),
    "Stripe test key": ("sk_test_", (_ALNUM, 24)),
    "Stripe restricted key": ("rk_live_", (_ALNUM, 99)),
    "Google API key": ("AIza", (_URL64, 35)),
    "Google OAuth secret": ("GOCSPX-", (_URL64, 28)),
    "Hugging Face token": ("hf_", (string.ascii_letters, 34)),
    "OpenAI key": ("sk-", (_ALNUM, 20), "T3BlbkFJ", (_ALNUM, 20)),
    "OpenAI project key": ("sk-proj-", (_URL64, 74), "T3BlbkFJ", (_URL64, 74)),
    "Anthropic key": ("sk-ant-api03-", (_URL64, 93), "AA"),
    "Databricks token": ("dapi", (_HEX, 32)),
    "DigitalOcean token": ("dop_v1_", (_HEX, 64)),
    "npm token": ("npm_", (_ALNUM, 36)),
    "PyPI token": ("pypi-AgEIcHlwaS5vcmc", (_URL64, 150)),
    "SendGrid key": ("SG.", (_URL64, 22), ".", (_URL64, 43)),
    "Twilio key": ("SK", (_HEX, 32)),
    "Mailchimp key": ((_HEX, 32), "-us", (_DIGIT, 2)),
    "Mailgun key": ("key-", (_HEX, 32)),
    "Telegram bot token": ((_DIGIT[1:], 10), ":AA", (_URL64, 33)),
    "Discord bot token": ("M", (_ALNUM, 23), ".", (_URL64, 6), ".", (_URL64, 27)),
    "Shopify token": ("shpat_", (_HEX, 32)),
    "Square secret": ("sq0csp-", (_URL64, 43)),
    "Vault token": ("hvs.", (_URL64, 24)),
    "Grafana token": ("glsa_", (_ALNUM, 32), "_", (_HEX, 8)),
    "Linear key": ("lin_api_", (_ALNUM, 40)),
    "New Relic key": ("NRAK-", (_UPPER + _DIGIT, 27)),
    "Notion token": ("ntn_", (_ALNUM, 46)),
    "Postman key": ("PMAK-", (_HEX, 24), "-", (_HEX, 34)),
    "Pulumi token": ("pul-", (_HEX, 40)),
    "Terraform token": ((_ALNUM, 14), ".atlasv1.", (_ALNUM, 67)),
    "Azure storage key": ("AccountKey=", (_ALNUM + "+/", 86), "=="),
    "Azure client secret": ((_ALNUM, 3), (_DIGIT, 1), "Q~", (_ALNUM + "-._~", 34)),
    "Docker token": ("dckr_pat_", (_URL64, 27)),
    "age key": ("AGE-SECRET-KEY-1", ("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58)),
    "JSON web token": ("eyJ", (_URL64, 33), ".eyJ", (_URL64, 60), ".", (_URL64, 43)),
    "private key": (
        "-----BEGIN PRIVATE KEY-----\n", (_ALNUM + "+/", 64), "\n-----END PRIVATE KEY-----",
    ),
    "password in a URL": ("postgresql://bob:", (_ALNUM, 16), "@"),
}  # fmt: skip
SECRET_SENTENCES: Final = ("{}", "key {} in a log line", "value='{}'", '{"x": "{}"}', "({}), again")


def secrets(each: int, seed: int) -> Iterator[Case]:
    """Yield ``each`` secrets of every format."""
    draw = random.Random(seed)
    for kind, parts in FORMATS.items():
        for number in range(each):
            value = "".join(
                part if isinstance(part, str) else "".join(draw.choices(part[0], k=part[1]))
                for part in parts
            )
            case = _case(SECRET_SENTENCES[number % len(SECRET_SENTENCES)], kind, value)
            # Of a URL only what stands between :// and @ is secret.
            inner = value.find("://") + 3 if kind == "password in a URL" else 0
            yield case._replace(start=case.start + inner, end=case.end - bool(inner))


def harmless(number: int, seed: int) -> list[str]:
    """Return lines of prose, of logs and with digests, ids and paths: none holds a secret."""
    fake = Faker(list(LOCALES))
    fake.seed_instance(seed)
    draw = random.Random(seed)
    made: list[Callable[[], str]] = [
        fake.sentence,
        lambda: f"epoch={draw.randrange(99)} train_loss={draw.random():.6f} lr={draw.random():.2e}",
        lambda: f"sha256 {draw.randbytes(32).hex()} of {fake.file_path(depth=3)}",
        lambda: f"commit {draw.randbytes(20).hex()} ({fake.word()}): {fake.sentence()}",
        lambda: f"run {fake.uuid4()} of experiment {draw.randrange(10**6)} began {fake.iso8601()}",
        lambda: f"{fake.word()}/{fake.word()}:{draw.randrange(9)}.{draw.randrange(99)}.0",
        lambda: f"layers.{draw.randrange(48)}.query.weight torch.Size([{draw.randrange(4096)}])",
        lambda: f"pad_token_id={draw.randrange(10**5)}, max_new_tokens={draw.randrange(4096)}",
        lambda: f"seen {draw.randrange(10**12)} tokens, {draw.uniform(1, 9e6):.3f} per second",
        lambda: f"https://{fake.domain_name()}/{fake.uri_path()}?page={draw.randrange(99)}",
    ]  # fmt: skip
    return [made[i % len(made)]() for i in range(number)]


def configuration_names() -> list[str]:
    """Return the names of all settings of transformers' configurations and tokenizers."""
    import inspect

    import transformers
    from transformers.models.auto import configuration_auto

    names: set[str] = set()
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:  # type: ignore[attr-defined]
        try:
            of = configuration_auto.CONFIG_MAPPING[kind]
            names |= set(inspect.signature(of.__init__).parameters) | set(vars(of()))
        except Exception:  # noqa: BLE001 # some want further packages or settings
            continue
    names |= set(vars(transformers.GenerationConfig()))  # type: ignore[no-untyped-call]
    names |= set(inspect.signature(transformers.TrainingArguments).parameters)
    return sorted(names)


def parameters() -> list[str]:
    """Return texts as they are logged as params: long ones, of real configurations, as JSON."""
    import transformers

    kinds = ("Bert", "CLIP", "Clap", "DPT", "Gemma", "Llama", "Mixtral", "OPT", "Qwen2", "T5",
             "VideoMAE", "ViT", "Wav2Vec2", "Whisper", "XLM", "Yoso")  # fmt: skip
    configurations = (getattr(transformers, f"{kind}Config")() for kind in kinds)
    return [made.to_json_string(use_diff=False) for made in configurations]


def short_parameters() -> list[str]:
    """Return the same settings as Lightning logs them: a name, and a value, of each."""
    texts = []
    for text in parameters():
        for name, value in _flat("", json.loads(text)):
            texts += [name, str(value)]
    return texts


def _flat(above: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield above, value
        return
    for name, item in value.items():
        yield from _flat(f"{above}/{name}" if above else name, item)
