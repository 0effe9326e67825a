"""Names of columns that point at people: ``patient_name``, ``email``, ``geburtsdatum``."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Final

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

#: Whole words, by what they say that the column holds.
_ALONE: Final = {
    "name": (
        "firstname", "forename", "fullname", "givenname", "lastname", "surname", "username",
        "nickname", "maidenname", "vorname", "nachname", "familienname", "nom", "prenom",
        "nombre", "apellido", "apellidos", "cognome", "achternaam", "voornaam", "imie", "nazwisko",
    ),
    "contact": (
        "email", "emails", "mail", "phone", "phones", "telephone", "telefon", "telefono",
        "telefone", "mobile", "handy", "fax", "whatsapp",
    ),
    "place": (
        "address", "addresses", "adresse", "direccion", "indirizzo", "endereco", "street",
        "strasse", "postcode", "postcodes", "postleitzahl", "plz", "zip", "zipcode", "postal",
        "cap", "city", "town", "county", "ort", "wohnort", "latitude", "longitude", "lat", "lon",
        "lng", "gps", "geolocation",
    ),
    "date of a life": (
        "dob", "birth", "birthdate", "birthday", "birthyear", "born", "geburtsdatum", "geburtstag",
        "death", "deceased", "dod", "naissance", "nacimiento", "nascita", "nascimento",
    ),
    "number of a person": (
        "ssn", "nin", "nino", "passport", "iban", "mrn", "nhs", "cpf", "dni", "nie", "pesel",
        "bsn", "nir", "personnummer", "steuernummer", "versichertennummer", "npi",
    ),
    "device or picture": ("imei", "imsi", "fingerprint", "biometric", "selfie", "vin"),
}  # fmt: skip
_OF_WORD: Final = {word: what for what, words in _ALONE.items() for word in words}
_PEOPLE: Final = frozenset({
    "account", "applicant", "author", "beneficiary", "borrower", "carer", "child", "citizen",
    "client", "contact", "customer", "doctor", "driver", "employee", "employer", "family",
    "father", "first", "full", "given", "guardian", "holder", "household", "insured", "kunde",
    "kunden", "last", "maiden", "member", "middle", "mother", "nurse", "owner", "parent",
    "participant", "partner", "passenger", "patient", "patienten", "person", "physician", "pupil",
    "resident", "respondent", "school", "spouse", "student", "subject", "teacher", "tenant", "user",
    "victim", "visitor", "witness",
})  # fmt: skip
#: Names of a person's number, behind one of ``_PEOPLE``.
_NUMBERS: Final = frozenset(
    {"code", "id", "identifier", "ids", "key", "no", "nr", "number", "uuid"}
)
_PAIRS: Final = {
    ("ip", "address"): "contact", ("ip", "addr"): "contact",
    ("mac", "address"): "device or picture",
    ("license", "plate"): "number of a person", ("licence", "plate"): "number of a person",
    ("social", "security"): "number of a person", ("medical", "record"): "number of a person",
    ("health", "insurance"): "number of a person", ("credit", "card"): "number of a person",
    ("card", "number"): "number of a person", ("tax", "id"): "number of a person",
    ("drivers", "license"): "number of a person", ("driver", "license"): "number of a person",
}  # fmt: skip
#: A name with one of these words tells something about a value, not of a person: ``email_count``.
_ABOUT: Final = frozenset({
    "avg", "count", "counts", "dim", "embedding", "flag", "len", "length", "max", "mean", "min",
    "missing", "n", "num", "present", "ratio", "score", "std", "total", "valid", "verified",
})  # fmt: skip


def identifying(name: str) -> str:
    """Return what a column of this name seems to hold of a person; nothing if it does not.

    A guess by whole words, in some languages, from a list: it finds no column whose name says
    nothing, and a hit proves nothing.

    >>> [identifying(name) for name in ("patientName", "dob", "file_name", "mean area")]
    ['name', 'date of a life', '', '']

    Source:
        45 CFR 164.514(b)(2)(i), the identifiers of HIPAA's Safe Harbor.
    """
    plain = unicodedata.normalize("NFKD", name.replace("ß", "ss"))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = [word.lower() for word in _WORDS.findall(plain)]
    if not words or not _ABOUT.isdisjoint(words):
        return ""
    if words == ["name"]:
        return "name"
    for first, second in itertools.pairwise(words):
        if (first, second) in _PAIRS:
            return _PAIRS[first, second]
        if first in _PEOPLE and second in ("name", "names"):
            return "name"
        if first in _PEOPLE and second in _NUMBERS:
            return "number of a person"
    return next((_OF_WORD[word] for word in words if word in _OF_WORD), "")
