from __future__ import annotations

import base64
import io
import json
import os
import signal
import struct
import zlib

import numpy as np
import pytest

from lightning_secure.data.key_rotation.rotate import rotate_data, rotate_partition
from lightning_secure.data.reading.dataset import EncryptedShardDataset
from lightning_secure.data.sources.metadata import strip_metadata
from lightning_secure.data.writing.seal import seal
from lightning_secure.errors import ConfigError, DataError, MissingExtraError

Image = pytest.importorskip("PIL.Image")
PngImagePlugin = pytest.importorskip("PIL.PngImagePlugin")

SECRET = b"Ada Lovelace, ward 7"
PIXELS = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def exif(orientation: int | None = None) -> Image.Exif:
    result = Image.Exif()
    result[0x013B] = SECRET.decode()  # artist
    result[0x0110] = "Camera 3000"
    if orientation is not None:
        result[0x0112] = orientation
    place = result.get_ifd(0x8825)
    place[1], place[2] = "N", (52.0, 31.0, 12.0)
    return result


def jpeg(orientation=None, *, mode="RGB", progressive=False) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(
        out, "JPEG", quality=92, exif=exif(orientation), comment=SECRET, progressive=progressive,
        icc_profile=SECRET * 9, xmp=b"<x>" + SECRET + b"</x>",
    )  # fmt: skip
    data = out.getvalue()
    iptc = b"Photoshop 3.0\0" + SECRET
    part = b"\xff\xed" + struct.pack(">H", len(iptc) + 2) + iptc
    return data[:2] + part + data[2:] + b"a video of " + SECRET


def png() -> bytes:
    out = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", SECRET.decode())
    text.add_itxt("Comment", SECRET.decode())
    text.add_text("Zipped", SECRET.decode(), zip=True)
    Image.fromarray(PIXELS).save(out, "PNG", exif=exif(), pnginfo=text, icc_profile=SECRET * 9)
    return out.getvalue() + SECRET


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        found.append(
            (data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        )
        position += 12 + length
    return found


def with_chunks(change) -> bytes:
    """Return a plain PNG whose chunks were changed."""
    parts = chunks(strip_metadata(png()))
    return png()[:8] + b"".join(chunk(kind, body) for kind, body in change(parts))


def after_header(kind: bytes, body: bytes):
    return lambda parts: [parts[0], (kind, body), *parts[1:]]


RAW = zlib.decompress(dict(chunks(strip_metadata(png())))[b"IDAT"])


@pytest.mark.parametrize(
    "change",
    [
        # What a cropped screenshot leaves behind its pixels.
        lambda parts: [(k, b + SECRET if k == b"IDAT" else b) for k, b in parts],
        lambda parts: [*parts[:-1], (b"IDAT", SECRET), parts[-1]],
        # More rows than the picture has, and chunks that are longer than they may be.
        lambda parts: [parts[0], (b"IDAT", zlib.compress(RAW + SECRET, 0)), parts[-1]],
        lambda parts: [*parts[:-1], (b"IEND", SECRET)],
        after_header(b"PLTE", SECRET.ljust(30)),
        *(
            after_header(kind, start + SECRET)
            for kind, start in (
                (b"tRNS", b""), (b"gAMA", b"\0\0\xb1\x8f"), (b"sBIT", b"\x08\x08\x08"),
                (b"cHRM", bytes(32)), (b"sRGB", b"\0"), (b"pHYs", bytes(9)), (b"tIME", b""),
            )
        ),
        lambda parts: [parts[0], (b"gAMA", b"\0\0\xb1\x8f"), (b"gAMA", SECRET[:4]), *parts[1:]],
    ],
)  # fmt: skip
def test_what_is_hidden_beside_the_pixels_of_a_png_goes_or_is_refused(change):
    data = with_chunks(change)
    assert b"Ada" in data
    try:
        bare = strip_metadata(data)
    except DataError:
        return
    assert b"Ada" not in bare
    assert np.array_equal(np.asarray(opened(bare)), PIXELS)


def adam7(pixels) -> bytes:
    """Return an interlaced PNG, which Pillow does not write."""
    height, width, _ = pixels.shape
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
              (0, 1, 1, 2))  # fmt: skip
    rows = [pixels[y::down, x::across] for x, y, across, down in passes]
    raw = b"".join(b"\0" + row.tobytes() for part in rows if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return png()[:8] + b"".join(chunk(kind, body) for kind, body in parts)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 3), (24, 40)])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "adam7"])
