"""Keyed substitutes for values: pseudonyms, which are one-way, and tokens, which the key opens.

Each has a domain, and a generation of the domain's key. Under one provider, domain and generation
the same value has the same pseudonym or token in every dataset; under any other they have nothing
to do with each other.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from lightning_secure.anonymize.operators import Bound, KeySource, Operator
from lightning_secure.crypto.encoding import utf8
from lightning_secure.errors import ConfigError, DataError, IntegrityError
from lightning_secure.util.validate import whole_number

#: A pseudonym of generation g costs g HMACs.
MAX_GENERATION: Final = 999
_PSEUDONYM: Final = re.compile(r"[0-9a-f]{32}")
_PSEUDONYM_BYTES: Final = 16
_TOKEN: Final = re.compile(r"([1-9][0-9]{0,2})\.([A-Za-z0-9_-]{43,})")
#: Of the length of a value, a token shows only how many of these it fills.
_BLOCK: Final = 16


class _Names(ABC):
    """Keyed substitutes for the values of one domain."""

    def __init__(self, keys: KeySource, *, domain: str) -> None:
        _require_domain(domain, type(self).__name__)
        self._keys = keys
        self._domain = domain

    def of(self, value: str | int, *, generation: int = 1) -> str:
        """Return what stands for a value.

        Raises:
            DataError: if the value is neither text nor a whole number. 7 and ``"7"`` are different.
            ConfigError: if there is no such generation.
        """
        _require_generation(generation)
        return self.checked(value, generation)

    @abstractmethod
    def checked(self, value: Any, generation: int) -> str:
        """Return the same for a generation that is known to be one."""


class Pseudonyms(_Names):
    """The pseudonyms of one domain, for the key's holder.

    Args:
        keys: What the domain's keys are taken from.
        domain: What kind of thing is named, as in :class:`Pseudonymize`.

    Without the key a pseudonym cannot be traced back, not even by hashing every possible value.
    With the key this is possible: pseudonymous data is still personal data.

    A pseudonym has 32 hexadecimal digits. That of generation 2 is the keyed hash of that of
    generation 1, and so on. So the key's holder brings pseudonyms of older datasets forward,
    without the values, and joins them. Without the key, two pseudonyms of different generations
    cannot be linked.

    Source:
        HMAC-SHA256, RFC 2104, truncated to 128 bits. ENISA, Pseudonymisation techniques and best
        practices, 2019, section 5.1.4.

    >>> patients = Pseudonyms(keys, domain="patient")
    >>> len(patients.of("jo")), patients.of("jo") == patients.of("jo")
    (32, True)
    """

    def __init__(self, keys: KeySource, *, domain: str) -> None:
        super().__init__(keys, domain=domain)
        self._derived: dict[int, bytes] = {}

    def checked(self, value: Any, generation: int) -> str:
        """Return the same for a generation that is known to be one."""
        mark = _mac(self._key(1), _message(value, "pseudonymised"))
        return self._onward(mark, 1, generation)

    def renewed(self, pseudonym: Any, *, since: int, generation: int) -> str:
        """Return the pseudonym of a later generation for the same value, which is not needed.

        Args:
            pseudonym: One of generation ``since``, of this domain.
            since: Which one that is.
            generation: Which one is wanted, not before ``since``.

        Raises:
            DataError: if ``pseudonym`` does not have the form of a pseudonym.
            ConfigError: if the generations are none, or go backward, which no key can do.

        >>> patients = Pseudonyms(keys, domain="patient")
        >>> second = patients.renewed(patients.of("jo"), since=1, generation=2)
        >>> second == patients.of("jo", generation=2)
        True
        """
        _require_generation(since)
        _require_generation(generation)
        if since > generation:
            raise ConfigError(
                f"a pseudonym of generation {since} cannot be brought back to generation "
                f"{generation}: it goes forward only. Nothing was changed."
            )
        if not isinstance(pseudonym, str) or not _PSEUDONYM.fullmatch(pseudonym):
            raise DataError("the value is not a pseudonym, which has 32 hexadecimal digits.")
        return self._onward(bytes.fromhex(pseudonym), since, generation)

    def _onward(self, mark: bytes, since: int, generation: int) -> str:
        for number in range(since + 1, generation + 1):
            mark = _mac(self._key(number), mark)
        return mark.hex()

    def _key(self, generation: int) -> bytes:
        if generation not in self._derived:
            purpose = f"pseudonym/{self._domain}"
            if generation > 1:  # no domain of the first generation gives a purpose like this
                purpose = f"pseudonym-generation/{generation}/{self._domain}"
            self._derived[generation] = self._keys.derive(purpose).derive(info=_PSEUDONYM_INFO)
        return self._derived[generation]


class Tokens(_Names):
    """The tokens of one domain, for the key's holder: from values, and back.

    Args:
        keys: What the domain's keys are taken from.
        domain: What kind of thing is named, as in :class:`Tokenize`.

    A token is ``GENERATION.BASE64URL`` of AES-SIV over the value with its type, filled up to a
    multiple of 16 bytes. It names its generation, so tokens of every generation go back.

    Guarantees:
        Without the key nothing about the value can be told but how many 16 bytes it fills, and that
        equal tokens are of equal values. An altered token, one of another domain, key or
        generation is refused.

    Source:
        AES-256-SIV, RFC 5297, as deterministic authenticated encryption.

    >>> patients = Tokens(keys, domain="patient")
    >>> patients.value(patients.of("jo"))
    'jo'
    """

    def __init__(self, keys: KeySource, *, domain: str) -> None:
        super().__init__(keys, domain=domain)
        self._ciphers: dict[int, AESSIV] = {}

    def checked(self, value: Any, generation: int) -> str:
        """Return the same for a generation that is known to be one."""
        plain = _message(value, "tokenised") + b"\x80"
        plain += bytes(-len(plain) % _BLOCK)
        sealed = self._cipher(generation).encrypt(plain, None)
        return f"{generation}.{base64.urlsafe_b64encode(sealed).decode().rstrip('=')}"

    def value(self, token: Any) -> str | int:
        """Return the value that a token stands for, with its type.

        Raises:
            IntegrityError: if the token is malformed, was altered, or is of another domain or key.

        >>> patients = Tokens(keys, domain="patient")
        >>> [patients.value(patients.of(value)) for value in (7, "7")]
        [7, '7']
        """
        value: str | int | None = None
        match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is not None:
            with contextlib.suppress(InvalidTag, ValueError):
                sealed = base64.urlsafe_b64decode(match[2] + "=" * (-len(match[2]) % 4))
                generation = int(match[1])
                plain = self._cipher(generation).decrypt(sealed, None).rstrip(b"\0")[:-1].decode()
                found = plain[1:] if plain[0] == "s" else int(plain[1:])
                # One value has one token: spare bits of the last character are not overlooked.
                value = found if self.of(found, generation=generation) == token else None
        if value is None:
            raise IntegrityError(
                "a token was refused: it was altered, or is of another domain or key. Nothing of "
                "it was used."
            )
        return value

    def renewed(self, token: str, *, generation: int) -> str:
        """Return the token of another generation for the same value.

        Raises:
            IntegrityError: if the token is malformed, was altered, or is of another domain or key.
            ConfigError: if there is no such generation.

        >>> patients = Tokens(keys, domain="patient")
        >>> patients.renewed(patients.of("jo"), generation=2) == patients.of("jo", generation=2)
        True
        """
        return self.of(self.value(token), generation=generation)

    def _cipher(self, generation: int) -> AESSIV:
        if generation not in self._ciphers:
            key = self._keys.derive(f"token-generation/{generation}/{self._domain}")
            self._ciphers[generation] = AESSIV(key.derive(info=_TOKEN_INFO, length=64))
        return self._ciphers[generation]


@dataclass(frozen=True, kw_only=True)
class _Naming(Operator):
    """Replace each value by what stands for it in a domain."""

    domain: str
    generation: int = 1

    def __post_init__(self) -> None:
        _require_domain(self.domain, type(self).__name__)
        _require_generation(self.generation)


@dataclass(frozen=True, kw_only=True)
class Pseudonymize(_Naming):
    """Replace each value by a keyed hash of it, see :class:`Pseudonyms`.

    Attributes:
        domain: What kind of thing is named, for example ``patient``. The same value has the same
            pseudonym in every dataset under one key and domain, so tables can be joined; under
            another key or domain the pseudonyms have nothing to do with each other.
        generation: Of the domain's key. A higher one gives pseudonyms that have nothing to do with
            those before it, but for the key's holder, see :meth:`Pseudonyms.renewed`.

    >>> from lightning_secure import AnonymizationPlan
    >>> plan = AnonymizationPlan({"id": Pseudonymize(domain="patient")}).bind(keys)
    >>> first, second = plan.apply({"id": ["jo", "jo"]})["id"]
    >>> first == second == Pseudonyms(keys, domain="patient").of("jo")
    True
    """

    def bind(self, keys: KeySource) -> Bound:
        """Derive the domain's key from the provider."""
        return _Standing(Pseudonyms(keys, domain=self.domain), self.generation)

    def describe(self) -> str:
        """Return the operation and its domain, and which generation, if that is not the first."""
        # In this order, so that no domain's name can look like another generation.
        second = f"generation={self.generation}, " if self.generation > 1 else ""
        return f"pseudonymize({second}domain={self.domain})"


