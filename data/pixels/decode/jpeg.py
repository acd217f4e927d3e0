"""JPEGs by libjpeg-turbo itself (the package simplejpeg), everything else by Pillow.

Pillow's wheels hold the same library, so the pixels are Pillow's to the bit (tests/data/test_jpeg.py); what is spared
is Pillow's way there and back: pictures in blocks of four bytes a pixel, packed to three when NumPy asks for them. Only
whole grey and YCbCr JPEGs that decode without a word of warning come from here: what the library warns of or refuses
(cut, damaged, CMYK, 12 bits, lossless) goes to Pillow, so that it has Pillow's pixels or Pillow's reason.

simplejpeg is imported nowhere else.
"""

import importlib.util
import math

import numpy as np

from data.errors import DataError
from data.pixels.decode.pillow import JPEG, PillowDecoder
from data.pixels.decode.resize import reduced_size

_SPACES = ("YCbCr", "Gray")
_MOST_KEPT_BYTES = 1 << 26
"""A larger picture has memory of its own; up to here one buffer serves all, and the kernel is not asked for pages."""


def is_installed() -> bool:
    """simplejpeg can be imported."""
    return importlib.util.find_spec("simplejpeg") is not None


class JpegDecoder(PillowDecoder):
    """See the module text."""

    def __init__(self, *, max_pixels: int, scaled_decode: float = 0.0) -> None:
        """scaled_decode: as data.scaled_decode. Raises DataError without simplejpeg."""
        super().__init__(max_pixels=max_pixels, scaled_decode=scaled_decode)
        try:
            import simplejpeg
        except ImportError as error:
            raise DataError(
                f"data.decoder=simplejpeg needs simplejpeg ({error}): pip install simplejpeg, or set "
                "data.decoder=pillow"
            ) from error
        self._simplejpeg = simplejpeg
        self._buffer = np.empty(0, dtype=np.uint8)
        self.from_pillow = 0
        """JPEGs that the library warned of or refused, and that Pillow took."""

    def size(self, encoded: bytes) -> tuple[int, int]:
        return self._size(encoded) or super().size(encoded)

    def pixels(self, encoded: bytes) -> np.ndarray:
        if not encoded.startswith(JPEG):
            return super().pixels(encoded)
        pixels = self._decoded(encoded, 1)
        return super().pixels(encoded) if pixels is None else pixels

    def reduced_pixels(self, encoded: bytes, factor: int) -> np.ndarray | None:
        pixels = self._decoded(encoded, factor)
        return super().reduced_pixels(encoded, factor) if pixels is None else pixels

    def _decoded(self, encoded: bytes, factor: int) -> np.ndarray | None:
        """None, and counted: Pillow decodes it."""
        size = self._size(encoded)
        if size is not None:
            width, height = reduced_size(size, factor)
            least = {} if factor == 1 else {"min_width": width, "min_height": height, "min_factor": factor}
            try:
                return self._simplejpeg.decode_jpeg(encoded, "RGB", buffer=self._room(3 * width * height), **least)
            except (ValueError, KeyError):  # the library's warnings and errors
                pass
        self.from_pillow += 1
        return None

    def _size(self, encoded: bytes) -> tuple[int, int] | None:
        """Width and height of what the library may decode; None: Pillow looks at it."""
        if not encoded.startswith(JPEG):
            return None
        try:
            height, width, space, _ = self._simplejpeg.decode_jpeg_header(encoded)
        except (ValueError, KeyError):  # KeyError: a subsampling that it has no name for
            return None
        return (width, height) if space in _SPACES and width * height <= self._max_pixels else None

    def _room(self, size: int) -> np.ndarray:
        """uint8 [at least size], undefined."""
        if size > _MOST_KEPT_BYTES:
            return np.empty(size, dtype=np.uint8)
        if size > len(self._buffer):
            self._buffer = np.empty(1 << math.ceil(math.log2(size)), dtype=np.uint8)
        return self._buffer
