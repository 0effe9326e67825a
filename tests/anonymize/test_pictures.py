"""What is seen of a picture's file besides the picture, with files as Pillow writes them."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from lightning_secure.anonymize.findings import Look
from lightning_secure.anonymize.pictures import has_metadata, is_picture

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "AVIF")


def picture(kind, **options):
    file = io.BytesIO()
    Image.effect_noise((24, 24), 90).convert("P" if kind == "GIF" else "RGB").save(
        file, kind, **options
    )
    return file.getvalue()


def exif():
    tags = Image.Exif()
    tags[315] = "Ada"
    return tags.tobytes()


def texts():
    info = PngInfo()
    info.add_text("Author", "Ada")
    return info


def artist():
    tags = ImageFileDirectory_v2()
    tags[315] = "Ada"
    return tags


XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>Ada</x:xmpmeta>"
TELLING = {
    **{f"{k} exif": lambda k=k: picture(k, exif=exif()) for k in ("JPEG", "PNG", "WEBP", "AVIF")},
    **{f"{k} xmp": lambda k=k: picture(k, xmp=XMP) for k in ("WEBP", "AVIF", "JPEG")},
    "JPEG comment": lambda: picture("JPEG", comment=b"Ada"),
    "GIF comment": lambda: picture("GIF", comment=b"Ada"),
    "PNG text": lambda: picture("PNG", pnginfo=texts()),
    "TIFF artist": lambda: picture("TIFF", tiffinfo=artist()),
    **{f"{k} and more": lambda k=k: picture(k) + b"Ada" for k in ("JPEG", "PNG", "WEBP")},
}  # fmt: skip


@pytest.mark.parametrize("name", TELLING)
def test_what_a_file_says_besides_its_picture_is_seen(name):
    data = TELLING[name]()
    assert b"Ada" in data
    found = Look("image").inspected([data])
    assert (found.inspected, found.rules) == (1, {"image-metadata": 1})


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_alone_is_none_of_it(kind):
    data = picture(kind)
    assert is_picture(data)
    assert not has_metadata(data)
    found = Look("image").inspected([data])
    assert (found.inspected, found.rules) == (1, {})


@pytest.mark.parametrize("kind", FORMATS)
def test_any_beginning_of_a_file_can_be_looked_at(kind):
    data = picture(kind)
    for length in range(0, len(data), 7):
        has_metadata(data[:length])


def test_a_gif_that_would_be_walked_for_ever_ends():
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"\x21\xf9" + b"\xff" * 300
    assert not has_metadata(data)
