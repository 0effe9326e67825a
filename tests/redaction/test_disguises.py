"""What is spelt otherwise is found as well, and other spellings are left alone."""

from __future__ import annotations

import base64
import string
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_secure.redaction.detect.detectors import PatternDetector
from lightning_secure.redaction.detect.obfuscated import DisguiseDetector, folded
from lightning_secure.redaction.redactor import REDACTED, Redactor

TOKEN = "AKIA0001QZXCVBNMASDF"
PASSWORD = "Vk001Lq9Zr001xWintergreen"
ADDRESS = "mary.q@clinic.example"
TEXT = f"write to {ADDRESS}, password={PASSWORD} !"


@pytest.mark.parametrize(
    ("disguise", "shown"),
    [
        ("\uff21KIA0001QZXCVBNMASDF", REDACTED),
        ("AKIA0001\u200bQZXCVBNMASDF.", f"{REDACTED}."),
        ("to mary.q\uff20clinic\uff0eexample!", f"to {REDACTED}!"),
        ("to mary.q@clin\u00adic.example ok", f"to {REDACTED} ok"),
        (f"p\u0430ssw\u043erd={PASSWORD} ok", f"p\u0430ssw\u043erd={REDACTED} ok"),
        (f"pa\u0332ssword={PASSWORD}", f"pa\u0332ssword={REDACTED}"),
        ("see " + urllib.parse.quote(f"{ADDRESS} !"), f"see {REDACTED}%20%21"),
        (f"q=password%3D{PASSWORD}%20y", f"q=password%3D{REDACTED}"),
        ("".join(f"%{byte:02x}" for byte in TOKEN.encode()), REDACTED),
        (f"\u00e9 10% of {urllib.parse.quote(ADDRESS)} 20%", f"\u00e9 10% of {REDACTED} 20%"),
        (TOKEN.encode().hex(), REDACTED),
        (
            f"{{&#x27;api_key&#39;: &quot;{PASSWORD}&quot;}}",
            f"{{&#x27;api_key&#39;: &quot;{REDACTED}&quot;}}",
        ),
        ("mary.q&commat;clinic&period;example &amp; co", f"{REDACTED} &amp; co"),
        (f"<{TOKEN.encode().hex().upper()}>", f"<{REDACTED}>"),
    ],
)
def test_it_is_found_at_its_place(disguise, shown):
    assert Redactor().redact_text(disguise) == shown
    assert Redactor().redact({"a": [disguise]}) == {"a": [shown]}


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
@pytest.mark.parametrize("before", ["", "?>", "\u00ff ", "x" * 300 + " "])
def test_base64_is_found_whole(encode, encoding, before):
    coded = encode((before + TEXT).encode(encoding)).decode()
    for word in (coded, coded.rstrip("=")):
        clean = Redactor().redact_text(f"blob: {word}; {'y ' * 200}")
        assert clean.startswith(f"blob: {REDACTED}")
        assert word[:12] not in clean
        assert word[-12:] not in clean


def readable(data):
    """As a reader would have it who tries everything."""
    try:
        text = data.decode("utf-16-le" if b"\0" in data else "utf-8")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\t\r\n" for letter in text)


# Any words, words of small letters as names are, texts, and texts that are cut or damaged.
WORDS = st.one_of(
    st.text(string.ascii_letters + string.digits + "+/", min_size=16, max_size=40),
    st.text(string.ascii_lowercase + string.digits + "_-", min_size=16, max_size=40),
    st.tuples(
        st.text(st.characters(codec="utf-8"), min_size=6, max_size=20),
        st.sampled_from(["utf-8", "utf-16-le"]),
        st.integers(-3, 0),
        st.sampled_from(["", "A", "w", "_"]),
    ).map(
        lambda drawn: (
            base64.b64encode(drawn[0].encode(drawn[1])).decode().strip("=")[: drawn[2] or None]
            + drawn[3]
        )
    ),
).filter(lambda word: len(word) >= 16)


@given(WORDS, st.sampled_from(["", "a b ", "\u00e9?", "." * 300]))
def test_no_word_is_passed_over_that_can_be_read(word, before):
    plain = word.replace("-", "+").replace("_", "/")
    plain = plain[: len(plain) - (len(plain) % 4 == 1)]
    data = base64.b64decode(plain + "=" * (-len(plain) % 4))
    found = list(DisguiseDetector([PatternDetector("any", "(?s).")]).find(f"{before}{word}; end"))
    if not set(word) <= set(string.hexdigits):
        assert bool(found) == readable(data)
    assert all((at.start, at.end) == (len(before), len(before) + len(word)) for at in found)


@pytest.mark.parametrize(
    "word",
    [
        base64.b64encode("\u0141: a letter with a one in it".encode("utf-16-le")).decode(),
        base64.b64encode("\u8485\u84ff from the far east".encode("utf-16-le")).decode(),
    ],
)
def test_what_begins_oddly_is_read_too(word):
    assert [*DisguiseDetector([PatternDetector("any", "(?s).")]).find(word)]


@pytest.mark.parametrize(
    "name",
    ["p\u0430ssword", "\uff41pi_key", "to\u200bken", "\u0455ecret", "\u0430token", "\u03bfcookie"],
)
def test_a_name_that_only_looks_different_is_one(name):
    assert Redactor().redact({name: "hunter2"}) == {name: REDACTED}


@pytest.mark.parametrize(
    "text",
    [
        "a &amp; b &lt;c&gt; &nosuch;",
        "100% of 50%25", "%zz %", "a%20b", "caf\u00e9 \u2026 na\u00efve \uff21\uff22",
        "\u043f\u0440\u0438\u0432\u0435\u0442 \u0441\u0435\u043a\u0440\u0435\u0442: \u043d\u0435",
        base64.b64encode(b"a harmless text about nothing at all").decode(),
        base64.b64encode(bytes(range(64))).decode(),
        "/home/user/projects/name/checkpoints/epoch=3-step=400.ckpt",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "organizational_unit_identifier", "A" * 17, "=" * 40,
    ],
)  # fmt: skip
def test_what_hides_nothing_is_left_alone(text):
    assert Redactor().redact_text(text) == text


def test_letters_that_look_alike_are_folded_and_others_are_not():
    assert folded("\u0420\u0430ss\u200d\u03bfr\uff44") == "Passord"
    assert folded("\u00e4\u4e2d\u0434") == "\u00e4\u4e2d\u0434"
    assert folded(TEXT) is TEXT


def test_a_users_own_pattern_is_found_in_disguise_too():
    redactor = Redactor(extra_patterns=[r"MRN-\d+"])
    assert redactor.redact_text("MRN%2D123 \uff2dRN-4 " + b"patient MRN-5678".hex()) == (
        f"{REDACTED} {REDACTED} {REDACTED}"
    )
    assert redactor.counts["extra-0"] == 3