def test_every_kind_of_png_stays_as_it_looks(size, mode):
    pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    transparent = {"transparency": 0} if mode in ("L", "P") else {}
    Image.fromarray(pixels).convert(mode if mode != "adam7" else "RGB").save(
        out, "PNG", **transparent
    )
    data = adam7(pixels) if mode == "adam7" else out.getvalue()
    bare = strip_metadata(data)
    assert np.array_equal(np.asarray(opened(bare)), np.asarray(opened(data)))
    assert opened(bare).info.get("transparency") == opened(data).info.get("transparency")
    assert strip_metadata(bare) == bare


def opened(data: bytes):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    "data",
    [jpeg(), jpeg(mode="L"), jpeg(mode="CMYK"), jpeg(progressive=True), png()],
    ids=["jpeg", "grey", "cmyk", "progressive", "png"],
)
def test_metadata_goes_and_the_picture_stays_bit_for_bit(data):
    assert SECRET in data
    bare = strip_metadata(data)
    assert SECRET not in bare
    assert zlib.compress(SECRET)[2:10] not in bare
    assert b"Exif" not in bare
    assert dict(opened(bare).getexif()) == {}
    assert np.array_equal(np.asarray(opened(bare)), np.asarray(opened(data)))
    assert strip_metadata(bare) == bare


