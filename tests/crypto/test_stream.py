from __future__ import annotations

import io
import os

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_secure.crypto import stream as stream_module
from lightning_secure.crypto.keys import DataKey
from lightning_secure.crypto.stream import StreamReader, StreamWriter
from lightning_secure.errors import IntegrityError

KEY = DataKey(bytes(range(32)))
MESSAGE_KEY = KEY.derive(info=b"lsec/v1/stream")
CONTEXT = b"the header"
CHUNK = 16 * 1024
SIZES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5, 70 * CHUNK + 9]


def sealed(data: bytes, *, prefix: bytes = b"") -> bytes:
    raw = io.BytesIO()
    raw.write(prefix)
    writer = StreamWriter(raw, key=KEY, context=CONTEXT)
    assert writer.writable()
    assert writer.write(data) == len(data)
    writer.finish()
    return raw.getvalue()


def reader(data: bytes, *, start: int = 0, key: DataKey = KEY, context: bytes = CONTEXT):
    return StreamReader(io.BytesIO(data), key=key, context=context, start=start)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_read(size):
    data = os.urandom(size)
    with reader(sealed(data, prefix=b"12345"), start=5) as stream:
        assert stream.readable()
        assert stream.seekable()
        assert stream.read() == data
        assert stream.read(1) == b""


@pytest.mark.parametrize("size", SIZES)
def test_the_reader_agrees_with_the_library(size):
    """Cobblestone-256 in both directions: ours is no format of our own."""
    data = os.urandom(size)
    decryptor = Cobblestone256Decryptor(MESSAGE_KEY, CONTEXT)
    assert decryptor.update(sealed(data)) + decryptor.finalize() == data
    encryptor = Cobblestone256Encryptor(MESSAGE_KEY, CONTEXT)
    foreign = encryptor.update(data) + encryptor.finalize()
    assert reader(foreign).read() == data


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_it_seeks_and_reads_like_a_file(data):
    plain = bytes(range(256)) * 400
    ours, theirs = reader(_SEALED), io.BytesIO(plain)
    for _ in range(data.draw(st.integers(1, 12))):
        whence = data.draw(st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]))
        offset = data.draw(st.integers(-len(plain), len(plain) + 9))
        target = {0: 0, 1: theirs.tell(), 2: len(plain)}[whence] + offset
        if target < 0:
            continue
        assert ours.seek(offset, whence) == theirs.seek(offset, whence) == ours.tell()
        count = data.draw(st.integers(0, 3 * CHUNK))
        assert ours.read(count) == theirs.read(count)


_SEALED = sealed(bytes(range(256)) * 400)


def test_writing_in_pieces_changes_nothing():
    data = os.urandom(5 * CHUNK)
    raw = io.BytesIO()
    writer = StreamWriter(raw, key=KEY, context=CONTEXT)
    for start in range(0, len(data), 999):
        writer.write(memoryview(data)[start : start + 999])
    writer.finish()
    assert reader(raw.getvalue()).read() == data


@pytest.mark.parametrize(
    "length",
    [0, 10, 24, 55, 56, 60, 56 + 16, 56 + CHUNK, 56 + CHUNK + 16, 56 + 2 * (CHUNK + 16), -1, -17],
)
def test_a_truncated_stream_is_refused_before_anything_is_read(length):
    data = sealed(os.urandom(3 * CHUNK + 100))
    with pytest.raises(IntegrityError):
        reader(data[:length])


def test_a_stream_without_its_end_is_truncated():
    raw = io.BytesIO()
    StreamWriter(raw, key=KEY, context=CONTEXT).write(bytes(10 * CHUNK))
    with pytest.raises(IntegrityError, match="truncated"):
        reader(raw.getvalue())


@pytest.mark.parametrize("extra", [b"\0", bytes(16), bytes(CHUNK + 16)])
def test_an_extended_stream_is_refused(extra):
    with pytest.raises(IntegrityError):
        reader(sealed(b"hello") + extra)


@pytest.mark.parametrize("place", [0, 23, 24, 55])
def test_a_changed_salt_or_commitment_is_refused(place):
    data = bytearray(sealed(b"hello"))
    data[place] ^= 1
    with pytest.raises(IntegrityError, match="key and header"):
        reader(bytes(data))


def test_another_key_or_context_is_refused():
    data = sealed(b"hello")
    with pytest.raises(IntegrityError):
        reader(data, key=DataKey(bytes(32)))
    with pytest.raises(IntegrityError):
        reader(data, context=b"another header")


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("size", [100, 3 * CHUNK])
def test_a_flipped_bit_fails_where_it_is_read_and_leaves_nothing(chunk, size):
    data = bytearray(sealed(os.urandom(4 * CHUNK)))
    data[56 + chunk * (CHUNK + 16) + 7] ^= 1
    stream = reader(bytes(data))
    out = bytearray(b"\xee" * size)
    stream.seek(chunk * CHUNK)
    with pytest.raises(IntegrityError, match=f"chunk {chunk}"):
        stream.readinto(out)
    assert stream.failure is not None
    assert set(out) <= {0, 0xEE}  # untouched or wiped, but never unauthenticated


def test_swapped_chunks_are_refused():
    data = sealed(os.urandom(4 * CHUNK))
    head, body, rest = data[:56], data[56 : 56 + 2 * (CHUNK + 16)], data[56 + 2 * (CHUNK + 16) :]
    swapped = head + body[CHUNK + 16 :] + body[: CHUNK + 16] + rest
    with pytest.raises(IntegrityError, match="chunk 0"):
        reader(swapped).read()


def test_a_file_that_shrinks_while_it_is_read_is_noticed():
    raw = io.BytesIO(sealed(bytes(4 * CHUNK)))
    stream = StreamReader(raw, key=KEY, context=CONTEXT)
    raw.truncate(100)
    with pytest.raises(IntegrityError, match="shrank"):
        stream.read(10)


def test_a_stream_longer_than_the_specification_allows_is_refused(monkeypatch):
    # 4 PiB cannot be written in a test; the limit can be lowered.
    monkeypatch.setattr(stream_module, "_MAX_CHUNKS", 2)
    assert reader(sealed(bytes(CHUNK))).read() == bytes(CHUNK)
    with pytest.raises(IntegrityError, match="truncated"):
        reader(sealed(bytes(2 * CHUNK)))


def test_a_short_read_is_not_the_end():
    """Remote files return less than was asked for."""

    class Dribble(io.BytesIO):
        def read(self, size=-1, /):
            return super().read(min(size, 1000) if size >= 0 else size)

    data = os.urandom(3 * CHUNK)
    assert StreamReader(Dribble(sealed(data)), key=KEY, context=CONTEXT).read() == data


def test_closing_closes_what_is_under_it():
    raw = io.BytesIO(sealed(b"hello"))
    stream = StreamReader(raw, key=KEY, context=CONTEXT)
    stream.read(2)
    stream.close()
    stream.close()
    assert raw.closed
