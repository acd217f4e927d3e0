"""Block-wise masks of the MIM stage (BEiT, arXiv 2106.08254, algorithm 1; the EVA-02 code's masking_generator.py).

A mask grows by rectangles until it has `masked` patches. A rectangle that would cover too many new ones is drawn again,
ten times at most; when none fits the mask ends short, so the number of masked patches differs between images.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.errors import DataError
from data.order.stateless import uniform

_ATTEMPTS = 10
_FIRST_DRAWS = 64


class UniformSource(Protocol):
    """Where a generator takes its random numbers from; random.Random is one."""

    def uniform(self, a: float, b: float, /) -> float:
        """Between a and b, in either order."""

    def randint(self, a: int, b: int, /) -> int:
        """a <= n <= b."""


@dataclass(frozen=True, kw_only=True)
class BlockMasks:
    """Generator of masks on a square grid."""

    grid: int = 16
    """Patches along one side of the image."""
    masked: int = 105
    """Patches to mask of grid^2; some masks end short."""
    min_block: int = 16
    """Smallest area of a rectangle in patches, before rounding to whole sides."""
    max_block: int | None = None
    """Largest number of patches that one rectangle may add; None: what is left to mask."""
    min_aspect: float = 0.3
    """Aspect ratios are log-uniform between this and its inverse."""

    def __post_init__(self) -> None:
        if not 0 < self.masked <= self.grid**2:
            raise DataError(
                f"{self.masked} masked patches: a {self.grid} x {self.grid} grid allows 1 to {self.grid**2}"
            )
        most = self.masked if self.max_block is None else min(self.masked, self.max_block)
        if not 0 < self.min_block <= most:
            raise DataError(
                f"min_block {self.min_block} is not between 1 and the {most} patches that a block may mask: many masks "
                "would stay empty"
            )
        if not 0 < self.min_aspect <= 1:
            raise DataError(f"aspect ratio {self.min_aspect} of the narrowest block must be in (0, 1]")

    def draw(self, source: UniformSource) -> np.ndarray:
        """bool [grid, grid], true where masked."""
        mask = np.zeros((self.grid, self.grid), dtype=bool)
        count = 0
        while count < self.masked:
            left = self.masked - count
            added = self._add_block(mask, left if self.max_block is None else min(left, self.max_block), source)
            if added == 0:
                break
            count += added
        return mask

    def _add_block(self, mask: np.ndarray, most: int, source: UniformSource) -> int:
        """Mask one more rectangle that covers 1 to `most` new patches; how many, 0 if no attempt fits."""
        bound = math.log(1 / self.min_aspect)
        for _ in range(_ATTEMPTS):
            area = source.uniform(self.min_block, most)
            aspect = math.exp(source.uniform(-bound, bound))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.grid or width >= self.grid:
                continue
            top, left = source.randint(0, self.grid - height), source.randint(0, self.grid - width)
            block = mask[top : top + height, left : left + width]
            added = block.size - int(block.sum())
            if 0 < added <= most:
                block[:] = True
                return added
        return 0

    def of_samples(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """bool [len(positions), grid^2]: masks of the samples at these global positions, the same at every layout."""
        masks = [self.draw(_SampleDraws(seed, int(position))).ravel() for position in positions]
        return np.array(masks, dtype=bool).reshape(len(positions), self.grid**2)


class _SampleDraws:
    """The stateless numbers of one sample as a source; fetched in blocks, because a mask needs an unknown number."""

    def __init__(self, seed: int, position: int) -> None:
        self._seed, self._at = seed, np.array([position], dtype=np.int64)
        self._numbers = uniform(seed, "mask", self._at, _FIRST_DRAWS)[0]
        self._used = 0

    def _next(self) -> float:
        if self._used == len(self._numbers):
            self._numbers = uniform(self._seed, "mask", self._at, 2 * len(self._numbers))[0]
        self._used += 1
        return float(self._numbers[self._used - 1])

    def uniform(self, a: float, b: float, /) -> float:
        return a + (b - a) * self._next()

    def randint(self, a: int, b: int, /) -> int:
        return a + int((b - a + 1) * self._next())
