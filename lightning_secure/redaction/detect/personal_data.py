"""Personal data that has a form or check digits of its own."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import Final, NamedTuple

from lightning_secure.errors import ConfigError
from lightning_secure.redaction.detect.finding import Finding

#: Where a telephone number without a country's code may be at home.
PHONE_REGIONS: Final = ("US", "GB", "DE", "FR", "IT", "ES", "NL", "BR", "PL", "SE")

#: Characters of the part before the @ (RFC 5321, section 4.5.3.1.1).
_LOCAL: Final = 64
# The characters of RFC 5321's local part that people use, but a quote before it is the text's;
# bounded, so that a long line without an address takes linear time.
_EMAIL: Final = re.compile(
    r"(?<![\w.+%-])([\w.+%-][\w.+%'-]{0,63}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24})(?![\w-])"
)
# Numbers of people are looked for where so many digits stand near each other.
_DIGITS: Final = re.compile(r"\d(?:[ .()/+\-]{0,3}\d){6,}+", re.ASCII)
# Numbers of digits only, but of no telephone: nine at least, with at most a sign between two.
_NINE: Final = re.compile(r"(?<![\w.-])\d(?:[ .+-]?\d){8}", re.ASCII)
_FRACTION: Final = re.compile(r"\d{1,2}\.\d+|\d+\.\d{1,2}", re.ASCII)
_IPV4: Final = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)", re.ASCII)
_IPV6: Final = re.compile(
    r"(?<![\w:.])(?:::|(?:[\da-f]{1,4}:{1,2}){2,7}|[\da-f]{1,4}::)"
    r"(?:\d{1,3}(?:\.\d{1,3}){3}|[\da-f]{1,4}(?!\.\d))?(?![\w:])",
    re.IGNORECASE | re.ASCII,
)
_CARD: Final = re.compile(
    r"(?<![\w.-])(?:\d{12,19}|\d{4}([ -])\d{4,6}\1\d{4,5}(?:\1\d{1,4}){0,2})(?!\w|\.\d)", re.ASCII
)
# The ranges of the schemes, with their lengths (ISO/IEC 7812);
# milliseconds since 1970 begin with 1.
_ISSUED: Final = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|3[47]\d{13}|3[0689]\d{12}|(?:1800|2131)\d{11}"
    r"|(?:5[1-5]|2[2-7]|35|6[0-9])\d{14}|3[0568]\d{14,17}|(?:62|5[068]|6[0-9])\d{15,17}|5[0678]\d{11,14}"
    r"|(?:0604|50[123]|5[678]\d|6304|6390|67[56])\d{8,9}"
)
_SSN: Final = re.compile(r"(?<![\w.-])(?!000|666)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])", re.ASCII)
_IBAN: Final = re.compile(
    r"(?<![a-z\d])[a-z]{2}\d\d(?:[ -]?[a-z\d]){11,30}(?![a-z\d])", re.ASCII | re.IGNORECASE
)
_PHONE: Final = re.compile(
    r"(?<![\w.,+/-])(?:\(?\+ ?|\(?)\d(?:(?: ?\(| [-/] |[ ./-]|\)[ /-]?)?\d){6,16}+"
    r"(?: ?(?:x|ext\.? ?|#)\d{1,7})?(?![\w@]|[.,:]\d|[/-](?!(?-i:[A-Z][a-z]{2,}(?!\w)))\w)",
    re.ASCII | re.IGNORECASE,
)
# How numbers are written that need no word before them: with the country's code; as in North
# America; with the 0 of a trunk line and a sign or ten digits; as in Brazil.
_WRITTEN: Final = re.compile(
    r"\(?(?:\+|00).*"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?\d{3}|\d{3}([.-])\d{3}\1|\d{3} \d{3})-?\d{4}(?: ?(?:x|ext).*)?"
    r"|\(0\d{1,4}\)[ /-]?\d[\d -]*|0\d{1,4}[ /-]\d[\d -]*|0\d{9,10}"
    r"|(?:\(\d\d\)|\d\d) 9?\d{4}-\d{4}",
    re.IGNORECASE,
)
# Of these forms each number is possible in the US, as phonenumbers sees it, which takes its time.
_NORTH_AMERICAN: Final = re.compile(
    r"(?:\([2-9]\d\d\) ?\d{3}|[2-9]\d\d([.-])\d{3}\1|[2-9]\d\d \d{3})-?\d{4}", re.ASCII
)
_DECIMAL: Final = re.compile(r"\d+\.\d+(?:[ /()-]|$)|\d\.\d")
_DATE: Final = re.compile(
    r"(?:1[6-9]|20)\d\d([-./ ]?)[01]\d\1[0-3]\d(?!\d{3})|[0-3]?\d[-./][0-3]?\d[-./](?:19|20)\d\d"
)
_PHONE_WORD: Final = re.compile(
    r"phone(?!me|ti)|t[eé]l[eéè]foo?n|\b(?:tel|telf|tél|fax|mobil[eo]?|sms|whatsapp|appele[rz]"
    r"|call (?:me|us|him|her|them|back|at|on)|cellulare|celular|mobiel|kom[oó]rk\w*|rufnummer"
    r"|ll[aá]m\w*|chiam\w*|ligue|zadzwo\w*)\b",
    re.IGNORECASE,
)
#: How far before a number its name may stand, in characters.
_NEAR: Final = 40


class _National(NamedTuple):
    """A number that a state gives a person.

    Attributes:
        rule: Under which it is counted.
        form: Of the number.
        digits: How many it has at least.
        module: Of python-stdnum, which knows its check digits; without one the form is enough.
        near: Words that must stand shortly before it, where form and check digit prove little.
    """

    rule: str
    form: re.Pattern[str]
    digits: int
    module: str = ""
    near: re.Pattern[str] | None = None


def _form(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w.-])(?:{pattern})(?!\w|\.\d|-\w)", re.ASCII | re.IGNORECASE)


def _near(words: str) -> re.Pattern[str]:
    return re.compile(words, re.IGNORECASE)


_NATIONALS: Final = (
    _National("us-ssn", _form(r"\d{9}"), 9, "us.ssn", _near(r"\bssn\b|social security")),
    _National(
        "gb-nino",
        _form(r"(?!BG|GB|NK|KN|TN|NT)[A-CEGHJ-PR-TW-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-DT]"),
        6,
    ),
    _National("gb-nhs", _form(r"\d{3}[ -]?\d{3}[ -]?\d{4}"), 10, "gb.nhs", _near(r"\bnhs\b")),
    _National("de-idnr", _form(r"\d\d ?\d{3} ?\d{3} ?\d{3}"), 11, "de.idnr"),
    _National("fr-nir", _form(r"[12] ?\d\d ?\d\d ?\d\d ?\d{3} ?\d{3} ?\d\d"), 15, "fr.nir"),
    _National("fr-nir-2a", _form(r"[12] ?\d\d ?\d\d ?2[AB] ?\d{3} ?\d{3} ?\d\d"), 14, "fr.nir"),
    _National(
        "it-codicefiscale",
        _form(r"[A-Z]{6}[\dL-NP-V]{2}[A-EHLMPR-T][\dL-NP-V]{2}[A-Z][\dL-NP-V]{3}[A-Z]"),
        0,
        "it.codicefiscale",
    ),
    _National("es-dni", _form(r"\d{8}[ -]?[A-Z]"), 8, "es.dni"),
    _National("es-nie", _form(r"[XYZ][ -]?\d{7}[ -]?[A-Z]"), 7, "es.nie"),
    _National("nl-bsn", _form(r"\d{9}"), 9, "nl.bsn", _near(r"\bbsn\b|burgerservice|sofi-?nummer")),
    _National("br-cpf", _form(r"\d{3}\.?\d{3}\.?\d{3}-?\d\d"), 11, "br.cpf"),
    _National("pl-pesel", _form(r"\d{11}"), 11, "pl.pesel"),
    _National("se-personnummer", _form(r"(?:\d\d)?\d{6}[-+]\d{4}"), 10, "se.personnummer"),
    _National("fi-hetu", _form(r"\d{6}[-+A-FU-Y]\d{3}[\dA-Y]"), 9, "fi.hetu"),
    _National("dk-cpr", _form(r"\d{6}-\d{4}"), 10, "dk.cpr"),
    _National("be-nn", _form(r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"), 11, "be.nn"),
    _National("ch-ahv", _form(r"756\.?\d{4}\.?\d{4}\.?\d\d"), 13, "ch.ssn"),
)
# Numbers with letters, looked for in the whole text; the others lie within a run of digits.
_LETTERED: Final = ("gb-nino", "fr-nir-2a", "it-codicefiscale", "es-dni", "es-nie", "fi-hetu")
_WITH_LETTERS: Final = tuple(national for national in _NATIONALS if national.rule in _LETTERED)
_OF_DIGITS: Final = tuple(national for national in _NATIONALS if national.rule not in _LETTERED)

# A part that each of them needs, in RE2's syntax: one look tells that most texts hold none.
_NUMBER: Final = r"\d(?:[ .()/+\-]{0,3}\d){6}"
_LETTERS: Final = (
    r"(?i:(?:\b|_)(?:[a-z]{2}\d\d(?:[ -]?[a-z\d]){11}|(?:[a-z]{2} ?\d\d ?\d\d ?\d\d ?[a-dt]"
    r"|[12] ?\d\d ?\d\d ?2[ab] ?\d{3} ?\d{3} ?\d\d|\d{6}[-+a-fu-y]\d{3}[\da-y]"
    r"|(?:\d|[xyz][ -]?)\d{7}[ -]?[a-z]"
    r"|[a-z]{6}[\dl-np-v]{2}[a-ehlmpr-t][\dl-np-v]{2}[a-z][\dl-np-v]{3}[a-z])\b))"
)
_ADDRESS: Final = r"(?i:\d\.\d{1,3}\.\d{1,3}\.\d|[\da-f]:[\da-f]{0,4}:|::[\da-f])"
#: Without a match of one of these, or an @, a text holds nothing that is found here.
LOOKS: Final = (_NUMBER, _LETTERS, _ADDRESS)


@cache
def _looks() -> Callable[[bytes], Sequence[int] | None]:
    """Return what says which of ``LOOKS`` match, by their positions."""
    import re2

    # Where its memory is full, a set forgets states and goes on; with too little it is not made.
    looks = re2.Set.SearchSet()
    for pattern in LOOKS:
        looks.Add(pattern.encode())
    looks.Compile()
    found: Callable[[bytes], Sequence[int] | None] = looks.Match
    return found


class PersonalDataDetector:
    """Finds e-mail and IP addresses, payment cards, IBANs, telephone and national numbers.

    Args:
        phone_regions: Countries (ISO 3166, two capital letters) in whose national form telephone
            numbers are recognised. With a country's code they are recognised from everywhere.

    Cards, IBANs and national numbers count only if their check digits are right, where they have
    some. A telephone number has the country's code, or is written as in one of the regions; after
    such a word as "phone" any form will do. Nine digits with a weak check count only after their
    name, such as "BSN".

    Not found: names, places, addresses, dates of birth; a telephone number of bare digits that
    neither begins with 0 nor has such a word before it. Left alone: loopback addresses, which
    identify no person.

    Raises:
        ConfigError: if a region is not known.

    >>> text = "jo@clinic.example, +44 20 7946 0958, 4111 1111 1111 1111"
    >>> sorted(finding.rule for finding in PersonalDataDetector().find(text))
    ['card', 'e-mail', 'phone']
    """

    def __init__(self, *, phone_regions: Sequence[str] = PHONE_REGIONS) -> None:
        if tuple(phone_regions) != PHONE_REGIONS:
            import phonenumbers  # late, for it is large

            if unknown := set(phone_regions) - set(phonenumbers.SUPPORTED_REGIONS):
                raise ConfigError(
                    f"phone_regions has unknown countries: {sorted(map(str, unknown))}. A country "
                    "is two capital letters, such as 'DE'."
                )
        self._regions = tuple(phone_regions)

    def find(self, text: str) -> Iterator[Finding]:
        """Yield what is found."""
        yield from _emails(text)
        looks = _looks()(text.encode("utf-8", "surrogatepass")) or ()
        if LOOKS.index(_ADDRESS) in looks:
            for form, valid in ((_IPV4, _is_ipv4), (_IPV6, _is_ipv6)):
                for match in form.finditer(text):
                    if valid(match[0]):
                        yield Finding("ip-address", *match.span())
        if LOOKS.index(_NUMBER) in looks:
            for digits in _DIGITS.finditer(text):
                if not _FRACTION.fullmatch(digits[0]):
                    yield from self._within(text, digits.start(), digits.end())
        if LOOKS.index(_LETTERS) in looks:
            yield from _lettered(text)

    def _within(self, text: str, start: int, end: int) -> Iterator[Finding]:
        """Yield what a run of digits holds."""
        after = min(len(text), end + 2)  # so that it is seen what follows
        known: list[tuple[int, int]] = []
        if _NINE.search(text, start, after):
            for rule, first, stop in _checked(text, start, after):
                known.append((first, stop))
                yield Finding(rule, first, stop)
        for match in _PHONE.finditer(text, max(0, start - 3), min(len(text), end + 14)):
            first, stop = match.span()
            taken = any(a < stop and first < b for a, b in known)
            if not taken and self._is_phone(match[0], text[max(0, first - _NEAR) : first]):
                yield Finding("phone", first, stop)

    def _is_phone(self, number: str, before: str) -> bool:
        if _DATE.match(number) or _DECIMAL.match(number):
            return False
        if _NORTH_AMERICAN.fullmatch(number) and "US" in self._regions:
            return True
        if _PHONE_WORD.search(before):
            return True
        if not _WRITTEN.fullmatch(number):
            return False
        import phonenumbers  # late, for it is large

        bare = number.lstrip("(")
        foreign = bare.startswith(("+", "00"))
        if bare.startswith("00"):
            number = f"+{bare[2:]}"
        for region in (None,) if foreign else self._regions:
            try:
                parsed = phonenumbers.parse(number, region)
            except phonenumbers.NumberParseException:
                continue
            # The right length proves little where there are only digits after a 0.
            possible = foreign or not number.startswith("0")
            known = phonenumbers.is_possible_number if possible else phonenumbers.is_valid_number
            if known(parsed):
                return True
        return False


def _checked(text: str, start: int, end: int) -> Iterator[Finding]:
    """Yield what a run of digits holds but for telephone numbers."""
    digits = sum(map(str.isdigit, text[start:end]))
    for match in _SSN.finditer(text, start, end):
        yield Finding("us-ssn", *match.span())
    for match in _CARD.finditer(text, start, end):
        if (stop := _card_end(match)) is not None:
            yield Finding("card", match.start(), stop)
    for national in _OF_DIGITS:
        if national.digits > digits:
            continue
        for match in national.form.finditer(text, start, end):
            if _is_national(national, text, match):
                yield Finding(national.rule, *match.span())


def _emails(text: str) -> Iterator[Finding]:
    position, at = 0, text.find("@")
    while at >= 0:
        # An address begins so near before its @ that all before need not be looked through.
        match = _EMAIL.search(text, max(position, at - _LOCAL))
        if match is None:
            return
        yield Finding("e-mail", *match.span())
        position = match.end()
        at = text.find("@", position)


def _is_ipv4(text: str) -> bool:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified)


def _is_ipv6(text: str) -> bool:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    # With :: much of what code and times look like would be one.
    routed = address.is_link_local or address in _GLOBAL or address in _UNIQUE_LOCAL
    return routed or "::" not in text


_GLOBAL: Final = ipaddress.IPv6Network("2000::/3")
_UNIQUE_LOCAL: Final = ipaddress.IPv6Network("fc00::/7")


def _card_end(match: re.Match[str]) -> int | None:
    """Return where a card's number ends; what follows may be its date, in the same way written."""
    from stdnum import luhn

    written = match[0]
    while True:
        digits = written.replace(" ", "").replace("-", "")
        if len(digits) < 12:
            return None
        if _ISSUED.fullmatch(digits) and luhn.is_valid(digits):
            return match.start() + len(written)
        cut = max(written.rfind(" "), written.rfind("-"))
        if cut < 0:
            return None
        written = written[:cut]


def _lettered(text: str) -> Iterator[Finding]:
    for national in _WITH_LETTERS:
        for match in national.form.finditer(text):
            if _is_national(national, text, match):
                yield Finding(national.rule, *match.span())
    from stdnum import iban

    for match in _IBAN.finditer(text):
        written = match[0]
        # Words may follow it that look like more of it.
        while len(written) > 14:
            if iban.is_valid(written, check_country=False):
                yield Finding("iban", match.start(), match.start() + len(written))
                break
            written = written[: max(written.rfind(" "), written.rfind("-"), 0)]


def _is_national(national: _National, text: str, match: re.Match[str]) -> bool:
    if national.near is not None:
        before = text[max(0, match.start() - _NEAR) : match.start()]
        if not national.near.search(before):
            return False
    return not national.module or _validator(national.module)(match[0])


@cache
def _validator(module: str) -> Callable[[str], bool]:
    valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return valid