@dataclass(frozen=True, kw_only=True)
class Tokenize(_Naming):
    """Replace each value by a token that the key's holder can turn back, see :class:`Tokens`.

    Attributes:
        domain: What kind of thing is named, for example ``patient``; see :class:`Pseudonymize`.
        generation: Of the domain's key. Tokens of every generation go back.

    >>> from lightning_secure import AnonymizationPlan
    >>> plan = AnonymizationPlan({"id": Tokenize(domain="patient")}).bind(keys)
    >>> tokens = plan.apply({"id": ["jo", "al"]})["id"]
    >>> [Tokens(keys, domain="patient").value(token) for token in tokens]
    ['jo', 'al']
    """

    def bind(self, keys: KeySource) -> Bound:
        """Derive the domain's key from the provider."""
        return _Standing(Tokens(keys, domain=self.domain), self.generation)

    def describe(self) -> str:
        """Return the operation, its generation and its domain."""
        return f"tokenize(generation={self.generation}, domain={self.domain})"


class _Standing(Bound):
    def __init__(self, names: _Names, generation: int) -> None:
        self._names = names
        self._generation = generation

    def __call__(self, value: Any) -> str:
        return self._names.checked(value, self._generation)


_MOST: Final = 2**1024
_PSEUDONYM_INFO: Final = b"lsec/v1/pseudonym"
_TOKEN_INFO: Final = b"lsec/v1/token"


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)[:_PSEUDONYM_BYTES]


def _message(value: Any, what: str) -> bytes:
    # The type is part of the message: 7 and "7" are different things.
    if isinstance(value, str):
        # As ASCII first, which nearly every name of a thing is.
        return b"s" + (value.encode() if value.isascii() else utf8(value, what="a value"))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST:
        return b"i%d" % value
    raise DataError(f"a {type(value).__name__} cannot be {what}; text and int can.")


def _require_domain(domain: Any, what: str) -> None:
    if not isinstance(domain, str) or not domain:
        raise ConfigError(f"{what} needs a domain, for example domain='patient'.")
    utf8(domain, what=f"the domain of a {what}")


def _require_generation(generation: Any) -> None:
    number = whole_number(generation)
    if number is None or not 1 <= number <= MAX_GENERATION:
        raise ConfigError(f"`generation` must be a whole number from 1 to {MAX_GENERATION}.")
