"""What every decoder promises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from data.errors import Rejected
from data.pixels.transforms import Window

Job = tuple[bytes, Window]
"""An encoded image, and what to cut of it."""


class Decoder(ABC):
    """Encoded bytes and a window to pixels.

    All decoders agree on this: RGB; the first frame of an animation; transparent pixels lie on white; 16-bit
    values keep their high byte; EXIF rotation is not applied (as in the paper's code); bicubic with
    antialiasing; more than `max_pixels` are not decoded.
    """

    device = torch.device("cpu")
    """Where the pixels appear."""

    @abstractmethod
    def size(self, encoded: bytes) -> tuple[int, int]:
        """(width, height) in pixels from the header alone. Raises Rejected."""

    @abstractmethod
    def decode(self, encoded: bytes, window: Window) -> np.ndarray:
        """uint8 [3, window.size, window.size] RGB. Raises Rejected."""

    def decode_many(self, jobs: Sequence[Job], out: torch.Tensor) -> list[Rejected | None]:
        """Fills out, uint8 [len(jobs), 3, size, size] on `device`; None for each decoded job, else why not
        (its part of `out` is undefined).
        """
        return [self.decode_into(job, row) for job, row in zip(jobs, out, strict=True)]

    def decode_into(self, job: Job, row: torch.Tensor) -> Rejected | None:
        """One job into its row of `out`."""
        try:
            pixels = self.decode(*job)
        except Rejected as rejected:
            return rejected
        row.copy_(torch.from_numpy(pixels))
        return None
