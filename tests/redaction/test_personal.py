from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.detect import personal_data
from lightning_secure.redaction.detect.personal_data import PersonalDataDetector
from lightning_secure.redaction.redactor import REDACTED, Redactor

FOUND = [
    ("card", "4111 1111 1111 1111"), ("card", "4111-1111-1111-1111"), ("card", "378282246310005"),
    ("card", "3782 822463 10005"), ("card", "6011111111111117"), ("card", "2223003122003222"),
    ("iban", "DE89 3704 0044 0532 0130 00"), ("iban", "GB82WEST12345698765432"),
    ("iban", "fr1420041010050500013m02606"), ("us-ssn", "123-45-6789"), ("us-ssn", "914-17-7763"),
    ("ip-address", "89.48.188.184"), ("ip-address", "10.0.3.17"),
    ("ip-address", "2001:db8::8a2e:370:7334"), ("ip-address", "fe80::1"),
    ("ip-address", "c16e:2284:c10f:aa40:3ba:33dc:73f7:ba8e"), ("ip-address", "2001:db8::192.0.2.1"),
    ("phone", "+44 20 7946 0958"), ("phone", "(212) 555-2368"), ("phone", "212-555-2368 x12"),
    ("phone", "+49(0)7366258517"), ("phone", "05 81 90 74 39"), ("phone", "00 33 5 63 08 37 78"),
    ("phone", "(11) 96834-4978"), ("phone", "001-258-968-3449x7869"), ("phone", "077-63 17 06"),
    ("gb-nino", "AB 12 34 56 C"), ("fr-nir", "2 95 10 99 126 111 93"),
    ("fr-nir-2a", "1 95 10 2A 126 111 72"), ("it-codicefiscale", "RCCMNL83S18D969H"),
    ("es-dni", "54362315K"), ("es-nie", "X2482300W"),
    ("br-cpf", "390.533.447-05"), ("br-cpf", "39053344705"), ("pl-pesel", "44051401359"),
    ("se-personnummer", "880320-0016"), ("fi-hetu", "131052-308T"), ("dk-cpr", "211062-5629"),
    ("be-nn", "85.07.30-033.28"), ("ch-ahv", "756.9217.0769.85"), ("de-idnr", "36 574 261 809"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "value"), FOUND)
@pytest.mark.parametrize("text", ["{}", "of {} in", "owner={}, split", "(see {}.) 3 times"])
def test_personal_data_is_found_whole(rule, value, text):
    redactor = Redactor()
    assert redactor.redact_text(text.format(value)) == text.format(REDACTED)
    assert redactor.counts == {rule: 1}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("BSN 111222333", f"BSN {REDACTED}"),
        ("SSN: 536904399", f"SSN: {REDACTED}"),
        ("NHS no 943 476 5919", f"NHS no {REDACTED}"),
        ("phone_number: 5009806360", f"phone_number: {REDACTED}"),
        ("(896)515-1437x967-Fax and 877-312-0654-Office", f"{REDACTED}-Fax and {REDACTED}-Office"),
        ("mein Telefon 08377 83", f"mein Telefon {REDACTED}"),
        ("4111 1111 1111 1111 12", f"{REDACTED} 12"),
        ("DE89 3704 0044 0532 0130 00 AND MORE", f"{REDACTED} AND MORE"),
        ("name = 'zoe@clinic.example'", f"name = '{REDACTED}'"),
        ("of o'brien@clinic.example", f"of {REDACTED}"),
    ],
)
def test_a_word_before_it_or_after_it(text, clean):
    assert Redactor().redact_text(text) == clean


