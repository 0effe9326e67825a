"""A folder of pictures, one folder a class."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from lightning_secure.crypto.attributes import ENCRYPTED
from lightning_secure.crypto.encoding import canonical_json
from lightning_secure.data.sources.metadata import strip_metadata
from lightning_secure.data.sources.source import Batch, Source, extra, files_identity, gathered
from lightning_secure.errors import ConfigError, DataError
from lightning_secure.util.files import open_regular

_ORIENTATION: Final = 0x0112
_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_BARE: Final = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "adobe", "adobe_transform",
                "dpi", "progressive", "progression", "transparency", "gamma", "chromaticity",
                "srgb", "exif"}  # fmt: skip


class ImageFolderSource(Source):
    """Pictures of ``folder/CLASS/**``, with the columns ``image`` and ``label``.

    Args:
        folder: Its folders are the classes, numbered in the order of their names. These stand
            encrypted in the manifest, see :attr:`EncryptedShardDataset.attributes`. The files'
            names, which often name people, are not sealed.
        decode: Whether ``image`` is a tensor of uint8 with shape ``(3, height, width)``, turned
            the right way up; otherwise it is the bytes of the file.
        size: Height and width to which decoded pictures are resized; without it all must have one.

    Raises:
        ConfigError: if the folder has no class folders or no pictures, or other files among them.
        MissingExtraError: if Pillow is not installed.

    Guarantees:
        No EXIF (so no place, time or device), XMP, IPTC, comment, thumbnail, colour profile or
        appended data is sealed. Decoded pictures have none. JPEG and PNG bytes lose them without
        being encoded again, see :mod:`lightning_secure.data.sources.metadata`, and are opened by
        Pillow afterwards to see that nothing is left; other formats are refused as bytes. What is
        hidden within the coded pixels stays in bytes, and goes with ``decode``.
    """

    def __init__(
        self, folder: Path, *, decode: bool = False, size: tuple[int, int] | None = None
    ) -> None:
        extra("PIL.Image", "images", what="an image folder")
        if size is not None and not decode:
            raise ConfigError("size= resizes decoded pictures; pass decode=True with it.")
        self._folder = folder
        self._decode = decode
        self._size = size
        self.classes = tuple(sorted(p.name for p in folder.iterdir() if _visible(p) and p.is_dir()))
        self._files: list[tuple[Path, int]] = []
        for label, name in enumerate(self.classes):
            for path in sorted((folder / name).rglob("*")):
                if not _visible(path) or path.is_dir():
                    continue
                if path.suffix.lower() not in _SUFFIXES:
                    raise ConfigError(
                        f"class {name!r} holds a file that is no picture (suffix "
                        f"{path.suffix!r}). Nothing was sealed. Move it elsewhere."
                    )
                self._files.append((path, label))
        loose = [p for p in folder.iterdir() if _visible(p) and not p.is_dir()]
        if not self._files or loose:
            raise ConfigError(
                f"{str(folder)!r} must hold one folder of pictures for each class and nothing "
                f"else: there are {len(self._files)} pictures, and {len(loose)} files outside of a "
                "class. Nothing was sealed."
            )

    @property
    def rows(self) -> int:
        """The number of pictures."""
        return len(self._files)

    @property
    def remarks(self) -> Mapping[str, str]:
        """The names of the classes, and what was done to the pictures."""
        done = "decoded, turned upright" if self._decode else "metadata stripped"
        resized = f", resized to {self._size[0]}x{self._size[1]}" if self._size else ""
        names = canonical_json(list(self.classes)).decode()
        return {f"{ENCRYPTED}classes.label": names, "image": done + resized}

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield pictures and labels, class by class."""
        read = self._decoded if self._decode else self._stripped
        rows = (
            {"image": read(path, number), "label": label}
            for number, (path, label) in enumerate(self._files[start:], start)
        )
        return gathered(rows, first_row=start)

    def identity(self) -> str:
        """Return what changes whenever a file is added, removed, renamed or changed."""
        files = files_identity((path for path, _ in self._files), root=self._folder)
        return f"{files} {self._decode} {self._size}"

    def _decoded(self, path: Path, number: int) -> torch.Tensor:
        ops = extra("PIL.ImageOps", "images", what="an image folder")
        data = _content(path, number)
        pixels = None
        try:
            with _opened(data) as image:
                upright = ops.exif_transpose(image).convert("RGB")
                if self._size is not None:
                    upright = upright.resize((self._size[1], self._size[0]))
                pixels = np.asarray(upright).transpose(2, 0, 1).copy()
        except Exception:  # noqa: BLE001, S110 # Pillow's decoders raise what they like
            pass
        if pixels is None:
            raise _unreadable(number, "it cannot be decoded")
        return torch.from_numpy(pixels)

    def _stripped(self, path: Path, number: int) -> bytes:
        data = _content(path, number)
        bare = None
        try:
            with _opened(data) as image:
                turn = image.getexif().get(_ORIENTATION, 1)
            bare = strip_metadata(data, orientation=turn if turn in range(2, 9) else 1)
            with _opened(bare) as image:
                image.load()
                left = {str(name).lower() for name in image.info} - _BARE
                left |= {str(tag) for tag in image.getexif()} - {str(_ORIENTATION)}
        except DataError:
            raise _unreadable(
                number, "it is no JPEG or PNG that can be taken apart as bytes; pass decode=True"
            ) from None
        except Exception:  # noqa: BLE001 # Pillow's decoders raise what they like
            left = {"damage"}
        if left or bare is None:
            raise _unreadable(number, "it is damaged, or its metadata could not be taken out")
        return bare


def _content(path: Path, number: int) -> bytes:
    with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb") as file:
        return file.read()
    raise _unreadable(number, "it cannot be read, or it is no regular file")


def _opened(data: bytes) -> Any:
    image = extra("PIL.Image", "images", what="an image folder")
    with warnings.catch_warnings():
        # A picture that would fill the memory is an error, not a warning.
        warnings.simplefilter("error", image.DecompressionBombWarning)
        return image.open(io.BytesIO(data))


def _unreadable(number: int, why: str) -> DataError:
    return DataError(
        f"picture {number}, counted from 0 through the sorted folders, was refused: {why}. Nothing "
        "of the split was put into the dataset."
    )


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")
