"""Decoding with Pillow: runs everywhere, and is the reference for the other decoders."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from data.errors import Rejected
from data.pixels.decode.base import Decoder
from data.pixels.decode.resize import cut, reduced, reduced_size
from data.pixels.transforms import Window

# Web images are untrusted: only decoders of formats that image shards really hold are reachable.
# AVIF: Pillow 11.3 and later; an older one warns of the question.
_HAS_AVIF = "avif" in features.modules and features.check("avif")
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", *(["AVIF"] if _HAS_AVIF else []))
if "AVIF" in _FORMATS:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # readers are processes: one core each


JPEG = b"\xff\xd8\xff"
"""What a JPEG begins with."""


class PillowDecoder(Decoder):
    """Pillow's decoders, the window of data/pixels/decode/resize.py and nothing else."""

    def __init__(self, *, max_pixels: int, scaled_decode: float = 0.0) -> None:
        """scaled_decode: as data.scaled_decode."""
        self._max_pixels = max_pixels
        self._scaled_decode = scaled_decode

    def size(self, encoded: bytes) -> tuple[int, int]:
        return self.open(encoded).size

    def decode(self, encoded: bytes, window: Window) -> np.ndarray:
        if self._scaled_decode and encoded.startswith(JPEG):
            factor, smaller = reduced(window, least=self._scaled_decode)
            pixels = self.reduced_pixels(encoded, factor) if factor > 1 else None
            if pixels is not None:
                return cut(pixels, smaller)
        return cut(self.pixels(encoded), window)

    def pixels(self, encoded: bytes) -> np.ndarray:
        """uint8 [height, width, 3] RGB, valid until the next picture is decoded. Raises Rejected."""
        image = self.open(encoded)
        with _counted_failures():
            image.load()
        return np.asarray(to_rgb(image))

    def reduced_pixels(self, encoded: bytes, factor: int) -> np.ndarray | None:
        """The same of a JPEG, uint8 [ceil(height / factor), ceil(width / factor), 3], by the decoder's own transforms
        of 4, 2 or 1 in place of 8 values; None where there are none for it. Raises Rejected.
        """
        image = self.open(encoded)
        wanted = reduced_size(image.size, factor)
        with _counted_failures():
            image.draft(None, (image.width // factor, image.height // factor))
            if image.size != wanted:
                return None
            image.load()
        return np.asarray(to_rgb(image))

    def open(self, encoded: bytes) -> Image.Image:
        """Reads the header only. Raises Rejected."""
        if not encoded:
            raise Rejected("empty_image")
        with _counted_failures():
            image = Image.open(BytesIO(encoded), formats=_FORMATS)
        if image.width * image.height > self._max_pixels:
            raise Rejected("too_many_pixels")
        return image


class _OwnLimit:
    """Pillow's own limit of pixels, which is the process's, while threads parse: data.max_pixels decides for them."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self.begin()

    def begin(self) -> None:
        """Nobody parses: threads of the parent, and their lock, are not in a reader that was forked meanwhile."""
        self._lock, self._parsing = threading.Lock(), 0

    def lift(self) -> None:
        """One more thread parses."""
        with self._lock:
            if self._parsing == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._parsing += 1

    def put_back(self) -> None:
        """It has; the last one gives everybody else the limit back."""
        with self._lock:
            self._parsing -= 1
            if self._parsing == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


_OWN_LIMIT = _OwnLimit()
os.register_at_fork(after_in_child=_OWN_LIMIT.begin)


@contextmanager
def _counted_failures() -> Iterator[None]:
    """Around Pillow's parsing of foreign bytes only: a mistake in our own code must not pass for a bad
    image.
    """
    _OWN_LIMIT.lift()
    try:
        yield
    except UnidentifiedImageError as error:
        raise Rejected("not_an_image") from error
    except Exception as error:  # Pillow raises almost anything there: SyntaxError, struct.error, OSError, ...
        truncated = "truncated" in str(error).lower()
        raise Rejected("truncated_image" if truncated else "undecodable_image") from error
    finally:
        _OWN_LIMIT.put_back()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode (grey, palette, alpha, CMYK, 16-bit) to RGB; transparent pixels are laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        levels = np.asarray(image)
        grey = (levels >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(np.where(levels == transparent, np.uint8(255), grey)).convert("RGB")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # 16-bit colours: Pillow keeps the high byte of pixels and all of the transparent colour
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode not in ("LA", "RGBA", "PA") and transparent is None:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
