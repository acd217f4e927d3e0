"""What every decoder promises."""

from abc import ABC, abstractmethod

import numpy as np

from data.transforms import Window


class Decoder(ABC):
    """Encoded bytes and a window to pixels.

    All decoders agree on this: RGB; the first frame of an animation; transparent pixels lie on white; 16-bit
    values keep their high byte; EXIF rotation is not applied (as in the paper's code); bicubic with
    antialiasing.
    """

    @abstractmethod
    def size(self, encoded: bytes) -> tuple[int, int]:
        """(width, height) in pixels from the header alone. Raises Rejected."""

    @abstractmethod
    def decode(self, encoded: bytes, window: Window) -> np.ndarray:
        """uint8 [3, window.size, window.size] RGB. Raises Rejected."""
