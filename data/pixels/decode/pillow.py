"""Decoding with Pillow: runs everywhere, and is the reference for the other decoders."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.errors import Rejected
from data.pixels.decode.base import Decoder
from data.pixels.decode.resize import cut
from data.pixels.transforms import Window

# Web images are untrusted: only decoders of formats that image shards really hold are reachable.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


class PillowDecoder(Decoder):
    """Pillow's decoders, the window of data/pixels/decode/resize.py and nothing else."""

    def __init__(self, *, max_pixels: int) -> None:
        self._max_pixels = max_pixels

    def size(self, encoded: bytes) -> tuple[int, int]:
        return self.open(encoded).size

    def decode(self, encoded: bytes, window: Window) -> np.ndarray:
        image = self.open(encoded)
        with _counted_failures():
            image.load()
        return cut(np.asarray(to_rgb(image)), window)

    def open(self, encoded: bytes) -> Image.Image:
        """Reads the header only. Raises Rejected."""
        if not encoded:
            raise Rejected("empty_image")
        with _counted_failures():
            image = Image.open(BytesIO(encoded), formats=_FORMATS)
        if image.width * image.height > self._max_pixels:
            raise Rejected("too_many_pixels")
        return image


@contextmanager
def _counted_failures() -> Iterator[None]:
    """Around Pillow's parsing of foreign bytes only: a mistake in our own code must not pass for a bad
    image.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels") from error
    except UnidentifiedImageError as error:
        raise Rejected("not_an_image") from error
    except Exception as error:  # Pillow raises almost anything there: SyntaxError, struct.error, OSError, ...
        truncated = "truncated" in str(error).lower()
        raise Rejected("truncated_image" if truncated else "undecodable_image") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode (grey, palette, alpha, CMYK, 16-bit) to RGB; transparent pixels are laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode not in ("LA", "RGBA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
