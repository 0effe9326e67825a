from __future__ import annotations

import copy
import pickle

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from lightning_secure.crypto import keystream
from lightning_secure.crypto.keystream import Keystream
from lightning_secure.errors import KeyAccessError

KEY = bytes(range(32))


def reference(key, size):
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return encryptor.update(bytes(size))


def test_it_is_aes_in_counter_mode():
    # SP 800-38A has no key and counter of zeros; the first block is that of the AES-256 known
    # answer tests, KAT VarTxt: AES-256(0, 0).
    assert Keystream(bytes(32)).read(16).hex() == "dc95c078a2408989ad48a21492842087"
    assert Keystream(KEY).read(1000) == reference(KEY, 1000)


def test_reading_goes_on_where_it_stopped():
    stream = Keystream(KEY)
    sizes = [1, 0, 15, 16, 17, 2**18, 2**18 + 5]
    parts = b"".join(bytes(stream.read(size)) for size in sizes)
    assert parts == reference(KEY, sum(sizes))


def test_the_key_is_renewed_from_the_stream(monkeypatch):
    monkeypatch.setattr(keystream, "KEY_LIFE", 64)  # it is 64 GiB
    old = reference(KEY, 96)
    new = old[64:]
    newest = reference(new, 96)[64:]
    expected = old[:64] + reference(new, 64) + reference(newest, 10)
    assert Keystream(KEY).read(138) == expected


def test_streams_of_the_system_differ():
    assert len({bytes(Keystream().read(16)) for _ in range(5)}) == 5


def test_a_fork_draws_other_bytes(in_fork):
    stream = Keystream()
    stream.read(8)
    assert in_fork(lambda: bytes(stream.read(16))) != stream.read(16)


def test_a_given_key_is_not_used_in_two_processes(in_fork):
    stream = Keystream(KEY)

    def refused():
        try:
            return bytes(stream.read(4))
        except KeyAccessError:
            return b"refused"

    assert in_fork(refused) == b"refused"
    assert stream.read(4) == reference(KEY, 4)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_shown(duplicate):
    stream = Keystream(KEY)
    with pytest.raises(KeyAccessError, match="cannot be copied"):
        duplicate(stream)
    assert KEY.hex() not in repr(stream)
    assert repr(stream) == "Keystream(<hidden>)"


def test_a_short_key_is_refused():
    with pytest.raises(KeyAccessError, match="32 bytes"):
        Keystream(bytes(16))


def test_what_a_fork_does_without_forking():
    """The tests above leave no trace in the coverage of this process."""
    stream, given = Keystream(), Keystream(KEY)
    before = stream._encryptor
    stream._process = given._process = -1  # as if these were copies in a child
    stream.read(1)
    assert stream._encryptor is not before
    with pytest.raises(KeyAccessError, match="forked process"):
        given.read(1)