def test_a_turned_picture_stays_turned_and_tells_nothing_else():
    bare = strip_metadata(jpeg(6), orientation=6)
    assert SECRET not in bare
    assert dict(opened(bare).getexif()) == {0x0112: 6}
    assert not opened(bare).getexif().get_ifd(0x8825)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", png()[:8] + chunk(b"PLTE", b"abc"), with_chunks(lambda parts: parts[1:]),
     with_chunks(lambda parts: [parts[0], parts[-1]]), jpeg()[:200], jpeg()[:-60], png()[:100],
     b"\xff\xd8\xff", jpeg()[:30] + b"x"],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused(data):
    with pytest.raises(DataError, match="no JPEG or PNG"):
        strip_metadata(data[: data.rfind(b"\xff\xd9")] if data[-5:] == b"ward 7" else data)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name, data in {
        "cat/Ada Lovelace 1.jpg": jpeg(),
        "cat/b.jpeg": jpeg(6),
        "cat/deep/c.png": png(),
        "dog/d.JPG": jpeg(progressive=True),
        "dog/.DS_Store": b"hidden",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_bytes_are_sealed_without_their_metadata(folder, tmp_path, keys):
    done = seal(folder, tmp_path / "o", keys=keys)
    assert done.rows == {"train": 4}
    data = EncryptedShardDataset(tmp_path / "o", split="train", keys=keys)
    images, labels = data.__getitems__(range(4)).batch()
    assert labels.tolist() == [0, 0, 0, 1]
    assert all(SECRET not in image for image in images)
    assert [dict(opened(image).getexif()) for image in images] == [{}, {0x0112: 6}, {}, {}]
    assert np.array_equal(np.asarray(opened(images[2])), PIXELS)
    assert json.loads(data.attributes["classes.label"]) == ["cat", "dog"]
    assert data.attributes["image"] == data.entry.attributes["image"]
    assert data.entry.attributes["image"] == "metadata stripped"


def test_names_of_classes_cannot_be_read_from_the_manifest(folder, tmp_path, keys):
    (folder / "dog").rename(folder / "melanoma, stage 4")
    root = tmp_path / "o"
    seal(folder, root, keys=keys)
    names = ["cat", "melanoma, stage 4"]

    def look():
        payload = json.loads((root / "manifest.json").read_bytes())["payload"]
        everything = base64.b64decode(payload) + b"".join(p.read_bytes() for p in root.rglob("*.*"))
        assert b"melanoma" not in everything
        data = EncryptedShardDataset(root, split="train", keys=keys)
        assert json.loads(data.attributes["classes.label"]) == names

    look()
    rotate_partition(root, "train", keys=keys)
    look()
    rotate_data(root, "train", keys=keys)
    look()


def test_pixels_are_sealed_upright(folder, tmp_path, keys):
    with pytest.raises(DataError):  # one of them is turned, so it has another shape
        seal(folder, tmp_path / "o", keys=keys, decode=True)
    seal(folder, tmp_path / "o", keys=keys, decode=True, size=(24, 40))
    data = EncryptedShardDataset(tmp_path / "o", split="train", keys=keys)
    assert data.schema.columns[0].shape == (3, 24, 40)
    images, _ = data.__getitems__(range(4)).batch()
    assert np.array_equal(images[2].numpy().transpose(1, 2, 0), PIXELS)
    assert data.entry.attributes["image"] == "decoded, turned upright, resized to 24x40"
    (folder / "cat" / "b.jpeg").unlink()
    seal(folder, tmp_path / "o", keys=keys, decode=True, split="same")


def damaged(data: bytes) -> bytes:
    return data[:400] + bytes(300) + data[700:]


@pytest.mark.parametrize(
    ("name", "data", "decode"),
    [
        ("cat/x.jpg", b"not a picture of Ada", True),
        ("cat/x.jpg", b"not a picture of Ada", False),
        ("cat/x.png", png()[:300], True),
        ("cat/x.png", png()[:300], False),
        ("cat/x.gif", b"GIF89a", False),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_by_its_number(
    folder, tmp_path, keys, name, data, decode
):
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match="picture 3, counted from 0") as caught:
        seal(
            folder, tmp_path / "o", keys=keys, decode=decode, **({"size": (8, 8)} if decode else {})
        )
    assert "Ada" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("decode", [True, False])
def test_a_pipe_among_pictures_is_refused(folder, tmp_path, keys, decode, request):
    os.mkfifo(folder / "cat" / "x.png")
    options = {"size": (8, 8)} if decode else {}
    request.addfinalizer(lambda: signal.alarm(0))
    signal.alarm(30)  # what waits for the pipe is ended
    with pytest.raises(DataError, match=r"picture 3.*regular file") as caught:
        seal(folder, tmp_path / "o", keys=keys, decode=decode, **options)
    assert caught.value.__context__ is None


def test_a_picture_that_would_fill_the_memory_is_refused(folder, tmp_path, keys, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a real bomb takes too long to make
    for decode in (True, False):
        with pytest.raises(DataError, match="picture 0"):
            seal(folder, tmp_path / "o", keys=keys, decode=decode)


@pytest.mark.parametrize("harm", ["loose", "foreign", "empty"])
def test_a_folder_that_is_no_image_folder_is_refused(folder, tmp_path, keys, harm):
    if harm == "loose":
        (folder / "x.jpg").write_bytes(jpeg())
    elif harm == "foreign":
        (folder / "cat" / "diagnoses.txt").write_text("x")
    else:
        folder = tmp_path / "empty"
        folder.mkdir()
    with pytest.raises(ConfigError, match="Nothing was sealed"):
        seal(folder, tmp_path / "o", keys=keys)


def test_size_without_decode_is_refused(folder, tmp_path, keys):
    with pytest.raises(ConfigError, match="decode=True"):
        seal(folder, tmp_path / "o", keys=keys, size=(8, 8))


def test_without_pillow_the_extra_is_named(folder, tmp_path, keys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # what a missing package looks like
    with pytest.raises(MissingExtraError, match=r"lightning-secure\[images\]"):
        seal(folder, tmp_path / "o", keys=keys)