LETTERED = {**{n.rule: n.form for n in personal_data._WITH_LETTERS}, "iban": personal_data._IBAN}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("national", personal_data._NATIONALS, ids=lambda national: national.rule)
def test_a_number_has_the_digits_that_its_form_asks_for(national, data):
    text = data.draw(st.from_regex(national.form))
    (match, *_) = national.form.finditer(text)
    digits = sum(map(str.isdigit, match[0]))
    assert digits >= national.digits
    if national in personal_data._OF_DIGITS:  # a run is where they are looked for
        (run,) = personal_data._DIGITS.finditer(match[0])
        assert run[0] == match[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("rule", LETTERED)
def test_one_look_sees_every_form_that_has_letters(rule, data):
    text = data.draw(st.from_regex(LETTERED[rule]))
    letters = personal_data.LOOKS.index(personal_data._LETTERS)
    assert letters in personal_data._looks()(text.encode("utf-8", "surrogatepass"))


OF_DIGITS = {
    "ssn": personal_data._SSN,
    "card": personal_data._CARD,
    **{n.rule: n.form for n in personal_data._OF_DIGITS},
}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("rule", OF_DIGITS)
def test_one_look_sees_every_form_that_has_digits_only(rule, data):
    form = OF_DIGITS[rule]
    text = data.draw(st.from_regex(form))
    assert all(personal_data._NINE.match(text, match.start()) for match in form.finditer(text))


@pytest.mark.parametrize("value", ["212-555-2368", "10.0.3.17", "54362315K"])
def test_no_noise_is_too_long_for_the_look_that_sees_all_forms_at_once(value):
    letters = random.Random(1).choices("abcdefgh012345 -:", k=400_000)
    looks = personal_data._looks()
    assert looks(b"c. 3 d: e9 " * 40_000) is None
    for noise in ("".join(letters), "c. 3 d: e9 " * 40_000):
        assert set(looks(value.encode())) <= set(looks(f"{noise} {value}".encode()))


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112", "DE88370400440532013000", "000-45-6789", "123-45-67890",
        "1732440000000", "1732440000", "111222333", "0.4111111111111111", "4111111111111111.5",
        "2024-11-24 10:17:55", "20241124", "24.11.2024 10", "12:30:05", "1.2.3", "v1.2.3.4",
        "1.2.3.4.5", "127.0.0.1:5000", "::1", "0.0.0.0", "300.1.1.1", "std::abs", "c10::add",
        "512 256 128", "[768, 3072, 12, 12]", "0.9 0.999 0.98", "3.14159265", "1e-05",
        "9e107d9d372bb6826bd81d3542a419d6", "1,234,567,890", "54362315A", "390.533.447-06",
        "torch 2.10.0", "lr=0.00001234567", "step 1234567", "12345678901234567890123",
        "cuda:0 f:1 a:b:c", "microphones 1", "5b928b78-0577-4348-bfa5-2d6147f979a1",
        "12345678-1234-4567-8901-060449573728", "runs/0577-4348", "2024-11-24T10:17:55.123456",
        "877-312-0654-abc",
    ],
)  # fmt: skip
def test_other_numbers_stay(text):
    assert Redactor().redact_text(text) == text


def test_regions():
    assert list(PersonalDataDetector(phone_regions=["JP"]).find("see 03-1234-5678"))
    assert not list(PersonalDataDetector(phone_regions=["US"]).find("see 020 7946 0958"))
    with pytest.raises(ConfigError, match="unknown countries"):
        PersonalDataDetector(phone_regions=["XX"])


def test_the_libraries_are_not_imported_before_they_are_needed():
    code = (
        "import sys, lightning_secure\n"
        "print([m for m in ('phonenumbers', 'stdnum', 're2', 'ahocorasick') if m in sys.modules])\n"
        "lightning_secure.Redactor().redact_text('adam')\n"
        "print([m for m in ('phonenumbers', 'stdnum') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\n"


PIECES = (
    "jo", "@", "x.org", ".", " ", "a" * 63, "a" * 64, "a" * 70, "'", "%", "-", "b.c", "é", "\n",
)  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_looking_near_the_signs_finds_the_addresses_that_looking_everywhere_finds(text):
    near = [(found.start, found.end) for found in personal_data._emails(text)]
    assert near == [match.span() for match in personal_data._EMAIL.finditer(text)]


@given(st.from_regex(personal_data._NORTH_AMERICAN, fullmatch=True))
def test_what_is_written_as_in_north_america_is_possible_there(number):
    import phonenumbers

    assert phonenumbers.is_possible_number(phonenumbers.parse(number, "US"))
